"""The user's files: what is missing in them is named."""
from pathlib import Path

from mmx.config import ConfigError, is_text
from mmx.files import untrusted

MOST_BYTES = 1 << 30        # LongBench v2's has half of that


def find(data: Path | None, name: str, what: str, under=("",)) -> Path:
    """`name` in the folder `data`, or in one of the folders `under` it."""
    if data is None:
        raise ConfigError(f"{what} needs a file {name} of yours: give its folder as --data DIR")
    paths = [Path(data) / folder / name for folder in under]
    for path in paths:
        if path.is_file():
            return path
    raise ConfigError(f"{what}: no file {' or '.join(map(str, paths))}")


def read(path: Path):
    """A JSON file."""
    try:
        return untrusted.loads(untrusted.read_bytes(path, MOST_BYTES))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from None


def records(path: Path) -> list[dict]:
    """The objects of a .jsonl file, one a line, or of a .json file, one array."""
    if path.suffix == ".json":
        found = [(path, value) for value in _list(read(path), path)]
    else:
        found = []
        for number, line in enumerate(untrusted.read_bytes(path, MOST_BYTES).split(b"\n"), 1):
            if line.strip():
                try:
                    found.append((f"{path}:{number}", untrusted.loads(line)))
                except ValueError as error:
                    raise ConfigError(f"{path}:{number} is not JSON ({error})") from None
    for place, value in found:
        if not isinstance(value, dict):
            raise ConfigError(f"{place}: each entry needs an object, this one is {type(value).__name__}")
    return [value for _, value in found]


def column(record, name: str, place, kind: type):
    """A column of a record."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{place}: an entry lacks the column {name!r} ({kind.__name__})")
    if kind is str and not is_text(value):
        raise ConfigError(f"{place}: column {name!r} is no text: it holds half of a surrogate pair")
    return value


def _list(value, path):
    if not isinstance(value, list):
        raise ConfigError(f"{path} needs an array of objects, this is {type(value).__name__}")
    return value
