"""Reads the documents of one file: text, JSON lines or Parquet.

A line of JSON lines, or a row of Parquet, has one of
  - a text, in the column "text" (or another name of TEXT);
  - a prompt and its completion: the loss covers the completion only (`PromptCompletion`);
  - "tokens" and "targets": token ids, and the target of each, -1 for none (`TokenIds`).
The first two may have "images", a list of paths of image files, one for each "<image>" in the texts. The image files must be
inside the folder of the file (`ImageText`). The content of a text is its bytes. A .txt file is read without its byte
order mark, and its line ends become one newline character (`texts.normalize`).

A document's name is the path of its file inside the source, without the suffix of a compression. For JSON lines it continues
with ":LINE". A row of Parquet has the name that it would have as a line of JSON lines, so the same documents have the same
names in all formats.
"""
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx.config import ConfigError
from mmx.data import images
from mmx.data.document_types import ImageText, PromptCompletion, TokenIds
from mmx.files import texts, untrusted, urls

SUFFIXES = (".txt", ".jsonl", ".parquet")
KINDS = ".txt and .jsonl, also compressed as " + ", ".join(texts.COMPRESSIONS) + ", and .parquet"

# names of columns, the first that a document has counts
TEXT = "text", "content", "raw_content", "document"
PROMPT = "prompt", "instruction", "question"
COMPLETION = "completion", "response", "answer", "output"
ROWS_AT_A_TIME = 1024


class Columns(NamedTuple):
    """The names that the columns of a text, a prompt and a completion may have."""
    text: tuple = TEXT
    prompt: tuple = PROMPT
    completion: tuple = COMPLETION


class Range(NamedTuple):
    """A part of a file: bytes of JSON lines, or rows of Parquet."""
    begin: int = 0
    end: int | None = None      # None: to the end of the file
    first: int = 1              # the number of the first line or row


ANY_COLUMNS, WHOLE_FILE = Columns(), Range()


def kind(path: Path) -> str:
    """The suffix of a file that is read, in lower case and without the suffix of a compression; "" for other files."""
    suffix = texts.suffix(path)
    compressed = path.suffix.lower() in texts.COMPRESSIONS
    return suffix if suffix in SUFFIXES and not (compressed and suffix == ".parquet") else ""


def parse_columns(text: str) -> Columns:
    """The columns of data.columns, as "text=body" or "prompt=question,completion=answer"; "": found by their names."""
    given = {}
    for pair in filter(None, text.split(",")):
        key, _, name = pair.partition("=")
        if key not in Columns._fields or not name:
            raise ConfigError(f"data.columns={text!r}: {pair!r} must be text=NAME, prompt=NAME or completion=NAME")
        given[key] = (name,)
    if ("prompt" in given) != ("completion" in given) or ("text" in given and "prompt" in given):
        raise ConfigError(f"data.columns={text!r} must name a text, or a prompt and a completion")
    if given:
        return Columns(given.get("text", ()), given.get("prompt", ()), given.get("completion", ()))
    return Columns()


def document_name(name: str) -> str:
    """The name of a file's documents, from the path of the file inside its source."""
    path = Path(name)
    if path.suffix.lower() in texts.COMPRESSIONS:
        path = path.with_suffix("")
    return (path.with_suffix(".jsonl") if path.suffix.lower() == ".parquet" else path).as_posix()


def read(file: Path, name: str, columns: Columns = ANY_COLUMNS, part: Range = WHOLE_FILE) -> Iterator[tuple]:
    """Yields (name, content) of the documents of a file that are not empty. Raises ConfigError.

    Args:
      name: the path of the file inside its source.
      part: reads only this part of the file.
    """
    prefix = document_name(name)
    try:
        if kind(file) == ".txt":
            found = [(prefix, texts.read_bytes(file, sys.maxsize))]
        else:
            rows = _parquet_rows(file, part) if kind(file) == ".parquet" else texts.iterate_json_lines(file, sys.maxsize, *part)
            found = ((f"{prefix}:{number}", _content(value, f"{file}:{number}", file.parent, columns))
                     for number, value in rows)
        yield from (document for document in found if document[1])
    except ConfigError as error:
        raise ConfigError(f"data.sources: {error}" if not str(error).startswith("data.") else str(error)) from None


def row_groups(file: Path) -> list[int]:
    """The number of rows in each group of a Parquet file."""
    with _open_parquet(file) as table:
        return [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]


def _parquet_rows(file: Path, part: Range) -> Iterator[tuple[int, dict]]:
    with _open_parquet(file) as table:
        groups, number = range(table.num_row_groups)[part.begin:part.end], part.first
        for batch in table.iter_batches(ROWS_AT_A_TIME, row_groups=list(groups)):
            for row in batch.to_pylist():
                yield number, {name: value for name, value in row.items() if value is not None}
                number += 1


@contextlib.contextmanager
def _open_parquet(file: Path):
    import pyarrow
    from pyarrow import parquet

    try:
        with untrusted.open_file(file, sys.maxsize) as opened, parquet.ParquetFile(opened) as table:
            yield table
    except ConfigError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{file} is not a Parquet file, or is damaged ({' '.join(str(error).split())[:200]})") from None


def _content(value, where: str, folder: Path, columns: Columns) -> bytes | PromptCompletion | ImageText | TokenIds:
    value = value if isinstance(value, dict) else {}
    text = next((name for name in columns.text if name in value), None)
    if "tokens" in value and text is None:              # with a text, other keys are metadata
        return _token_ids(value, where)
    prompt = next((name for name in columns.prompt if name in value), None)
    completion = next((name for name in columns.completion if name in value), None)
    if text is None and prompt and completion:
        names = prompt, completion
    else:
        names = (text or (columns.text or columns.prompt)[0],) if not prompt or text else (prompt, columns.completion[0])
    for name in names:
        if not isinstance(value.get(name), str):
            raise ConfigError(f"{where}: no \"{name}\" string in this line; each line must be an object with a text, with a "
                              "prompt and a completion, or with tokens and targets" + _found(value))
    first, *second = (value[name].encode("utf-8", "surrogatepass") for name in names)
    if value.get("images"):
        return _image_text(*([first, *second] if second else [b"", first]), value["images"], where, folder)
    return PromptCompletion(first, *second) if second else first


def _found(value: dict) -> str:
    names = [name for name in value if isinstance(name, str)]
    return f"; its columns are {', '.join(names[:8])}, which data.columns can name" if names else ""


def _image_text(prompt: bytes, completion: bytes, names, where: str, folder: Path) -> ImageText:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: \"images\" must be a list of paths of image files, got {names!r}")
    placeholders = (prompt + completion).count(images.PLACEHOLDER.encode())
    if placeholders != len(names):
        raise ConfigError(f"{where}: {images.mismatch_message(placeholders, len(names))}")
    urls.refuse(folder, f"{where} has images, which cannot be in")
    for name in names:
        if not (folder / name).is_file() or not untrusted.is_inside(folder / name, folder):
            raise ConfigError(f"{where}: no image file {str(folder / name)!r} inside the folder of the .jsonl file")
    return ImageText(prompt, completion, tuple(str(folder / name) for name in names))


def _token_ids(value: dict, where: str) -> TokenIds:
    ids, targets = value["tokens"], value.get("targets")
    same_length = isinstance(ids, list) and isinstance(targets, list) and len(ids) == len(targets) > 0
    for least, numbers in ((0, ids), (-1, targets)):
        if not same_length or not all(type(n) is int and least <= n < 2**31 for n in numbers):
            raise ConfigError(f"{where}: \"tokens\" must be a list of at least one id, and \"targets\" a list of the same "
                              "length, with ids or -1 (no target)")
    return TokenIds(np.array(ids, np.int32), np.array(targets, np.int32))
