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

_NO_TARGET = np.array([-1], np.int32)       # of a document's last token, which has no next token


class DocumentImages(NamedTuple):
    """A document's images, in the order of their tokens."""
    images: tuple
    tiles: int              # of all images together
    caption_length: int = 0     # the document's last tokens repeat the caption without its image, as a separate segment


class Packed:
    """Packed training rows of some documents: a random-access sequence.

    Without explicit targets, rows have no padding. A document of n tokens fills n // T rows alone, so each of these rows has an
    unbroken context of T tokens. The remainders of all documents are concatenated and split every T tokens. The last row is
    completed with beginnings of documents, whose tokens other rows contain too.

    Documents with explicit targets that fit into a row are packed in their order, as many into each row as fit.

    Args:
      documents: token ids of each document.
      length: T, tokens in a row.
      targets: explicit targets of each document, None for the next tokens.
      images: DocumentImages of each document, None for text. A row's images are its "images": a list of (image, index of the
        last caption token in the row, or -1 if there is no separate caption).
    """

    def __init__(self, documents, length: int, targets=None, images=None):
        self.documents, self.length, self.targets = documents, length, targets or [None] * len(documents)
        self.images = images or [None] * len(documents)
        explicit = np.array([targets is not None for targets in self.targets], bool)
        lengths = np.array([len(d) for d in documents], np.int64)
        self._spans, self._row_starts = _plan(lengths, length, explicit)

    def __len__(self) -> int:
        return len(self._row_starts) - 1

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        filled, spans, images = 0, [], []
        for d, start, stop in self._row_spans(row).tolist():
            filled += stop - start
            with_images, bounds = self.images[d], (start, stop)
            if with_images:
                images += [(image, filled - 1 if with_images.caption_length else -1) for image in with_images.images]
                bounds = (start, stop - with_images.caption_length, stop) if with_images.caption_length else bounds
            spans += [(self.documents[d], *pair, self.targets[d]) for pair in itertools.pairwise(bounds)]
        return _make_row(spans, self.length) | ({"images": images} if images else {})

    def tiles(self, row: int) -> int:
        """The number of tiles of a row's images."""
        return sum(self.images[d].tiles for d, _, _ in self._row_spans(row) if self.images[d])

    def _row_spans(self, row: int):
        return self._spans[self._row_starts[row]:self._row_starts[row + 1]]


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
        row = _make_row([(document, start, min(start + length, len(document)), targets)], length)
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
        group += [(0, _make_row([], length))] * (batch - len(group))
        yield np.array([d for d, _ in group]), stack(row for _, row in group)


def stack(rows) -> dict[str, np.ndarray]:
    """Stacks rows (dicts of arrays [T]) into a batch (a dict of arrays [B, T])."""
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _make_row(spans, length: int) -> dict[str, np.ndarray]:
    """One row from (document, start, stop, explicit targets or None) spans, padded to `length`."""
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segments", "positions")}
    row["weights"] = np.zeros(length, np.float32)
    if not spans:
        return row
    targets = []
    for document, start, stop, explicit in spans:
        targets.append(document[start + 1:stop + 1] if explicit is None else explicit[start:stop])
        targets += [_NO_TARGET] * (stop - start - len(targets[-1]))
    sizes = [stop - start for _, start, stop, _ in spans]
    begins, end = np.cumsum([0, *sizes[:-1]]), sum(sizes)
    targets = np.concatenate(targets)
    row["tokens"][:end] = np.concatenate([document[start:stop] for document, start, stop, _ in spans])
    row["targets"][:end] = np.maximum(targets, 0)
    row["weights"][:end] = targets >= 0
    row["segments"][:end] = np.repeat(np.arange(1, len(spans) + 1), sizes)
    row["positions"][:end] = np.arange(end) - np.repeat(begins, sizes)
    return row


def _plan(lengths, length: int, explicit):
    """Plans all rows: a table of spans [(document, start, stop)], and the index of each row's first span (and the end).

    Args:
      lengths: tokens of each document.
      explicit: whether each document has explicit targets; then it is not split if it fits into a row.
    """
    unsplit = explicit & (lengths <= length)
    unsplit_spans, unsplit_starts = _pack_whole(np.flatnonzero(unsplit), lengths, length)
    lengths = np.where(unsplit, 0, lengths)
    full_rows = lengths // length
    document = np.repeat(np.arange(len(lengths)), full_rows)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(full_rows) - full_rows, full_rows)) * length
    full_spans = np.stack([document, start, start + length], 1)

    rest = [(d, full_rows[d] * length, lengths[d]) for d in np.flatnonzero(lengths % length)]
    missing = -int(np.sum(lengths % length)) % length
    for d in itertools.cycle(range(len(lengths))):
        if not missing:
            break
        rest.append((d, 0, min(missing, lengths[d])))
        missing -= rest[-1][2]
    split_spans, split_starts = _pack_split(np.array(rest, np.int64).reshape(-1, 3), length)
    table = np.concatenate([full_spans, split_spans, unsplit_spans])
    starts = (np.arange(len(full_spans)), len(full_spans) + split_starts[:-1],
              len(full_spans) + len(split_spans) + unsplit_starts)
    return table, np.concatenate(starts)


def _pack_whole(documents, lengths, length: int):
    """Spans of whole documents, each in the current row if it fits, else in a new row; the rows' first spans, and the end."""
    spans, starts, free = [], [], 0
    for d in documents:
        if lengths[d] > free:
            starts.append(len(spans))
            free = length
        spans.append((d, 0, lengths[d]))
        free -= lengths[d]
    return np.array(spans, np.int64).reshape(-1, 3), np.array([*starts, len(spans)], np.int64)


def _pack_split(spans, length: int):
    """Concatenates spans and splits them every `length` tokens; returns the rows' first spans too, and the end."""
    document, start, stop = spans.T
    ends = np.cumsum(stop - start)
    begins, rows = ends - (stop - start), np.arange(0, np.sum(stop - start), length)
    bounds = np.union1d(begins, rows)
    span = np.searchsorted(ends, bounds, side="right")
    start = start[span] + bounds - begins[span]
    sizes = np.diff(bounds, append=ends[-1:])
    return np.stack([document[span], start, start + sizes], 1), np.append(np.searchsorted(bounds, rows), len(bounds))
