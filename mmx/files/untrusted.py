"""Files of others, read within limits: none takes the memory, the time or the stack of its reader (SECURITY.md has the table).

    opened      a plain file that is not too large; content, its bytes, and text, its UTF-8
    loads       the value of a JSON text that is neither too deep nor too full
    check_plain that a folder holds no links, pipes and devices
    inside      whether a path, links followed, stays in its folder
"""
import contextlib
import io
import json
import os
import re
import stat
from pathlib import Path

from mmx.config import ConfigError

JSON_BYTES = 16 << 20       # of a header, an index or a config: 100,000 tensors' names and shapes
TOKENIZER_BYTES = 64 << 20
TEXT_BYTES = 1 << 30        # of a prompt, or of a data set in one text
VALUES = 8_000_000          # of one JSON text: below 600 MB of Python's objects
DEPTH = 64
MESSAGE_LENGTH = 2000                 # characters of a message
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@contextlib.contextmanager
def open_file(path: str | Path, most: int = JSON_BYTES):
    """A plain file of at most `most` bytes, to read: no pipe and no device, which may have no end. Raises ConfigError."""
    try:
        file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (OSError, ValueError) as error:      # ValueError: a NUL
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    with file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ConfigError(f"{path} is no file")
        if about.st_size > most:
            raise ConfigError(f"{path} has {about.st_size:,} bytes, more than {most:,}: it is not read")
        yield file


def read_bytes(path: str | Path, most: int = JSON_BYTES) -> bytes:
    """The bytes of a plain file of at most `most`."""
    with open_file(path, most) as file:
        return file.read(most + 1)[:most]


def read_text(path: str | Path, most: int = TEXT_BYTES) -> str:
    """The text of a plain file of at most `most` bytes, with the line ends that Python reads. Raises ConfigError."""
    try:
        return io.StringIO(read_bytes(path, most).decode("utf-8"), newline=None).read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None


def loads(text: bytes | str):
    """The value of a JSON text, UTF-8 where it is bytes.

    Raises ValueError, in a few words, for what is no JSON, names a key of an object twice, or has more than DEPTH levels
    or VALUES values.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    if _separators(text) > VALUES and _separators(_STRINGS.sub("", text)) > VALUES:
        raise ValueError(f"more than {VALUES:,} values")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    if text.count("[") + text.count("{") > DEPTH and _deep(value):
        raise ValueError(f"nested deeper than {DEPTH} levels")
    return value


def read_json(path: Path) -> dict:
    """The object in a JSON file, within this module's limits."""
    try:
        value = loads(read_bytes(path))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _separators(text: str) -> int:
    return text.count(",") + text.count("[") + text.count("{")


def _unique(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _deep(value) -> bool:
    level = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level if isinstance(outer, (list, dict))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return any(isinstance(outer, (list, dict)) for outer in level)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads into its folder, or into the blobs of the Hugging Face cache that the folder is a snapshot of."""
    try:
        place, folder = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):     # a loop of links, a NUL
        return False
    return place.is_relative_to(folder) or (folder.parent.name == "snapshots"
                                            and place.parent == folder.parent.parent / "blobs")


def check_link(path: Path) -> Path:
    """A file of a checkpoint; raises ConfigError for a link out of its directory."""
    if not is_inside(path, path.parent):
        raise ConfigError(f"{path} is a link that leads out of its directory: put the file itself there")
    return path


def check_plain(folder: Path) -> None:
    """Raises ConfigError unless all in a folder are plain files and folders: no links, and nothing to wait for."""
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(above, name)
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ConfigError(f"{path} is neither a file nor a folder: a checkpoint holds no links")


def one_line(message: str) -> str:
    """A message as one line of at most MESSAGE_LENGTH characters, none of which moves a terminal's cursor."""
    text = " ".join(message.split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:MESSAGE_LENGTH + 1])
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}..."
