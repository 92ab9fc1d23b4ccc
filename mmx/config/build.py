"""Builds a frozen `Experiment` from a ConfigDict or a config.json, and writes it as JSON."""
import dataclasses
import json

from ml_collections import ConfigDict

from mmx.config.errors import ConfigError, nearest, require
from mmx.config.parsing import typed
from mmx.config.schema import LATER_KEYS, SECTIONS, Experiment


def default() -> ConfigDict:
    """A ConfigDict with every key at its default: experiments start from it."""
    return ConfigDict({name: _as_dict(kind()) | _unresolved_alphas(name) for name, kind in SECTIONS.items()})


def build(config: ConfigDict | dict) -> Experiment:
    """The frozen experiment of a ConfigDict or a plain dict; raises ConfigError for unknown keys and wrong values."""
    config = config.to_dict() if isinstance(config, ConfigDict) else config
    _check_names("", config, SECTIONS)
    parts = {name: _section(name, config.get(name, {}), kind) for name, kind in SECTIONS.items()}
    for part in parts.values():
        part.validate()
    experiment = Experiment(**parts)
    require(not experiment.train.contrastive or experiment.model.vision.layers,
            f"train.contrastive={experiment.train.contrastive} needs a model that reads images: set model.vision.layers")
    return experiment


def as_config_dict(experiment: Experiment) -> ConfigDict:
    """The ConfigDict of an experiment. Residual factors with their default value are 0, so that they follow model.layers."""
    values, model = {name: _as_dict(getattr(experiment, name)) for name in SECTIONS}, experiment.model
    for key in _unresolved_alphas("model"):
        if getattr(dataclasses.replace(model, **{key: 0.0}), key) == getattr(model, key):
            values["model"][key] = 0.0
    return ConfigDict(values)


def sections(experiment: Experiment) -> dict:
    """The experiment as plain dicts, as config.json keeps it.

    Omits model.vision for a text model, and the LATER_KEYS at their defaults, as config.json of older versions of mmx does.
    """
    values = dataclasses.asdict(experiment)
    if not experiment.model.vision.layers:
        del values["model"]["vision"]
    for section, defaults in LATER_KEYS.items():
        for key, default in defaults.items():
            if values[section][key] == default:
                del values[section][key]
    return values


def to_json(experiment: Experiment) -> str:
    return json.dumps(sections(experiment), indent=1, allow_nan=False)


def from_json(text: str) -> Experiment:
    return build(json.loads(text))


def _as_dict(section) -> dict:
    """Like dataclasses.asdict, but tuples stay tuples."""
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {name: _as_dict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def _unresolved_alphas(name: str) -> dict:
    """Residual factors stay 0 until `build`, so that an override of model.layers changes them too."""
    return {f"alpha_{part}": 0.0 for part in ("lightning", "softmax", "moe")} if name == "model" else {}


def _section(name: str, values: dict, kind: type):
    require(isinstance(values, dict), f"config.{name} must be a section, got {values!r}")
    kinds = {f.name: f.type for f in dataclasses.fields(kind)}
    _check_names(name + ".", values, kinds)
    return kind(**{key: (_section if dataclasses.is_dataclass(kinds[key]) else typed)(f"{name}.{key}", value, kinds[key])
                   for key, value in values.items()})


def _check_names(prefix: str, values, known) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown config key {prefix}{key:.200}{nearest(key, known)}")
