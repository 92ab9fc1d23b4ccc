"""Reads the user's files for suites. Error messages name the file and what is missing in it."""
from pathlib import Path

from mmx.config import ConfigError, is_text
from mmx.files import texts, untrusted

MAX_BYTES = 1 << 30         # of one file; LongBench v2's data.json has half of that


def find(data: Path | None, name: str, suite: str, folders=("",)) -> Path:
    """The path of file `name` in the folder `data`, or in one of the given `folders` inside it."""
    if data is None:
        raise ConfigError(f"{suite} needs your file {name}: give its folder as --data DIR")
    paths = [Path(data) / folder / name for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    raise ConfigError(f"{suite}: there is no file {' or '.join(map(str, paths))}")


def list_jsonl(folder: Path, name: str = "") -> list[Path]:
    """The .jsonl files of a folder, also compressed, sorted; without hidden ones.

    Args:
      name: the only one to list, without suffixes.
    """
    return sorted(path for path in folder.iterdir() if texts.suffix(path) == ".jsonl" and not path.name.startswith(".")
                  and name in ("", path.name.partition(".")[0]) and path.is_file())


def read(path: Path):
    """The value in a JSON file."""
    try:
        return untrusted.loads(texts.read_bytes(path, MAX_BYTES))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from None


def records(path: Path) -> list[dict]:
    """The objects of a .jsonl file (one a line) or of a .json file (one array)."""
    if texts.suffix(path) == ".json":
        found = [(path, value) for value in _read_list(path)]
    else:
        found = texts.read_json_lines(path, MAX_BYTES)
    for where, value in found:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: each entry must be an object, this one is {type(value).__name__}")
    return [value for _, value in found]


def column(record, name: str, where, kind: type):
    """The value of a record's column, checked to be of type `kind`. `where` names the record in error messages."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{where}: an entry lacks the column {name!r} ({kind.__name__})")
    if kind is str and not is_text(value):
        raise ConfigError(f"{where}: column {name!r} is not valid text: it contains half of a surrogate pair")
    return value


def _read_list(path):
    value = read(path)
    if not isinstance(value, list):
        raise ConfigError(f"{path} must contain an array of objects, this is {type(value).__name__}")
    return value
