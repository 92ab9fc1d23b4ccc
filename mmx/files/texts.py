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

import zstandard

from mmx.config import ConfigError
from mmx.files import untrusted, urls

COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": lambda file: _Zstandard(file)}
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
    path = urls.as_path(path)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def read_bytes(path: str | Path, most: int = untrusted.TEXT_BYTES) -> bytes:
    """The text of a regular file of at most `most` bytes, as `normalize` returns it. Bytes that are not UTF-8 stay as they are.

    Decompresses files with a suffix of COMPRESSIONS. Raises ConfigError.
    """
    path = urls.as_path(path)
    with untrusted.open_file(path, most) as file:
        raw = b"".join(_chunks(file, path, most))
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
    return [(f"{path}:{number}", value) for number, value in iterate_json_lines(path, most)]


def iterate_json_lines(path: str | Path, most: int = untrusted.TEXT_BYTES, begin: int = 0, end: int | None = None,
                       first: int = 1) -> Iterator[tuple[int, object]]:
    """Yields (number, value) of each line of a file of JSON lines that is not blank. The arguments are as for `read_lines`."""
    for number, raw in read_lines(path, most, begin, end, first):
        if raw.strip():
            try:
                yield number, untrusted.loads(raw)
            except ValueError as error:
                raise ConfigError(f"{path}:{number} is not JSON ({error}): each line must be one JSON value") from None


def read_lines(path: str | Path, most: int = untrusted.TEXT_BYTES, begin: int = 0, end: int | None = None,
               first: int = 1) -> Iterator[tuple[int, bytes]]:
    """Yields (number, line) of the lines of a regular file of at most `most` bytes, without their ends.

    The text is the same as from `read_bytes`, but a part of the file is read at a time.

    Args:
      begin, end: reads only the lines of this range of bytes; a file that is compressed or not UTF-8 has no ranges.
      first: the number of the first line.
    """
    path = urls.as_path(path)
    with untrusted.open_file(path, most) as file:
        if begin:
            file.seek(begin)
        yield from enumerate(_lines(_normalized(_chunks(file, path, most, end), path, begin)), first)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > untrusted.TEXT_BYTES:
            raise ConfigError(f"a line has more than {untrusted.TEXT_BYTES:,} bytes")
    if rest:
        yield rest


def _normalized(chunks: Iterator[bytes], path: Path, begin: int = 0) -> Iterator[bytes]:
    """`normalize` of a text that is read in chunks."""
    decoder, held = None, b""
    try:
        for number, chunk in enumerate(chunks):
            if not number and not begin:
                if encoding := next((encoding for mark, encoding in MARKS.items() if chunk.startswith(mark)), None):
                    decoder = codecs.getincrementaldecoder(encoding)()
                chunk = chunk.removeprefix(codecs.BOM_UTF8)
            if decoder:
                chunk = decoder.decode(chunk).encode()
            chunk = held + chunk
            held = chunk[-1:] if chunk.endswith(b"\r") else b""      # the next chunk may start with \n
            yield normalize(chunk.removesuffix(held) if held else chunk) if b"\r" in chunk else chunk
        if decoder:
            decoder.decode(b"", True)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not {error.encoding.upper()}, which its byte order mark announces") from None
    yield held and b"\n"


def _chunks(file: BinaryIO, path: Path, most: int, end: int | None = None) -> Iterator[bytes]:
    """The contents of an open file up to byte `end`, decompressed if its name has a suffix of COMPRESSIONS."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression:
        yield from _decompressed(compression, file, path, most)
        return
    while chunk := file.read(CHUNK if end is None else min(CHUNK, end - file.tell())):
        yield chunk


def _decompressed(opener, file: BinaryIO, path: Path, most: int) -> Iterator[bytes]:
    """The decompressed contents. Raises ConfigError if they are damaged, or far larger than a compressed text can be."""
    size, _ = urls.version(path)
    limit = min(most, max(untrusted.TEXT_BYTES, MAX_RATIO * size)) if size else most
    size = 0
    try:
        with opener(file) as text:
            while chunk := text.read(CHUNK):
                size += len(chunk)
                if size > limit:
                    raise ConfigError(f"{path} has more than {limit:,} bytes when decompressed, more than allowed: decompress "
                                      "it to a file")
                yield chunk
    except ConfigError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, ValueError) as error:
        raise ConfigError(f"{path} cannot be decompressed: {error}") from None


class _Zstandard:
    """A zstd file, open for reading. zstandard's own reader takes a file that was cut off for a complete one."""

    def __init__(self, file: BinaryIO):
        self._file, self._frame = file, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def read(self, size: int) -> bytes:
        while True:
            # 4 KiB can become 128 MiB
            raw = self._frame.unused_data if self._frame and self._frame.eof else b""
            raw = raw or self._file.read(4096)
            if self._frame is None or self._frame.eof:
                if not raw:
                    return b""
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            if not raw:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if found := self._frame.decompress(raw):
                return found
