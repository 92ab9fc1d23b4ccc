"""Documents of a source, as (name, raw bytes), split into train, validation and test.

A source is "sotu" (embedded), a .txt file (one document), a .jsonl file (one document a line, its "text" field) or a
folder of them (recursive, sorted). A document's name decides its part (`corpus.split_of`): the file's path below the
source, with ":line" for jsonl. Where that leaves no text to train on (a single .txt, say), all of it is for training;
where it leaves none to validate on, the last 5 % of the training text is held out. The test part may be empty.
"""
import difflib
import json
import pathlib

from mmx.config import ConfigError
from mmx.data import corpus

KINDS = (".txt", ".jsonl")


def documents(source: str, split: str) -> list[tuple[str, bytes]]:
    """(name, raw bytes) of the "train", "validation" or "test" part of one source."""
    return corpus.documents(split) if source == "sotu" else _split(_read(source), source)[split]


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


def _texts(file: pathlib.Path, name: str) -> list[tuple[str, bytes]]:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.sources: cannot read {file}: {error.strerror}") from None
    if file.suffix == ".txt":
        return [(name, raw)]
    lines = enumerate(raw.split(b"\n"), 1)
    return [(f"{name}:{n}", _text_field(line, f"{file}:{n}")) for n, line in lines if line.strip()]


def _text_field(line: bytes, place: str) -> bytes:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON ({error}); each line needs an object with a \"text\" string") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ConfigError(f"{place}: no \"text\" string in this line; each line needs an object with one")
    return value["text"].encode("utf-8", "surrogatepass")


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
    keep = sum(len(raw) for _, raw in texts) * 19 // 20
    train, validation = [], []
    for name, raw in texts:
        cut = min(keep, len(raw))
        while 0 < cut < len(raw) and raw[cut] & 0xC0 == 0x80:
            cut -= 1
        keep = max(keep - len(raw), 0)
        train += [(name, raw[:cut])] if cut else []
        validation += [(name, raw[cut:])] if cut < len(raw) else []
    return train, validation


def _nearest(path: pathlib.Path) -> str:
    around = path.parent.iterdir() if path.parent.is_dir() else ()
    known = ["sotu"] + sorted(p.name for p in around if p.suffix in KINDS or p.is_dir())
    close = difflib.get_close_matches(path.name, known, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else "; name 'sotu', a .txt, a .jsonl or a folder of them"
