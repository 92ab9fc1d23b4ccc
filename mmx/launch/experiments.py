"""Experiment files: FILE.py with get_config(), and sweep() beside it; overrides of any key; mistakes told with their line."""
import contextlib
import functools
import re
import runpy
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from mmx import config
from mmx.config import ConfigError


def read(path: str, overrides: list[str]) -> config.Experiment:
    """The experiment of FILE.py, or FILE.py:A,B with arguments of its get_config, with `--config.key=value` overrides."""
    return _override(_get_config(path), overrides)


def grid(file: str, overrides: list[str]):
    """What sweep() of an experiment file returns, and a function of a cell's keys that makes its experiment.

    A key with a dot is a config key, one without is an argument of get_config.
    """
    names = _run_file(file)
    if "sweep" not in names:
        raise ConfigError(f"{file} has no sweep(): it returns a dict of values by key, or a list of dicts, a run each")

    def make(keys):
        found = _called(file, names, "get_config", **{k: v for k, v in keys.items() if "." not in k})
        for key, value in keys.items():
            if "." in key and key not in key_types():
                raise ConfigError(f"unknown config key {key}{config.nearest(key, key_types())}")
            if "." in key:
                *path, name = key.split(".")
                section = functools.reduce(lambda section, part: section[part], path, found)
                with section.ignore_type():      # build says what is wrong with a value
                    section[name] = value
        return _override(found, overrides)

    return _called(file, names, "sweep"), make


def key_types() -> dict[str, str]:
    """The type of every config key."""
    def below(values, above=""):
        for key, value in values.items():
            deeper = isinstance(value, ConfigDict)
            yield from below(value, f"{above}{key}.") if deeper else [(above + key, type(value).__name__)]
    return dict(below(config.default()))


def _override(found: ConfigDict, overrides: list[str]) -> config.Experiment:
    known = key_types()
    awaited = False         # an argument that is the value of the one before
    for override in overrides:
        key = None if awaited else re.match(r"--?(?:no)?config\.([^=]*)", override)
        if not key and override.startswith("-") and not awaited:    # absl: a recursion as deep as the argument is long
            raise ConfigError(f"unknown argument {override!r:.200}; overrides are --config.SECTION.KEY=VALUE")
        if key and key[1] not in known:
            raise ConfigError(f"unknown config key {key[1]:.200}{config.nearest(key[1], known)}")
        awaited = bool(key) and "=" not in override and known[key[1]] != "bool"
    values = flags.FlagValues()
    arguments = ["mmx", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", found, flag_values=values, sys_argv=arguments)
        left = values(arguments)[1:]
    except flags.Error as error:
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error))
        raise ConfigError(f"config key {wrong[1]} needs {known[wrong[1]]}, got {wrong[2]!r}" if wrong else error) from None
    if left:
        raise ConfigError(f"unknown argument {left[0]!r}; overrides are --config.SECTION.KEY=VALUE")
    return config.build(values.config)


def _get_config(path: str) -> ConfigDict:
    """What an experiment file's get_config returns for FILE.py, or for the arguments of FILE.py:A,B."""
    file, arguments = re.fullmatch(r"(.*?)(?:(?<=\.py):(.*))?", path).groups()
    return _called(file, _run_file(file), "get_config", *([] if arguments is None else arguments.split(",")))


def _run_file(file: str) -> dict:
    """The names of an experiment file."""
    if not Path(file).is_file():
        folder = Path(file) if Path(file).is_dir() else Path(file).parent
        names = sorted(str(p) for p in folder.glob("*.py"))
        raise ConfigError(f"no experiment file {file}" + (config.nearest(file, names) if names else ""))
    with _mistakes_told(file):
        return runpy.run_path(file)


def _called(file: str, names: dict, function: str, *arguments, **keys):
    """What a function of an experiment file returns: get_config a ConfigDict."""
    with _mistakes_told(file):
        found = names[function](*arguments, **keys)
    if function == "get_config" and not isinstance(found, ConfigDict):
        raise ConfigError(f"{file}: get_config() must return a ConfigDict, got {type(found).__name__}")
    return found


@contextlib.contextmanager
def _mistakes_told(file: str):
    """A mistake in an experiment file, with its line."""
    try:
        yield
    except ConfigError as error:        # of an argument
        raise ConfigError(f"{file}: {error}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        raise ConfigError(f"{file}:{line}: {type(error).__name__}: {error}") from None
