"""Writes one part of a token store (`layout`)."""
import gzip
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx.config import ConfigError
from mmx.data import corpus, encoding, packing, sources, tokens
from mmx.data.document_types import ImageText
from mmx.data.store import layout, reading
from mmx.data.store.layout import RECORD, SPLITS, Part
from mmx.files import atomic, json_text, notes


class Settings(NamedTuple):
    """How a store is made."""
    out: Path
    tokenizer: str
    images: encoding.ImageOptions = encoding.TEXT_ONLY
    columns: str = ""
    skip_bad: bool = False


def dtype(settings: Settings) -> np.dtype:
    """The smallest integer type of the token ids."""
    vision, vocab = settings.images.vision, tokens.tokenizer(settings.tokenizer).vocab
    return np.min_scalar_type(max(vocab, vision.layers and vision.token)).newbyteorder("<")


class Writer:
    """Writes one part. Its files have temporary names until it is complete."""

    def __init__(self, settings: Settings, name: str):
        self._settings, self._name, self._dtype = settings, name, dtype(settings)
        self._tokenizer = tokens.tokenizer(settings.tokenizer)
        self._records, self._held_out, self._digest, self._end = [], [], hashlib.sha256(), 0
        self._unread = ""
        self._folder = settings.out / "parts"

    def __enter__(self):
        self._paths = {suffix: atomic.temporary_path(self._folder / f"{self._name}.{suffix}")
                       for suffix in ("tokens", "targets", "images", "documents", "held_out.gz")}
        self._files = {suffix: path.open("w+b") for suffix, path in self._paths.items()}
        return self

    def __exit__(self, kind, *error):
        try:
            if kind is None:
                self._finish()
        finally:
            for suffix, file in self._files.items():
                file.close()
                self._paths[suffix].unlink(missing_ok=True)

    def checkpoint(self, path: str):
        """A context for the documents of one file. With skip_bad, an error in it removes them and is a note."""
        return _Undo(self, path) if self._settings.skip_bad else _NoUndo()

    def add(self, batch: list[tuple], splits: list[str] | None = None) -> None:
        """Adds (name, content) documents. `splits`: of each; None: by their names."""
        if not self._settings.images.vision.layers:
            batch, with_images = _divide(batch)
            self._unread = self._unread or (with_images[0][0] if with_images else "")
        encoded = encoding.encode_all(self._tokenizer, batch, self._settings.images)
        ids = []
        for n, ((name, content), found) in enumerate(zip(batch, encoded)):
            split = splits[n] if splits else corpus.split_of(name)
            self._digest.update(b"%s\0%d\0" % (name.encode("utf-8", "surrogateescape"), sources.size(content)))
            if isinstance(content, bytes):
                self._digest.update(content)
            ids.append(found.ids_T)
            self._end += len(found.ids_T)
            kind, masked = _kind(found)
            if kind == layout.TARGETS or self._files["targets"].tell():
                self._write_targets(found)
            targets = len(found.ids_T) - 1 if found.targets_T is None else int((found.targets_T >= 0).sum())
            self._records.append((self._end, sources.size(content), self._write_images(name, found.images), targets, masked,
                                  SPLITS.index(split), kind))
            if split != "train" and not isinstance(content, ImageText):
                self.hold_out(name, content, split)
        self._files["tokens"].write(np.concatenate(ids).astype(self._dtype) if ids else b"")

    def hold_out(self, name: str, content, split: str) -> None:
        """Adds the text of a held-out document."""
        self._held_out.append(json_text.dumps({"name": name, "split": split} | reading.content_to_json(content)) + "\n")

    def _write_targets(self, found: encoding.Encoded) -> None:
        file = self._files["targets"]
        missing = self._end - len(found.ids_T) - file.tell() // 4       # targets of earlier documents, which have no own ones
        file.write(np.full(missing, -1, "<i4"))
        file.write(packing.span_arrays(found.ids_T, found.targets_T, 0, len(found.ids_T))[1].astype("<i4"))

    def _write_images(self, name: str, found: packing.DocumentImages | None) -> int:
        if found is None:
            return -1
        position = self._files["images"].tell()
        self._files["images"].write((json_text.dumps({"name": name} | found._asdict()) + "\n").encode())
        return position

    def _finish(self) -> None:
        self._files["documents"].write(np.array(self._records, RECORD))
        if self._held_out:
            with gzip.GzipFile("", "wb", 6, self._files["held_out.gz"], 0) as file:
                file.writelines(line.encode() for line in self._held_out)
        sizes = {}
        for suffix, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            if sizes_of := file.seek(0, os.SEEK_END):
                sizes[suffix] = sizes_of
                self._paths[suffix].replace(self._folder / f"{self._name}.{suffix}")
        summary = Part(self._name, len(self._records), self._end, sizes, self._digest.hexdigest(), self._unread)
        with atomic.replacing(self._folder / f"{self._name}.json") as file:
            file.write(json_text.dumps(summary._asdict()))


class _Undo:
    """Removes what was added in its block if the block raises ConfigError, and prints the error as a note."""

    def __init__(self, writer: Writer, path: str):
        self._writer, self._path = writer, path

    def __enter__(self):
        w = self._writer
        self._before = len(w._records), len(w._held_out), w._digest.copy(), w._end, {s: f.tell() for s, f in w._files.items()}

    def __exit__(self, kind, error, trace):
        if kind is None or not issubclass(kind, ConfigError):
            return False
        w, (records, held_out, w._digest, w._end, positions) = self._writer, self._before
        del w._records[records:], w._held_out[held_out:]
        for suffix, position in positions.items():
            w._files[suffix].seek(position)
            w._files[suffix].truncate()
        notes.note(f"skipped {self._path}: {error}")
        return True


class _NoUndo:
    def __enter__(self):
        pass

    def __exit__(self, *error):
        return False


def _divide(batch: list[tuple]) -> tuple[list, list]:
    """The documents without and with images."""
    with_images = [document for document in batch if isinstance(document[1], ImageText)]
    return [document for document in batch if not isinstance(document[1], ImageText)], with_images


def _kind(found: encoding.Encoded) -> tuple[int, int]:
    """(kind, masked) of a document's RECORD."""
    if found.targets_T is None:
        return layout.TEXT, 0
    learned = np.flatnonzero(found.targets_T >= 0)
    masked = int(learned[0]) if len(learned) else len(found.targets_T)
    _, next_T = packing.span_arrays(found.ids_T, None, 0, len(found.ids_T))
    if found.images is None and np.array_equal(found.targets_T[masked:], next_T[masked:]):
        return layout.PROMPT, masked
    return layout.TARGETS, 0
