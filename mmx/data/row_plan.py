"""Plans which spans of which documents form each packed row (`packing`), in one pass over the documents' lengths.

A plan has three parts, one after the other: the rows that one document fills alone, the rows of split documents, and the rows
of documents that are not split. Each part is a table of spans [(document, start, stop)] and the index of each row's first span.
The tables are in memory, or in files that are mapped into memory: the plan of a corpus of any size needs no memory.
"""
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

PARTS = "full", "split", "whole"


class Rows(NamedTuple):
    """One part of a plan."""
    spans: np.ndarray       # [spans, 3]: document, start, stop
    starts: np.ndarray      # [rows + 1]: the index of each row's first span, and the number of spans


class Plan(NamedTuple):
    """The spans of each row."""
    parts: tuple[Rows, ...]

    def __len__(self) -> int:
        return sum(len(rows.starts) - 1 for rows in self.parts)

    def row(self, number: int) -> np.ndarray:
        """The spans of a row, [spans, 3]."""
        for rows in self.parts:
            if number < len(rows.starts) - 1:
                return rows.spans[rows.starts[number]:rows.starts[number + 1]]
            number -= len(rows.starts) - 1
        raise IndexError(number)


class _Arrays:
    """Two growing arrays in memory, of one part of a plan."""

    def __init__(self):
        self._spans, self._starts, self.count = [np.zeros((0, 3), np.int64)], [], 0

    def add(self, spans, starts) -> None:
        """Appends spans, and the indices in `spans` at which rows start."""
        self._append(np.asarray(spans, np.int64).reshape(-1, 3), np.asarray(starts, np.int64) + self.count)
        self.count += len(spans)

    def _append(self, spans, starts) -> None:
        self._spans.append(spans)
        self._starts.append(starts)

    def finish(self) -> Rows:
        return Rows(np.concatenate(self._spans), np.concatenate([*self._starts, [self.count]], dtype=np.int64))


class _Files(_Arrays):
    """The same in two files."""

    def __init__(self, folder: Path, part: str):
        self._paths, self.count = [folder / f"{part}.{name}" for name in Rows._fields], 0
        self._files = [path.open("wb") for path in self._paths]

    def _append(self, spans, starts) -> None:
        for file, array in zip(self._files, (spans, starts)):
            file.write(np.ascontiguousarray(array, "<i8"))

    def finish(self) -> Rows:
        self._append(np.zeros((0, 3)), np.array([self.count]))
        for file in self._files:
            file.close()
        return _open(*self._paths)


def plan_rows(sizes, length: int, folder: Path | None = None) -> Plan:
    """Plans the rows of T = `length` tokens.

    Args:
      sizes: yields (numbers, tokens, whether the targets are explicit) of some documents at a time, as three arrays. A document
        with explicit targets is not split if it fits into a row.
      folder: writes the plan into files of this folder. None: returns it in memory.
    """
    parts = [_Files(folder, part) if folder else _Arrays() for part in PARTS]
    full, split, whole = parts
    filled, free, beginnings = 0, 0, []
    for numbers_d, tokens_d, explicit_d in sizes:
        unsplit_d = explicit_d & (tokens_d <= length)
        free = _plan_whole(whole, numbers_d[unsplit_d], tokens_d[unsplit_d], length, free)
        documents, tokens_d = numbers_d[~unsplit_d], tokens_d[~unsplit_d]
        full_rows_d = tokens_d // length
        row_d = np.repeat(np.cumsum(full_rows_d) - full_rows_d, full_rows_d)
        start = (np.arange(len(row_d)) - row_d) * length
        full.add(np.stack([np.repeat(documents, full_rows_d), start, start + length], 1), np.arange(len(start)))
        rest = tokens_d % length > 0
        filled = _plan_split(split, documents[rest], (full_rows_d * length)[rest], tokens_d[rest], length, filled)
        if sum(stop for _, stop in beginnings) < length:
            beginnings += list(zip(documents[:length].tolist(), tokens_d[:length].tolist()))
    missing = -filled % length
    for document, tokens in itertools.cycle(beginnings):
        if not missing:
            break
        stop = min(missing, tokens)
        filled = _plan_split(split, np.array([document]), np.array([0]), np.array([stop]), length, filled)
        missing -= stop
    return Plan(tuple(part.finish() for part in parts))


def open_plan(folder: Path) -> Plan:
    """A plan that `plan_rows` wrote into files."""
    return Plan(tuple(_open(*(folder / f"{part}.{name}" for name in Rows._fields)) for part in PARTS))


def _open(spans: Path, starts: Path) -> Rows:
    return Rows(_map(spans).reshape(-1, 3), _map(starts))


def _map(path: Path) -> np.ndarray:
    return np.memmap(path, "<i8", "r") if path.stat().st_size else np.zeros(0, np.int64)


def _plan_whole(rows: _Arrays, documents, tokens_d, length: int, free: int) -> int:
    """Adds whole documents, each to the current row if it fits into its `free` tokens, else to a new row; returns the rest."""
    ends, done, starts = np.cumsum(tokens_d), 0, []
    while done < len(documents):
        begin = ends[done] - tokens_d[done]
        fitting = int(np.searchsorted(ends, begin + free, "right"))
        if fitting == done:
            starts.append(done)
            free = length
            continue
        free -= int(ends[fitting - 1] - begin)
        done = fitting
    rows.add(np.stack([documents, np.zeros_like(tokens_d), tokens_d], 1), starts)
    return free


def _plan_split(rows: _Arrays, documents, start, stop, length: int, filled: int) -> int:
    """Adds spans to rows that `filled` tokens fill so far, and splits them every `length` tokens; returns the new number."""
    if not len(documents):
        return filled
    ends = filled + np.cumsum(stop - start)
    begins = ends - (stop - start)
    bounds = np.union1d(begins, np.arange(-(-filled // length) * length, ends[-1], length))
    span = np.searchsorted(ends, bounds, side="right")
    start = start[span] + bounds - begins[span]
    rows.add(np.stack([documents[span], start, start + np.diff(bounds, append=ends[-1:])], 1),
             np.flatnonzero(bounds % length == 0))
    return int(ends[-1])
