"""Reads text files and JSON lines. All readers of text use these functions, so a file is the same text for all of them."""
import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mmx.config import ConfigError
from mmx.files import untrusted

COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MAX_RATIO = 100             # a compressed file may have this many times its size as text, or untrusted.TEXT_BYTES
CHUNK = 1 << 20             # bytes decompressed at a time
# UTF-32 comes first: its mark starts with UTF-16's
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}


class JsonLine(NamedTuple):
    """A line of a file of JSON lines that is not blank."""
    number: int         # the first line of the file is 1
    raw: bytes          # with its line end
    end: int            # bytes of the file up to and including this line
    value: object       # None if the line is not JSON
    problem: str        # why the line is not JSON; empty if it is


def suffix(path: str | Path) -> str:
    """The suffix of a text file in lower case, without the suffix of its compression: ".jsonl" for "A.JSONL.gz"."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def read_bytes(path: str | Path, most: int = untrusted.TEXT_BYTES) -> bytes:
    """The text of a regular file of at most `most` bytes, as `normalize` returns it. Bytes that are not UTF-8 stay as they are.

    Decompresses files with a suffix of COMPRESSIONS. Raises ConfigError.
    """
    path = Path(path)
    with untrusted.open_file(path, most) as file:
        compression = COMPRESSIONS.get(path.suffix.lower())
        raw = _decompress(compression, file, path, most) if compression else file.read()
    try:
        return normalize(raw)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not {error.encoding.upper()} at byte {error.start}, which its byte order mark "
                          "announces") from None


def read(path: str | Path, most: int = untrusted.TEXT_BYTES) -> str:
    """The text of a UTF-8 file, read by `read_bytes`. Raises ConfigError."""
    return decode(read_bytes(path, most), path)


def decode(raw: bytes, name: str | Path) -> str:
    """UTF-8 bytes as text, as `normalize` returns it. Raises ConfigError, which names `name`."""
    try:
        return normalize(raw).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not {error.encoding.upper()} at byte {error.start}") from None


def normalize(raw: bytes) -> bytes:
    r"""UTF-8 text without a byte order mark, in which all line ends (\r\n, \r) are \n.

    UTF-16 and UTF-32 are recognized by their byte order mark. Raises UnicodeDecodeError if such a text is damaged.
    """
    encoding = next((encoding for mark, encoding in MARKS.items() if raw.startswith(mark)), None)
    raw = raw.decode(encoding).encode() if encoding else raw.removeprefix(codecs.BOM_UTF8)
    return raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in raw else raw


def json_lines(file: bytes | BinaryIO) -> Iterator[JsonLine]:
    r"""The lines of a file of JSON lines, one at a time, without blank ones. The caller decides what a damaged line means.

    Only \n ends a line: U+2028, U+0085 and other separators of str.splitlines are characters of JSON texts.
    """
    end = 0
    for number, raw in enumerate(io.BytesIO(file) if isinstance(file, bytes) else file, 1):
        end += len(raw)
        if raw.strip():
            value, problem = None, ""
            try:
                value = untrusted.loads(raw)
            except ValueError as error:
                problem = str(error)
            yield JsonLine(number, raw, end, value, problem)


def read_json_lines(path: str | Path, most: int = untrusted.TEXT_BYTES) -> list[tuple[str, object]]:
    """("PATH:LINE", value) of each line of a file of JSON lines. Raises ConfigError if a line is not JSON."""
    found = []
    for line in json_lines(read_bytes(path, most)):
        if line.problem:
            raise ConfigError(f"{path}:{line.number} is not JSON ({line.problem}): each line must be one JSON value")
        found.append((f"{path}:{line.number}", line.value))
    return found


def _decompress(opener, file: BinaryIO, path: Path, most: int) -> bytes:
    """The decompressed bytes of a file. Raises ConfigError if it is damaged, or decompresses to far more than a text does."""
    limit = min(most, max(untrusted.TEXT_BYTES, MAX_RATIO * file.seek(0, io.SEEK_END)))
    file.seek(0)
    chunks, size = [], 0
    try:
        with opener(file) as text:
            while size <= limit and (chunk := text.read(CHUNK)):
                chunks.append(chunk)
                size += len(chunk)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise ConfigError(f"{path} cannot be decompressed: {error}") from None
    if size > limit:
        raise ConfigError(f"{path} has more than {limit:,} bytes when decompressed, more than allowed: decompress it to a file")
    return b"".join(chunks)
