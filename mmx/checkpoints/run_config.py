"""WORKDIR/config.json, which describes a run, and its tokenizer; their comparison with the experiment of a resumed run."""
import json
from pathlib import Path

import jax

from mmx.checkpoints.tokenizer_files import find_tokenizer, fingerprint
from mmx.config import IMPLEMENTATION_KEYS, LATER_KEYS, ConfigError, Experiment, Model, to_json
from mmx.data import paths, special_tokens, tokens
from mmx.files import atomic, untrusted
from mmx.layers.kinds import kind_of

# keys that a resumed run may change besides the sections checkpoint and mesh: duration, speed, logging
CHANGEABLE_KEYS = {
    "model": set(IMPLEMENTATION_KEYS), "data": {"cache"},
    "train": {"steps", "seconds", "log_every", "eval_every", "eval_bytes", "sample_every", "sample_prompt",
              "tensorboard"},
}
# the same for the first run of a converted checkpoint
CONVERTED_CHANGEABLE_KEYS = {"model": CHANGEABLE_KEYS["model"] | {"aux", "aux_weight", "context"}}


def read_config(workdir: str | Path) -> dict:
    """The sections of WORKDIR/config.json."""
    path = Path(workdir) / "config.json"
    sections = untrusted.read_json(untrusted.check_link(path))
    if "model" not in sections or not all(isinstance(section, dict) for section in sections.values()):
        raise ConfigError(f"{path} is not the config of a run: it is damaged, or belongs to a Hugging Face checkpoint")
    return sections


def check_config(workdir: str | Path, experiment: Experiment, write: bool = True) -> None:
    """Raises ConfigError if the workdir has a run of another config, or with another tokenizer.

    Args:
      write: also write WORKDIR/config.json, and tokenizer.json and generation_config.json if the run has a tokenizer.json.
    """
    path, data = Path(workdir) / "config.json", experiment.data
    tokenizer, same_tokenizer = path.with_name("tokenizer.json"), False
    saved = paths.adopt_paths(read_config(workdir), experiment) if path.exists() else {}
    if name := _saved_tokenizer(Path(workdir), saved):
        if fingerprint(name) != fingerprint(data.tokenizer):
            raise ConfigError(f"data.tokenizer={data.tokenizer!r} is not the {name} that the run has: give "
                              f"--config.data.tokenizer={name}, or another --workdir")
        same_tokenizer = True
    if saved:
        changeable = CHANGEABLE_KEYS if "train" in saved else CONVERTED_CHANGEABLE_KEYS
        if same_tokenizer:      # the path of the tokenizer.json may change, its contents may not
            changeable = changeable | {"data": {*changeable.get("data", ()), "tokenizer"}}
        old, new = _comparable(saved, changeable), _comparable(json.loads(to_json(experiment)), changeable)
        different = [f"{section}.{key} (there {old[section][key]!r}, now {value!r})" for section in old
                     for key, value in new[section].items() if key in old[section] and old[section][key] != value]
        if different:
            raise ConfigError(f"{workdir} contains a run of another config: {', '.join(different)}; give the same values, or "
                              "another --workdir")
    special = _special_tokens(tokenizer, data.tokenizer_file) if data.tokenizer_file else {}
    if write and jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        files = {path: to_json(experiment).encode()} | special
        if data.tokenizer_file and not tokenizer.exists():
            files[tokenizer] = untrusted.read_bytes(data.tokenizer_file, untrusted.TOKENIZER_BYTES)
        for file, content in files.items():
            with atomic.replacing(file, "wb") as new:
                new.write(content)


def _saved_tokenizer(workdir: Path, saved: dict) -> str:
    """The tokenizer of a run: its tokenizer.json, or for a converted checkpoint also "bytes"; "" if neither is known."""
    file = workdir / "tokenizer.json"
    converted = saved and "data" not in saved
    ids = special_tokens.as_json(special_tokens.stored_ids(workdir)) if converted else {}
    return str(file) if file.exists() else find_tokenizer(workdir, ids)


def _special_tokens(tokenizer: Path, name: str) -> dict[Path, bytes]:
    """The generation_config.json with the special tokens of a run, which files beside data.tokenizer=`name` may decide.

    Raises ConfigError if the run's own tokenizer.json, which it has if it was started before, has others.
    """
    ids, generation = tokens.special_ids(tokens.tokenizer(name)), tokenizer.with_name("generation_config.json")
    if tokenizer.exists() and (own := tokens.special_ids(tokens.tokenizer(str(tokenizer)))) != ids:
        raise ConfigError(f"data.tokenizer={name!r} has the special tokens {ids}, the run's {tokenizer} has {own}: give "
                          f"--config.data.tokenizer={tokenizer}, or another --workdir")
    saved = untrusted.read_json(untrusted.check_link(generation)) if generation.exists() else {}
    return {generation: json.dumps(saved | ids, indent=1).encode()}


def _comparable(sections: dict, changeable: dict) -> dict:
    """The sections that describe the function and its training, without the keys that may change."""
    model = {"vision": None} | LATER_KEYS["model"] | sections["model"]     # `to_json` leaves these out at their defaults
    if "window" not in {key for letter in model.get("pattern", Model.pattern) for key in kind_of(letter).config_keys}:
        del model["window"]
    sections = sections | {"model": model}
    if "data" in sections:
        sections["data"] = LATER_KEYS["data"] | sections["data"]
    return {section: {key: value for key, value in sections[section].items() if key not in changeable.get(section, ())}
            for section in ("model", "train", "data") if section in sections}
