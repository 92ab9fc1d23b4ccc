"""Experiment files: FILE.py with get_config() and, for a grid of runs, sweep(); overrides of config keys.

A name such as `tiny`, which is not a path, means an experiment that is installed with mmx. Errors in an experiment file are
reported in one line, with the file's line number.
"""
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

INSTALLED = Path(__file__).parents[1] / "experiments"       # in a clone, a link to the folder experiments


def read(path: str, overrides: list[str]) -> config.Experiment:
    """Returns the experiment of an experiment file.

    Args:
      path: FILE.py or the name of an installed experiment; followed by :A,B, where A and B are arguments of get_config.
      overrides: --config.SECTION.KEY=VALUE arguments.
    """
    return _build(_get_config(path), overrides)


def read_sections(sections: dict, overrides: list[str]) -> config.Experiment:
    """Returns the experiment of a config.json's sections; missing sections and keys have their defaults.

    Args:
      overrides: --config.SECTION.KEY=VALUE arguments.
    """
    return _build(config.as_config_dict(config.build(sections)), overrides)


def grid(file: str, overrides: list[str]):
    """Returns what sweep() of an experiment file returns, and a function that makes the experiment of a cell's keys.

    `file` is a path or the name of an installed experiment. A key with a dot is a config key; a key without one is an
    argument of get_config.
    """
    file = find(file)
    names = _run_file(file)
    if "sweep" not in names:
        raise ConfigError(f"{file} has no sweep(), which must return a dict of lists of values by key, or a list of dicts with "
                          "one run each")

    def make(keys):
        values = _call(file, names, "get_config", **{key: value for key, value in keys.items() if "." not in key})
        for key, value in keys.items():
            if "." in key and key not in key_types():
                raise ConfigError(f"unknown config key {key}{config.nearest(key, key_types())}")
            if "." in key:
                *path, name = key.split(".")
                section = functools.reduce(lambda section, part: section[part], path, values)
                with section.ignore_type():     # config.build checks the type
                    section[name] = value
        return _build(values, overrides)

    return _call(file, names, "sweep"), make


def is_json(file: str | Path) -> bool:
    """Whether a file contains a JSON object, such as the config.json of a run."""
    with open(file, "rb") as start:
        return start.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def key_types() -> dict[str, str]:
    """Returns the name of the type of every config key."""
    def flatten(values, prefix=""):
        for key, value in values.items():
            is_section = isinstance(value, ConfigDict)
            yield from flatten(value, f"{prefix}{key}.") if is_section else [(prefix + key, type(value).__name__)]
    return dict(flatten(config.default()))


def _build(values: ConfigDict, overrides: list[str]) -> config.Experiment:
    """Applies the overrides and returns the experiment."""
    types = key_types()
    _check_overrides(overrides, types)
    parsed = flags.FlagValues()
    arguments = ["mmx", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", values, flag_values=parsed, sys_argv=arguments)
        unknown = parsed(arguments)[1:]
    except flags.Error as error:
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error))
        raise ConfigError(f"config key {wrong[1]} needs {types[wrong[1]]}, got {wrong[2]!r}" if wrong else error) from None
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; overrides are --config.SECTION.KEY=VALUE")
    return config.build(parsed.config)


def _check_overrides(overrides: list[str], types: dict[str, str]) -> None:
    """Raises ConfigError for unknown arguments and keys. absl's own check recurses once for each character."""
    is_value = False        # this argument is the value of the previous one, as in "--config.train.steps 7"
    for override in overrides:
        key = None if is_value else re.match(r"--?(?:no)?config\.([^=]*)", override)
        if not key and override.startswith("-") and not is_value:
            raise ConfigError(f"unknown argument {override!r:.200}; overrides are --config.SECTION.KEY=VALUE")
        if key and key[1] not in types:
            raise ConfigError(f"unknown config key {key[1]:.200}{config.nearest(key[1], types)}")
        is_value = bool(key) and "=" not in override and types[key[1]] != "bool"


def _get_config(path: str) -> ConfigDict:
    """Calls get_config of FILE.py or NAME; with arguments if the path ends in :A,B."""
    match = None if Path(path).is_file() else re.fullmatch(r"(?s)(\w+|.*?\.py):(.*)", path)
    file, arguments = (find(match[1]), match[2].split(",")) if match else (find(path), [])
    return _call(file, _run_file(file), "get_config", *arguments)


def find(file: str) -> str:
    """Returns the path of an experiment file, which is given as a path or as the name of an installed experiment.

    Raises ConfigError if there is no such file.
    """
    installed = {path.stem: str(path) for path in sorted(INSTALLED.glob("*.py"))}
    if Path(file).is_file():
        return file
    if file in installed:
        return installed[file]
    folder = Path(file) if Path(file).is_dir() else Path(file).parent
    raise ConfigError(f"no experiment file {file}{config.nearest(file, [*sorted(map(str, folder.glob('*.py'))), *installed])}")


def _run_file(file: str) -> dict:
    """Executes an experiment file and returns its global names."""
    if is_json(file):
        raise ConfigError(f"{file} is JSON, and this needs an experiment file in Python, with sweep() for a grid")
    with _errors_with_line(file):
        return runpy.run_path(file)


def _call(file: str, names: dict, function: str, *arguments, **keys):
    """Calls a function of an experiment file; get_config must return a ConfigDict."""
    if function not in names:
        raise ConfigError(f"{file} has no {function}()")
    with _errors_with_line(file):
        result = names[function](*arguments, **keys)
    if function == "get_config" and not isinstance(result, ConfigDict):
        raise ConfigError(f"{file}: get_config() must return a ConfigDict, got {type(result).__name__}")
    return result


@contextlib.contextmanager
def _errors_with_line(file: str):
    """Turns an exception in an experiment file into a ConfigError with the file's name and line."""
    try:
        yield
    except ConfigError as error:        # of an argument, which no line of the file has caused
        raise ConfigError(f"{file}: {error}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        raise ConfigError(f"{file}:{line}: {type(error).__name__}: {error}") from None
