"""Packs documents into rows of T tokens.

A document is bos + tokens + eos. By default the target of a token is the next token of the same document, with weight 1; eos
has no target (weight 0). A document may instead have explicit targets, -1 for none.

In a row, segments number the documents from 1 (0 is padding), and positions count from 0 inside each segment. A document that
does not fit into a row is split: the rest becomes a new segment of another row. The last token before the split keeps its
target, so no target is lost or repeated. A document with explicit targets is split only if it is longer than a row, so that an
answer stays with its question and its images.

A span (document, start, stop) is the part of a document that one row contains.
"""
import itertools
from typing import NamedTuple

import numpy as np

from mmx.data.row_plan import Plan, plan_rows

_NO_TARGET = np.array([-1], np.int32)       # of a document's last token, which has no next token


class DocumentImages(NamedTuple):
    """A document's images, in the order of their tokens."""
    images: tuple
    tiles: int              # of all images together
    caption_length: int = 0     # the document's last tokens repeat the caption without its image, as a separate segment


class Documents:
    """Documents in memory, as `Packed` reads them. `data.store.reading.Documents` has the same methods for a token store.

    Args:
      ids: token ids of each document.
      targets: explicit targets of each document, None for the next tokens.
      images: DocumentImages of each document, None for text.
    """

    def __init__(self, ids, targets=None, images=None):
        self._ids, self._targets, self._images = ids, targets or [None] * len(ids), images or [None] * len(ids)

    def sizes(self):
        """Yields (numbers, tokens, whether the targets are explicit) of some documents at a time, as three arrays."""
        yield (np.arange(len(self._ids)), np.array([len(ids_T) for ids_T in self._ids], np.int64),
               np.array([targets_T is not None for targets_T in self._targets], bool))

    def read(self, spans) -> list[tuple]:
        """(ids_T, targets_T) of each span (document, start, stop); a target is -1 where there is none."""
        return [span_arrays(self._ids[d][start:stop + 1], self._targets[d], start, stop) for d, start, stop in spans]

    def images(self, document: int) -> DocumentImages | None:
        return self._images[document]


def span_arrays(ids_T, targets_T, start: int, stop: int) -> tuple:
    """(ids_T, targets_T) of a span.

    Args:
      ids_T: the ids of the span and, unless the document ends there, the next one.
      targets_T: the document's explicit targets, or None for the next tokens.
    """
    size = stop - start
    if targets_T is not None:
        return ids_T[:size], targets_T[start:stop]
    targets_T = ids_T[1:size + 1]
    return ids_T[:size], np.concatenate([targets_T, _NO_TARGET]) if len(targets_T) < size else targets_T


class Packed:
    """Packed training rows of some documents: a random-access sequence.

    Without explicit targets, rows have no padding. A document of n tokens fills n // T rows alone, so each of these rows has an
    unbroken context of T tokens. The remainders of all documents are concatenated and split every T tokens. The last row is
    completed with beginnings of documents, whose tokens other rows contain too.

    Documents with explicit targets that fit into a row are packed in their order, as many into each row as fit.

    A row's images are its "images": a list of (image, index of the last caption token in the row, or -1 if there is no separate
    caption).

    Args:
      documents: `Documents`, or a list of token ids.
      length: T, tokens in a row.
      plan: the rows, if they were planned before (`row_plan`).
    """

    def __init__(self, documents, length: int, plan: Plan | None = None):
        self.documents = Documents(documents) if isinstance(documents, list) else documents
        self.length, self.plan = length, plan or plan_rows(self.documents.sizes(), length)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        filled, sizes, images = 0, [], []
        spans = self.plan.row(row).tolist()
        for d, start, stop in spans:
            filled += stop - start
            with_images, parts = self.documents.images(d), (stop - start,)
            if with_images:
                images += [(image, filled - 1 if with_images.caption_length else -1) for image in with_images.images]
                caption = with_images.caption_length
                parts = (stop - start - caption, caption) if caption else parts
            sizes += parts
        return _make_row(self.documents.read(spans), sizes, self.length) | ({"images": images} if images else {})

    def tiles(self, row: int) -> int:
        """The number of tiles of a row's images."""
        return sum(images.tiles for d, _, _ in self.plan.row(row).tolist() if (images := self.documents.images(d)))


def row_starts(document, length: int, overlap: int = 0, targets=None) -> range:
    """The first tokens of the evaluation rows of a document (see `rows`)."""
    return range(0, max(len(document) - (targets is None) - overlap, 1), length - overlap)


def rows(document, length: int, overlap: int = 0, targets=None):
    """Yields the evaluation rows of one document: every target once, the last row padded.

    Rows overlap by `overlap` tokens. In the later row these tokens are context only (weight 0).

    Args:
      targets: explicit targets of the document, None for the next tokens.
    """
    for start in row_starts(document, length, overlap, targets):
        stop = min(start + length, len(document))
        row = _make_row([span_arrays(document[start:stop + 1], targets, start, stop)], [stop - start], length)
        if start:
            row["weights"][:overlap] = 0
        yield row


def batches(documents, length: int, batch: int, overlap: int = 0):
    """Yields (document_B, {name: array_BT}): evaluation rows of several documents, and the index of each row's document.

    The last batch is padded with empty rows (segment 0, weight 0) of document 0.

    Args:
      documents: (ids_T, explicit targets_T or None) of each document.
    """
    stream = ((d, row) for d, (ids_T, targets_T) in enumerate(documents) for row in rows(ids_T, length, overlap, targets_T))
    while group := list(itertools.islice(stream, batch)):
        group += [(0, _make_row([], [], length))] * (batch - len(group))
        yield np.array([d for d, _ in group]), stack(row for _, row in group)


def stack(rows) -> dict[str, np.ndarray]:
    """Stacks rows (dicts of arrays [T]) into a batch (a dict of arrays [B, T])."""
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _make_row(spans, sizes, length: int) -> dict[str, np.ndarray]:
    """One row, padded to `length`.

    Args:
      spans: (ids_T, targets_T) of each span; a target is -1 where there is none.
      sizes: the number of tokens of each segment.
    """
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segments", "positions")}
    row["weights"] = np.zeros(length, np.float32)
    if not spans:
        return row
    begins, end = np.cumsum([0, *sizes[:-1]]), sum(sizes)
    ids_T, targets_T = (np.concatenate(arrays) for arrays in zip(*spans))
    row["tokens"][:end] = ids_T
    row["targets"][:end] = np.maximum(targets_T, 0)
    row["weights"][:end] = targets_T >= 0
    row["segments"][:end] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    row["positions"][:end] = np.arange(end) - np.repeat(begins, sizes)
    return row
