"""Reads untrusted files within limits of memory, time and nesting. SECURITY.md lists the limits of each reader."""
import contextlib
import json
import os
import re
import stat
from pathlib import Path

from mmx.config import ConfigError
from mmx.files import urls

JSON_BYTES = 16 << 20       # of a header, an index or a config: enough for names and shapes of 100,000 tensors
TOKENIZER_BYTES = 64 << 20
TEXT_BYTES = 1 << 30        # of a prompt, or of a data set in one text file
VALUES = 8_000_000          # in one JSON text: less than 600 MB as Python objects
DEPTH = 64                  # levels of a JSON text
MESSAGE_LENGTH = 2000       # characters of an error message
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@contextlib.contextmanager
def open_file(path: str | Path, most: int = JSON_BYTES):
    """Opens a regular file of at most `most` bytes for reading.

    Raises ConfigError for a larger file, and for pipes and devices, which may never end. The file of a URL has any size.
    """
    if urls.is_url(path):
        with urls.one_line_errors(path), path.open("rb") as file:
            yield file
        return
    try:
        file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (OSError, ValueError) as error:      # ValueError: the path contains a NUL character
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} is not a regular file")
        if status.st_size > most:
            raise ConfigError(f"{path} has {status.st_size:,} bytes; at most {most:,} are allowed")
        yield file


def read_bytes(path: str | Path, most: int = JSON_BYTES) -> bytes:
    """The contents of a regular file of at most `most` bytes. Raises ConfigError."""
    with open_file(path, most) as file:
        return file.read(most + 1)[:most]


def loads(text: bytes | str):
    """Parses JSON; bytes are decoded as UTF-8.

    Raises ValueError with a short message if the text is not JSON, if an object has a key twice, or if there are more than
    DEPTH levels or VALUES values.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    if _count_separators(text) > VALUES and _count_separators(_STRINGS.sub("", text)) > VALUES:
        raise ValueError(f"more than {VALUES:,} values")
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    if text.count("[") + text.count("{") > DEPTH and _is_too_deep(value):
        raise ValueError(f"nested deeper than {DEPTH} levels")
    return value


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ConfigError if it is not one or exceeds this module's limits."""
    try:
        value = loads(read_bytes(path))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must contain a JSON object, not {type(value).__name__}")
    return value


def _count_separators(text: str) -> int:
    return text.count(",") + text.count("[") + text.count("{")


def _unique_keys(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _is_too_deep(value) -> bool:
    level = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level if isinstance(outer, (list, dict))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return any(isinstance(outer, (list, dict)) for outer in level)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with its links resolved, is below `folder`.

    If the folder is a snapshot in the Hugging Face cache, links into that cache's blobs are accepted too.
    """
    try:
        resolved, folder = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):     # a loop of links, or a NUL character
        return False
    return resolved.is_relative_to(folder) or (folder.parent.name == "snapshots"
                                            and resolved.parent == folder.parent.parent / "blobs")


def check_link(path: Path) -> Path:
    """Returns `path`. Raises ConfigError if it is a link that leads out of its directory."""
    if not is_inside(path, path.parent):
        raise ConfigError(f"{path} is a link that leads out of its directory: replace it by the file itself")
    return path


def check_plain(folder: Path) -> None:
    """Raises ConfigError unless a folder contains only regular files and folders: no links, pipes or devices."""
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(above, name)
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ConfigError(f"{path} is neither a file nor a folder: links are not allowed in a checkpoint")


def one_line(message: str) -> str:
    """A message as one line of at most MESSAGE_LENGTH characters. Control characters are escaped."""
    text = " ".join(message.split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:MESSAGE_LENGTH + 1])
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}..."
