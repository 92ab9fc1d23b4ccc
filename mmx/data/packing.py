"""Documents to rows of T tokens.

A document is bos + tokens + eos. The target of a token is the next one of the same document, weight 1; eos has none,
weight 0. A document may bring targets of its own, -1 for none.

In a row, segments count documents from 1 (0 is padding) and positions count from 0 inside a segment. A document cut by the
end of a row goes on in another row as a new segment, and the token at the cut keeps its target: every (token, target) pair
stands in exactly one row, once. A document with targets of its own is cut only where it is longer than a row: an answer
stays with its question, and with the images that it is about.
"""
import itertools
from typing import NamedTuple

import numpy as np

_NONE = np.array([-1], np.int32)        # of a document's last token, which no other follows


class Shown(NamedTuple):
    """The images that a document shows, in the order of their tokens."""
    images: tuple
    tiles: int              # of all of them
    alone: int = 0          # of its last tokens that stand in the row as a document of their own: its text without the image


class Packed:
    """Training rows of some documents: a random-access sequence, all full, without padding where documents may be cut.

    A document of n tokens gives n // T rows of its own, so that those have one unbroken context of T tokens each; what
    is left of the documents is laid end to end and cut every T tokens. The last row is filled up by reading documents
    again from the first: fewer than T tokens are seen twice. `targets[d]` are document d's own; None: the next
    tokens. Documents that have their own and fit a row come in their order, as many in a row as it holds. `shown[d]` are
    document d's images, None of text; they come with a row as "images", each with the place of the last token of those that
    stand alone (-1 without them).
    """

    def __init__(self, documents, length: int, targets=None, shown=None):
        self.documents, self.length, self.targets = documents, length, targets or [None] * len(documents)
        self.shown = shown or [None] * len(documents)
        own = np.array([targets is not None for targets in self.targets], bool)
        self._spans, self._first = _plan(np.array([len(d) for d in documents], np.int64), length, own)

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        at, spans, images = 0, [], []
        for d, start, stop in self._of(row).tolist():
            at += stop - start
            shown, cuts = self.shown[d], (start, stop)
            if shown:
                images += [(image, at - 1 if shown.alone else -1) for image in shown.images]
                cuts = (start, stop - shown.alone, stop) if shown.alone else cuts
            spans += [(self.documents[d], *cut, self.targets[d]) for cut in itertools.pairwise(cuts)]
        return _lay(spans, self.length) | ({"images": images} if images else {})

    def tiles(self, row: int) -> int:
        """Of a row's images."""
        return sum(self.shown[d].tiles for d, _, _ in self._of(row) if self.shown[d])

    def _of(self, row: int):
        return self._spans[self._first[row]:self._first[row + 1]]


def rows(document, length: int, context: int = 0):
    """Evaluation rows of one document, every target once, the last row padded.

    Rows overlap by `context` tokens, which only serve as context (weight 0) in the later of the two.
    """
    for start in range(0, max(len(document) - 1 - context, 1), length - context):
        row = _lay([(document, start, min(start + length, len(document)), None)], length)
        if start:
            row["weights"][:context] = 0
        yield row


def batches(documents, length: int, batch: int, context: int = 0):
    """(document_B, {name: array_BT}): the rows of several documents, and the number of the document each is of.

    The last batch is filled up with padding (segment 0, weight 0) under document 0.
    """
    stream = ((d, row) for d, document in enumerate(documents) for row in rows(document, length, context))
    while group := list(itertools.islice(stream, batch)):
        group += [(0, _lay([], length))] * (batch - len(group))
        yield np.array([d for d, _ in group]), stack(row for _, row in group)


def stack(rows) -> dict[str, np.ndarray]:
    """Rows [T] to a batch [B, T], name by name."""
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _lay(spans, length: int) -> dict[str, np.ndarray]:
    """One row from (document, start, stop, own targets) spans; what they leave free is padding."""
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segments", "positions")}
    row["weights"] = np.zeros(length, np.float32)
    if not spans:
        return row
    targets = []
    for document, start, stop, own in spans:
        targets.append(document[start + 1:stop + 1] if own is None else own[start:stop])
        targets += [_NONE] * (stop - start - len(targets[-1]))
    sizes = [stop - start for _, start, stop, _ in spans]
    begins, end = np.cumsum([0, *sizes[:-1]]), sum(sizes)
    targets = np.concatenate(targets)
    row["tokens"][:end] = np.concatenate([document[start:stop] for document, start, stop, _ in spans])
    row["targets"][:end] = np.maximum(targets, 0)
    row["weights"][:end] = targets >= 0
    row["segments"][:end] = np.repeat(np.arange(1, len(spans) + 1), sizes)
    row["positions"][:end] = np.arange(end) - np.repeat(begins, sizes)
    return row


def _plan(lengths, length: int, own):
    """Every row's spans, [(document, start, stop)] in one table, and the place of each row's first span in it.

    Documents of `own` are not cut if they fit a row.
    """
    uncut = own & (lengths <= length)
    apart, begins = _fill(np.flatnonzero(uncut), lengths, length)
    lengths = np.where(uncut, 0, lengths)
    whole = lengths // length
    document = np.repeat(np.arange(len(lengths)), whole)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)) * length
    alone = np.stack([document, start, start + length], 1)

    rest = [(d, whole[d] * length, lengths[d]) for d in np.flatnonzero(lengths % length)]
    missing = -int(np.sum(lengths % length)) % length
    for d in itertools.cycle(range(len(lengths))):
        if not missing:
            break
        rest.append((d, 0, min(missing, lengths[d])))
        missing -= rest[-1][2]
    shared, first = _cut(np.array(rest, np.int64).reshape(-1, 3), length)
    table = np.concatenate([alone, shared, apart])
    return table, np.concatenate([np.arange(len(alone)), len(alone) + first[:-1], len(alone) + len(shared) + begins])


def _fill(documents, lengths, length: int):
    """Spans of whole documents, each in the last row or, where that is too full, in a new one; the rows' first, and the end."""
    spans, first, room = [], [], 0
    for d in documents:
        if lengths[d] > room:
            first.append(len(spans))
            room = length
        spans.append((d, 0, lengths[d]))
        room -= lengths[d]
    return np.array(spans, np.int64).reshape(-1, 3), np.array([*first, len(spans)], np.int64)


def _cut(spans, length: int):
    """Spans laid end to end and cut every `length` tokens; the place of each row's first span, and the end."""
    document, start, stop = spans.T
    ends = np.cumsum(stop - start)
    begins, rows = ends - (stop - start), np.arange(0, np.sum(stop - start), length)
    cuts = np.union1d(begins, rows)
    span = np.searchsorted(ends, cuts, side="right")
    start = start[span] + cuts - begins[span]
    sizes = np.diff(cuts, append=ends[-1:])
    return np.stack([document[span], start, start + sizes], 1), np.append(np.searchsorted(cuts, rows), len(cuts))
