"""Documents of a source, as (name, content), split into train, validation and test.

A source is "sotu" (embedded), "scenes", "maps" or "words" (pictures with questions, of `mmx.data.scenes`), a task with its
numbers (`data.generated`: `Ids`), a .txt file (one document), a .jsonl file (one document a line) or a folder of them
(recursive, sorted). A line has a "text" (content: raw bytes); a "prompt" and a "completion", of which the completion alone is
learned (`Prompted`); or "tokens", ids as they are, and "targets", the id to learn at each, -1 for none (`Ids`). Beside a text,
or a prompt and a completion, "images" are paths of image files below the line's own file's folder, one for each "<image>" in
them (`Pictured`).

A document's name decides its part (`corpus.split_of`): the file's path below the source, with ":line" for jsonl. Where that
leaves no text to train on (a single .txt, say), all of it is for training; where it leaves none to validate on, the last 5 %
of the training text is held out. The test part may be empty.
"""
import difflib
import pathlib
import sys

import numpy as np

from mmx.config import ConfigError
from mmx.data import corpus, generated, images, scenes
from mmx.data.records import Ids, Pictured, Prompted
from mmx.files import untrusted

KINDS = (".txt", ".jsonl")
GENERATED = ("scenes", "maps", "words")


def documents(source: str, split: str) -> list[tuple]:
    """(name, content) of the "train", "validation" or "test" part of one source."""
    if source == "sotu":
        return corpus.documents(split)
    if generated.names(source):
        return [(name, Ids(*content)) for name, content in generated.documents(source, split)]
    if source in GENERATED:
        return scenes.documents(source, split)
    return _split(_read(source), source)[split]


def place(source: str) -> pathlib.Path:
    """The file or folder of a source that is not embedded; raises ConfigError where there is none."""
    path = pathlib.Path(source)
    if not path.exists():
        raise ConfigError(f"data.sources: no file or folder {source!r}{_nearest(path)}")
    return path


def _read(source: str) -> list[tuple[str, bytes]]:
    path = place(source)
    if path.is_dir():
        base, files = path, sorted(p for p in path.rglob("*") if p.suffix in KINDS and p.is_file())
    else:
        base, files = path.parent, [path]
    if path.suffix not in KINDS and not path.is_dir():
        raise ConfigError(f"data.sources: {source!r} is neither a .txt, nor a .jsonl, nor a folder of them")
    if not files:
        raise ConfigError(f"data.sources: folder {source!r} holds no .txt and no .jsonl file")
    texts = [text for file in files for text in _texts(file, file.relative_to(base).as_posix()) if text[1]]
    if not texts:
        raise ConfigError(f"data.sources: {source!r} is empty: no text in {len(files)} file{'s' * (len(files) > 1)}")
    return texts


def _texts(file: pathlib.Path, name: str) -> list[tuple]:
    try:
        with untrusted.open_file(file, sys.maxsize) as text:
            raw = text.read()
    except ConfigError as error:
        raise ConfigError(f"data.sources: {error}") from None
    if file.suffix == ".txt":
        return [(name, raw)]
    lines = enumerate(raw.split(b"\n"), 1)
    return [(f"{name}:{n}", _content(line, f"{file}:{n}", file.parent)) for n, line in lines if line.strip()]


def _content(line: bytes, place: str, folder: pathlib.Path) -> bytes | Prompted | Pictured | Ids:
    try:
        value = untrusted.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON ({error}); each line needs an object with a \"text\" string") from None
    value = value if isinstance(value, dict) else {}
    if "tokens" in value and "text" not in value:       # beside a text, what else stands there is about it
        return _ids(value, place)
    names = ("prompt", "completion") if "prompt" in value and "text" not in value else ("text",)
    for name in names:
        if not isinstance(value.get(name), str):
            raise ConfigError(f"{place}: no \"{name}\" string in this line; each line needs an object with a text, or with a "
                              "prompt and a completion, or with tokens and targets")
    text, *completion = (value[name].encode("utf-8", "surrogatepass") for name in names)
    if value.get("images"):
        return _pictured(*([text, *completion] if completion else [b"", text]), value["images"], place, folder)
    return Prompted(text, *completion) if completion else text


def _pictured(prompt: bytes, completion: bytes, names, place: str, folder: pathlib.Path) -> Pictured:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{place}: images are a list of paths of image files, got {names!r}")
    marks = (prompt + completion).count(images.MARK.encode())
    if marks != len(names):
        raise ConfigError(f"{place}: {images.unlike(marks, len(names))}")
    for name in names:
        if not (folder / name).is_file() or not untrusted.is_inside(folder / name, folder):
            raise ConfigError(f"{place}: no image file {str(folder / name)!r}; paths are below the line's file's folder")
    return Pictured(prompt, completion, tuple(str(folder / name) for name in names))


def _ids(value: dict, place: str) -> Ids:
    ids, targets = value["tokens"], value.get("targets")
    lists = isinstance(ids, list) and isinstance(targets, list) and len(ids) == len(targets) > 0
    for least, numbers in ((0, ids), (-1, targets)):
        if not lists or not all(type(n) is int and least <= n < 2**31 for n in numbers):
            raise ConfigError(f"{place}: tokens are ids, at least one, targets as many ids, -1 where nothing is to be learned")
    return Ids(np.array(ids, np.int32), np.array(targets, np.int32))


def _split(texts: list, source: str) -> dict[str, list]:
    parts = {"train": [], "validation": [], "test": []}
    for name, raw in texts:
        parts[corpus.split_of(name)].append((name, raw))
    if not parts["train"]:
        parts = {"train": texts, "validation": [], "test": []}
    if not parts["validation"]:
        parts["train"], parts["validation"] = _hold_out(parts["train"])
    if not parts["train"]:
        raise ConfigError(f"data.sources: {source!r} holds too little text to train on and hold some out")
    return parts


def _hold_out(texts: list) -> tuple[list, list]:
    """All but the last twentieth of the text, and that twentieth, cut where a character begins."""
    keep = sum(_size(raw) for _, raw in texts) * 19 // 20
    train, validation = [], []
    for name, raw in texts:
        if not isinstance(raw, bytes):      # is not cut: all of it is held out if its end is
            (train if _size(raw) <= keep else validation).append((name, raw))
            keep = max(keep - _size(raw), 0)
            continue
        cut = min(keep, len(raw))
        while 0 < cut < len(raw) and raw[cut] & 0xC0 == 0x80:
            cut -= 1
        keep = max(keep - len(raw), 0)
        train += [(name, raw[:cut])] if cut else []
        validation += [(name, raw[cut:])] if cut < len(raw) else []
    return train, validation


def _size(content) -> int:
    if isinstance(content, bytes):
        return len(content)
    return sum(map(len, content[:2]))


def _nearest(path: pathlib.Path) -> str:
    around = path.parent.iterdir() if path.parent.is_dir() else ()
    known = ["sotu", *GENERATED, *generated.NUMBERS] + sorted(p.name for p in around if p.suffix in KINDS or p.is_dir())
    close = difflib.get_close_matches(path.name, known, 1, 0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return "; name 'sotu', 'scenes', 'maps', 'words', a task as 'mqar:pairs=16', a .txt, a .jsonl or a folder of them"
