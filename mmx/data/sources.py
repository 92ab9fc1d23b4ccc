"""Reads the documents of a data source, as (name, content), split into train, validation and test.

A source is one of
  - "sotu": the embedded corpus;
  - "scenes", "maps" or "words": generated images with questions (`data.scenes`);
  - a synthetic task with its parameters, such as "mqar:pairs=16" (`data.token_tasks`);
  - a .txt file (one document), a .jsonl file (a document for each line), a .parquet file (a document for each row), or a folder
    of them (searched recursively, sorted). `formats` reads them. Names may have capitals; .gz, .bz2, .xz and .zst are
    decompressed. Hidden files and folders (.NAME) are skipped. One line on stderr lists the files of a folder that are not
    read, and why.

A document's name decides its split (`corpus.split_of`). If this puts no document into the training split, all documents are for
training. If it puts none into the validation split, the last 5 % of the training text is held out. The test split may be empty.
"""
import collections
import difflib
import os
import pathlib
from typing import NamedTuple

from mmx.config import ConfigError
from mmx.data import corpus, formats, scenes, token_tasks
from mmx.data.document_types import ImageText, TokenIds
from mmx.files import notes, texts, urls

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
    path = urls.as_path(source)
    with urls.one_line_errors(source):
        exists = path.exists()
    if not exists:
        raise ConfigError(f"data.sources: no file or folder {source!r}{_suggestion(path)}")
    return path


class Files(NamedTuple):
    """The files of a source."""
    base: pathlib.Path              # their folder
    paths: list[pathlib.Path]       # sorted
    skipped: dict[str, str]         # other files of the folder, and why they are not read

    def name(self, path: pathlib.Path) -> str:
        """A file's path inside the source."""
        return path.relative_to(self.base).as_posix()


def list_files(source: str) -> Files:
    """The files of a source that is not built in. Raises ConfigError if there is none."""
    if source == "sotu":
        path = pathlib.Path(str(corpus.archive()))
        return Files(path.parent, [path], {})
    path = find_path(source)
    with urls.one_line_errors(source):
        is_folder = path.is_dir()
    if not is_folder:
        if not formats.kind(path):
            raise ConfigError(f"data.sources: {source!r} must be a .txt, .jsonl or .parquet file, or a folder of them")
        return Files(path.parent, [path], {})
    with urls.one_line_errors(source):
        files = Files(path, *_list_folder(path))
    if not files.paths:
        raise ConfigError(f"data.sources: folder {source!r} contains no .txt, .jsonl or .parquet file"
                          f"{_skipped_text(files.skipped)}")
    names = collections.Counter(formats.document_name(files.name(path)) for path in files.paths)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"data.sources: folder {source!r} has {twice[0]} in two formats, whose documents would have the same "
                          "names: remove one of the files")
    return files


def note_skipped(source: str, files: Files, images) -> None:
    """Prints a line that lists the files of a folder that are not read, but for the image files that its documents name."""
    used = {os.path.normpath(image) for image in images}
    if unread := {name: why for name, why in files.skipped.items() if os.path.normpath(files.base / name) not in used}:
        notes.note(f"data.sources: folder {source!r}{_skipped_text(unread)}")


def _read(source: str) -> list[tuple]:
    files = list_files(source)
    documents = [document for path in files.paths for document in formats.read(path, files.name(path))]
    if not documents:
        raise ConfigError(f"data.sources: {source!r} contains no text in its {len(files.paths)} "
                          f"file{'s' * (len(files.paths) > 1)}")
    contents = [content for _, content in documents]
    note_skipped(source, files, [image for content in contents if isinstance(content, ImageText) for image in content.images])
    return documents


def _list_folder(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """The text files of a folder, sorted, and the names of other files with the reason why they are not read."""
    files, skipped = [], {}
    for path in sorted(folder.rglob("*"), key=lambda path: path.parts):
        name = path.relative_to(folder)
        readable, hidden = formats.kind(path), any(part.startswith(".") for part in name.parts)
        if path.is_dir():
            if path.is_symlink() and not hidden:
                skipped[name.as_posix()] = "a link to a folder"
        elif hidden:
            if readable:
                skipped[name.as_posix()] = "hidden"
        elif not readable:
            skipped[name.as_posix()] = f"not of a kind that is read: {formats.KINDS}"
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
    keep = sum(size(raw) for _, raw in documents) * 19 // 20
    train, validation = [], []
    for name, raw in documents:
        if not isinstance(raw, bytes):      # cannot be divided: the whole document is held out if its end is
            (train if size(raw) <= keep else validation).append((name, raw))
            keep = max(keep - size(raw), 0)
            continue
        kept, rest = cut(raw, keep)
        keep = max(keep - len(raw), 0)
        train += [(name, kept)] if kept else []
        validation += [(name, rest)] if rest else []
    return train, validation


def cut(raw: bytes, keep: int) -> tuple[bytes, bytes]:
    """The first `keep` bytes of a text, without a part of a UTF-8 character at their end, and the rest."""
    end = min(keep, len(raw))
    while 0 < end < len(raw) and raw[end] & 0xC0 == 0x80:       # inside a UTF-8 character
        end -= 1
    return raw[:end], raw[end:]


def size(content) -> int:
    """The bytes of a document's texts, or the number of its token ids and targets."""
    if isinstance(content, bytes):
        return len(content)
    return sum(map(len, content[:2]))


def _suggestion(path: pathlib.Path) -> str:
    siblings = path.parent.iterdir() if not urls.is_url(path) and path.parent.is_dir() else ()
    known = ["sotu", *GENERATED, *token_tasks.NUMBERS]
    known += sorted(p.name for p in siblings if formats.kind(p) or p.is_dir())
    close = difflib.get_close_matches(path.name, known, 1, 0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return ("; a source is 'sotu', 'scenes', 'maps', 'words', a task as 'mqar:pairs=16', a .txt, .jsonl or .parquet file, or a "
            "folder of them")
