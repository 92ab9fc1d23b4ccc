"""Reads a token store (`layout`): its documents, their spans, and its held-out texts."""
import functools
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmx.config import ConfigError
from mmx.data import packing
from mmx.data.document_types import PromptCompletion, TokenIds
from mmx.data.store import layout
from mmx.data.store.layout import RECORD, SPLITS, TARGETS, Border, Manifest, Part
from mmx.files import untrusted, urls

OPEN_PARTS = 256        # parts whose files are mapped into memory at the same time
AT_A_TIME = 1 << 20     # records read at a time
MANIFEST_BYTES = 256 << 20


def is_store(path: str | Path) -> bool:
    """Whether a folder is a token store."""
    return not urls.is_url(path) and (Path(path) / layout.MANIFEST).is_file()


class Store:
    """An open token store. It reads what it needs when it needs it."""

    def __init__(self, folder: str | Path, manifest: Manifest | None = None):
        self.folder = Path(folder)
        self.manifest = manifest or _read_manifest(self.folder)
        counts = [part.documents for part in self.manifest.parts]
        self._first = np.cumsum([0, *counts])       # the number of the first document of each part, and of the end
        self._arrays = functools.lru_cache(OPEN_PARTS)(self._map)

    def records(self, part: int) -> np.ndarray:
        """The RECORDs of a part's documents."""
        return self._arrays(part, "documents")

    def chosen(self, split: str = "train", least: int = 0, below: int = 0) -> Iterator[tuple]:
        """Yields (numbers, tokens, whether the targets are explicit) of a split's documents, some at a time, as three arrays.

        Args:
          least, below: only documents of at least `least` and fewer than `below` tokens (0: no limit).
        """
        for part in range(len(self.manifest.parts)):
            records = self.records(part)
            for begin in range(0, len(records), AT_A_TIME):
                some = records[begin:begin + AT_A_TIME]
                before = records["end"][begin - 1] if begin else 0
                sizes = np.diff(some["end"].astype(np.int64), prepend=np.int64(before))
                numbers = np.flatnonzero(self._in_split(part, begin, some, split) & (sizes >= least)
                                         & (sizes < (below or np.iinfo(np.int64).max)))
                yield self._first[part] + begin + numbers, sizes[numbers], some["kind"][numbers] != layout.TEXT

    def _in_split(self, part: int, begin: int, records, split: str) -> np.ndarray:
        """Whether each of some records, the first of which is `begin` of its part, belongs to a split."""
        border, is_border = self.manifest.border, self.manifest.parts[part].name == layout.BORDER
        number = np.zeros(len(records), np.uint8) if self.manifest.all_train and not is_border else records["split"]
        train = number == SPLITS.index("train")
        if border is None or is_border:
            return number == SPLITS.index(split)
        position = np.arange(begin, begin + len(records))
        later = np.full(len(records), part > border.part) | (part == border.part) & (position > border.document)
        replaced = (part == border.part) & (position == border.document)
        by_split = {"train": train & ~later & ~replaced, "validation": train & later}
        return by_split.get(split, number == SPLITS.index(split))

    def field(self, name: str, numbers) -> np.ndarray:
        """A field of the RECORDs of some documents of one part."""
        if not len(numbers):
            return np.zeros(0, np.int64)
        parts, index = self.locate(numbers)
        return self.records(int(parts[0]))[name][index].astype(np.int64)

    def locate(self, numbers) -> tuple[np.ndarray, np.ndarray]:
        """(part, index in the part) of documents."""
        parts = np.searchsorted(self._first, numbers, "right") - 1
        return parts, numbers - self._first[parts]

    def document(self, number: int) -> tuple:
        """(part, record, index of its first token in the part) of a document."""
        part = int(np.searchsorted(self._first, number, "right")) - 1
        records, index = self.records(part), number - int(self._first[part])
        return part, records[index], int(records["end"][index - 1]) if index else 0

    def tokens(self, part: int) -> np.ndarray:
        return self._arrays(part, "tokens")

    def targets(self, part: int) -> np.ndarray:
        return self._arrays(part, "targets")

    def images(self, part: int, position: int) -> tuple[str, packing.DocumentImages]:
        """The name and the images of the document whose line in parts/*.images is at `position`."""
        with self._path(part, "images").open("rb") as file:
            file.seek(position)
            found = json.loads(file.readline())
        return found["name"], packing.DocumentImages(tuple(found["images"]), found["tiles"], found["caption_length"])

    def image_files(self) -> Iterator[str]:
        """Yields the image files that the documents name."""
        for part, summary in enumerate(self.manifest.parts):
            if summary.sizes.get("images"):
                with self._path(part, "images").open("rb") as file:
                    for line in file:
                        yield from json.loads(line)["images"]

    def held_out(self, split: str) -> Iterator[tuple]:
        """Yields (name, content) of the documents of the validation or test split, without those with images, in order."""
        for part, summary in enumerate(self.manifest.parts):
            if summary.sizes.get("held_out.gz") and (summary.name == layout.BORDER or not self.manifest.all_train):
                with gzip.open(self._path(part, "held_out.gz")) as file:
                    for line in file:
                        found = json.loads(line)
                        if found.pop("split") == split:
                            yield found.pop("name"), content_from_json(found)

    def _path(self, part: int, suffix: str) -> Path:
        return self.folder / "parts" / f"{self.manifest.parts[part].name}.{suffix}"

    def _map(self, part: int, suffix: str) -> np.ndarray:
        dtypes = {"documents": RECORD, "tokens": np.dtype(self.manifest.dtype).newbyteorder("<"), "targets": np.dtype("<i4")}
        dtype = dtypes[suffix]
        path, summary = self._path(part, suffix), self.manifest.parts[part]
        wanted = summary.sizes.get(suffix, 0)
        if not wanted:
            return np.zeros(0, dtype)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"{self.folder} is incomplete: no {path} ({error.strerror}); prepare it again") from None
        if size != wanted:
            raise ConfigError(f"{self.folder} is damaged: {path} has {size:,} bytes, not {wanted:,}; prepare it again")
        return np.memmap(path, dtype, "r")


class Documents:
    """Some of the documents of a store, for `packing.Packed`. They keep their numbers in the store."""

    def __init__(self, store: Store, least: int = 0, below: int = 0):
        self.store, self._bounds = store, (least, below)

    def sizes(self) -> Iterator[tuple]:
        return self.store.chosen("train", *self._bounds)

    def read(self, spans) -> list[tuple]:
        found = []
        for number, start, stop in spans:
            part, record, first = self.store.document(number)
            end = min(first + stop + 1, int(record["end"]))
            ids_T, targets_T = self.store.tokens(part)[first + start:end], None
            if record["kind"] == TARGETS:
                targets_T = self.store.targets(part)[first + start:first + stop]
                found.append((ids_T[:stop - start], targets_T))
                continue
            ids_T, targets_T = packing.span_arrays(ids_T.astype(np.int32), None, start, stop)
            if start < record["masked"]:
                targets_T = np.where(np.arange(start, stop) < record["masked"], -1, targets_T)
            found.append((ids_T, targets_T))
        return found

    def images(self, document: int) -> packing.DocumentImages | None:
        part, record, _ = self.store.document(document)
        return None if record["image"] < 0 else self.store.images(part, int(record["image"]))[1]

    def name(self, document: int) -> str:
        """The name of a document with images."""
        part, record, _ = self.store.document(document)
        return self.store.images(part, int(record["image"]))[0]


def content_to_json(content) -> dict:
    """A document's content without images, for JSON; bytes that are not UTF-8 become surrogates."""
    if isinstance(content, TokenIds):
        return {name[:-2]: ids_T.tolist() for name, ids_T in content._asdict().items()}
    texts = content._asdict() if isinstance(content, PromptCompletion) else {"text": content}
    return {name: raw.decode("utf-8", "surrogateescape") for name, raw in texts.items()}


def content_from_json(found: dict):
    """The reverse of `content_to_json`."""
    if "tokens" in found:
        return TokenIds(*(np.array(found[name], np.int32) for name in ("tokens", "targets")))
    texts = [text.encode("utf-8", "surrogateescape") for text in found.values()]
    return texts[0] if len(texts) == 1 else PromptCompletion(*texts)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / layout.MANIFEST
    try:
        found = untrusted.loads(untrusted.read_bytes(path, MANIFEST_BYTES))
        version = found["format"]
        if version != layout.VERSION:
            raise ConfigError(f"{folder} is a token store of format {version}; this mmx reads format {layout.VERSION}: "
                              + ("update mmx" if version > layout.VERSION else "prepare it again"))
        found["parts"] = tuple(Part(**part) for part in found["parts"])
        found["border"] = found["border"] and Border(**found["border"])
        return Manifest(**found)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a manifest of a token store ({str(error)[:200]})") from None
