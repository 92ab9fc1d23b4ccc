"""Makes a token store (`layout`) from the files of a source. It streams: memory does not grow with the source.

The source is divided into units of work: some files, or ranges of a large file, of about the same size. Each becomes a part of
the store. Units do not depend on the number of processes, and neither does any byte of the store. A part is complete once its
summary exists, so a killed preparation continues where it was.
"""
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx.config import ConfigError
from mmx.data import corpus, formats, sources
from mmx.data.document_types import ImageText
from mmx.data.store import identity, layout, reading
from mmx.data.store.layout import SPLITS, Border, Manifest, Part
from mmx.data.store.writing import Settings, Writer, dtype
from mmx.files import atomic, json_text, output, texts, urls

PART_BYTES = 64 << 20       # of the source, in one part
MOST_PARTS = 8192           # above it, parts are larger
BATCH_BYTES = 1 << 20       # of text, tokenized at a time
SHOWN_BYTES = 64 << 20      # a larger source has a progress bar


class Piece(NamedTuple):
    """A part of a file."""
    path: str
    name: str               # the file's path inside the source
    part: formats.Range
    size: int               # bytes of the file that it has, for the progress bar


def prepare(source: str, settings: Settings, jobs: int = 0) -> reading.Store:
    """Makes the token store of a source in the folder `settings.out`, or continues to make it.

    Args:
      jobs: number of processes; 0: as many as cores, or this process alone if the source is small.
    """
    files = sources.list_files(source)
    versions = [file_version(path, files.name(path)) for path in files.paths]
    total = sum(size for _, size, _ in versions)
    wanted = identity.tokenizer(settings.tokenizer)
    images = identity.images(settings.images)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "parts").mkdir(exist_ok=True)
    units = _plan_units(files, versions)
    _check_units(settings, {"files": versions, "tokenizer": wanted, "images": images, "columns": settings.columns,
                            "skip_bad": settings.skip_bad, "units": units})
    if "sha256" in wanted:
        shutil.copyfile(settings.tokenizer, settings.out / layout.TOKENIZER)
    todo = [n for n in range(len(units)) if not _summary(settings.out, n).exists()]
    jobs = min(jobs or (os.cpu_count() or 1 if total > SHOWN_BYTES else 1), len(todo) or 1)
    _work(settings, units, todo, jobs, total)
    manifest = Manifest(source, versions, wanted, images, np.dtype(dtype(settings)).name,
                        tuple(_read_summary(settings.out, n) for n in range(len(units))), {})
    _write_manifest(settings.out, _finish(source, settings, units, manifest))
    store = reading.Store(settings.out)
    sources.note_skipped(source, files, store.image_files())
    return store


def file_version(path: Path, name: str) -> tuple:
    """(name, bytes, version) of a file (`urls.version`): it is taken to be unchanged while they are."""
    return name, *urls.version(path)


def _check_units(settings: Settings, content: dict) -> None:
    """Writes units.json. If it exists, raises ConfigError if it is of another source, tokenizer or setting."""
    path, text = settings.out / layout.UNITS, json_text.dumps(content)
    if not path.exists():
        if reading.is_store(settings.out) or any(settings.out.glob("parts/*")):
            raise ConfigError(f"{settings.out} contains other files: give another --out")
        with atomic.replacing(path) as file:
            file.write(text)
    elif path.read_text() != text:
        old = json.loads(path.read_text())
        different = [key for key, value in json.loads(text).items() if old.get(key) != value]
        raise ConfigError(f"{settings.out} was begun with other {', '.join(different)}: delete it, or give another --out")


def _plan_units(files: sources.Files, versions) -> list[list[Piece]]:
    total = sum(size for _, size, _ in versions)
    most = max(PART_BYTES, -(-total // MOST_PARTS))
    units, filled = [[]], 0
    for path, (name, size, _) in zip(files.paths, versions):
        for part, part_size in _ranges(path, size, most):
            if units[-1] and filled + part_size > most:
                units.append([])
                filled = 0
            units[-1].append(Piece(str(path), name, part, part_size))
            filled += part_size
    return units


def _ranges(path: Path, size: int, most: int) -> Iterator[tuple[formats.Range, int]]:
    """(range, bytes) of parts of a file of up to about `most` bytes."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_ranges(path, size, most)
    elif suffix != ".jsonl" or size <= most or urls.is_url(path):       # counting the lines would read an object twice
        yield formats.Range(), size
    else:
        yield from _line_ranges(path, size, most)


def _parquet_ranges(path: Path, size: int, most: int) -> Iterator[tuple[formats.Range, int]]:
    counts = formats.row_groups(path)
    begin, first, rows, total = 0, 1, 0, sum(counts) or 1
    for group, count in enumerate(counts, 1):
        rows += count
        if rows * size // total >= most or group == len(counts):
            yield formats.Range(begin, group, first), rows * size // total
            begin, first, rows = group, first + rows, 0


def _line_ranges(path: Path, size: int, most: int) -> Iterator[tuple[formats.Range, int]]:
    """Ranges that end at line ends. A file that is not plain UTF-8 lines has one range."""
    ranges, begin, first, lines = [], 0, 1, 0
    with path.open("rb") as file:
        position, mark = 0, file.read(4)
        file.seek(0)
        while chunk := file.read(texts.CHUNK):
            if b"\r" in chunk or any(mark.startswith(other) for other in texts.MARKS):
                yield formats.Range(), size
                return
            end = chunk.rfind(b"\n") + 1
            if position + end - begin >= most and end:
                lines += chunk.count(b"\n", 0, end)
                ranges.append((formats.Range(begin, position + end, first), position + end - begin))
                begin, first, lines = position + end, first + lines, 0
            else:
                lines += chunk.count(b"\n")
            position += len(chunk)
    if begin < size:
        ranges.append((formats.Range(begin, size, first), size - begin))
    yield from ranges


def _work(settings: Settings, units, todo: list[int], jobs: int, total: int) -> None:
    done = sum(piece.size for unit in units for piece in unit) - sum(piece.size for n in todo for piece in units[n])
    small = total <= SHOWN_BYTES
    with output.bar(total=total, initial=done, desc="tokenize", unit="B", unit_scale=True, disable=small) as bar:
        if jobs == 1:
            for number in todo:
                _make_part(settings, number, units[number], bar.update)
            return
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        with concurrent.futures.ProcessPoolExecutor(jobs, context, _set_up_worker, (counter, jobs)) as pool:
            futures = [pool.submit(_make_part_in_worker, settings, number, units[number]) for number in todo]
            ended = threading.Event()
            threading.Thread(target=_follow, args=(counter, bar, ended), daemon=True).start()
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
            finally:
                ended.set()


def _follow(counter, bar, ended: threading.Event) -> None:
    shown = 0
    while not ended.wait(0.5):
        count = counter.value
        bar.update(count - shown)
        shown = count


def _set_up_worker(counter, jobs: int) -> None:
    global _counter
    _counter = counter
    os.environ["RAYON_NUM_THREADS"] = str(max((os.cpu_count() or 1) // jobs, 1))      # of tokenizers


def _make_part_in_worker(settings: Settings, number: int, unit: list[Piece]) -> None:
    def update(size: int) -> None:
        with _counter.get_lock():
            _counter.value += size
    _make_part(settings, number, unit, update)


def _make_part(settings: Settings, number: int, unit: list[Piece], update) -> None:
    with Writer(settings, f"{number:05d}") as writer:
        for piece in unit:
            start, reported = time.monotonic(), 0
            with writer.checkpoint(piece.path):
                for batch, size in _batches(_documents(piece, settings)):
                    writer.add(batch)
                    if time.monotonic() - start > 0.5:
                        # of a compressed file, the size of the text is not the size of the file
                        shown = min(size, piece.size - reported) if piece.path.lower().endswith(".jsonl") else 0
                        update(shown)
                        reported += shown
                        start = time.monotonic()
            update(piece.size - reported)


def _documents(piece: Piece, settings: Settings) -> Iterator[tuple]:
    if piece.name == corpus.ARCHIVE:
        return iter(corpus.all_documents())
    return formats.read(urls.as_path(piece.path), piece.name, formats.parse_columns(settings.columns), piece.part)


def _batches(documents: Iterator[tuple]) -> Iterator[tuple[list, int]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += sources.size(document[1])
        if size >= BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def _finish(source: str, settings: Settings, units, manifest: Manifest) -> Manifest:
    """Decides the splits as `sources` documents them, and counts them."""
    store = reading.Store(settings.out, manifest)
    counts = {split: sum(len(numbers) for numbers, *_ in store.chosen(split)) for split in SPLITS}
    if not sum(counts.values()):
        files = len(manifest.files)
        raise ConfigError(f"data.sources: {source!r} contains no text in its {files} file{'s' * (files > 1)}")
    if not counts["train"]:
        manifest = dataclasses.replace(manifest, all_train=True)
    if manifest.all_train or not counts["validation"]:
        border = _find_border(reading.Store(settings.out, manifest))
        if not _summary(settings.out, layout.BORDER).exists():
            _write_border(settings, units, border, manifest.all_train)
        manifest = dataclasses.replace(manifest, border=border[0],
                                       parts=(*manifest.parts, _read_summary(settings.out, layout.BORDER)))
    store = reading.Store(settings.out, manifest)
    splits = {}
    for split in SPLITS:
        found = [(len(numbers), int(sizes.sum()), *(int(store.field(name, numbers).sum()) for name in ("size", "targets")))
                 for numbers, sizes, _ in store.chosen(split)]
        splits[split] = dict(zip(("documents", "tokens", "bytes", "targets"), map(sum, zip(*found))))
    if not splits["train"]["documents"]:
        raise ConfigError(f"data.sources: {source!r} has too little text to train on after holding some out for validation")
    return dataclasses.replace(manifest, splits=splits)


def _find_border(store: reading.Store) -> tuple[Border, int]:
    """The document at which the first 95 % of the training text end, and how much of its text belongs to them."""
    sizes = [(numbers, store.field("size", numbers)) for numbers, *_ in store.chosen("train")]
    keep = sum(int(size.sum()) for _, size in sizes) * 19 // 20
    for numbers, size in sizes:
        ends = np.cumsum(size)
        if len(ends) and keep < ends[-1]:
            n = int(np.searchsorted(ends, keep, "right"))
            part, index = (int(x[0]) for x in store.locate(numbers[n:n + 1]))
            return Border(part, index), keep - int(ends[n] - size[n])
        keep -= int(size.sum())
    raise AssertionError


def _write_border(settings: Settings, units, found: tuple[Border, int], all_train: bool) -> None:
    """Writes the part "border": the two halves of the document at the border, and the texts of later training documents."""
    border, keep = found
    with Writer(settings, layout.BORDER) as writer:
        for number in range(border.part, len(units)):
            documents = (document for piece in units[number] for document in _documents(piece, settings))
            if settings.skip_bad:
                documents = _good_documents(units[number], settings)
            for index, (name, content) in enumerate(documents):
                if number == border.part and index < border.document:
                    continue
                if number == border.part and index == border.document:
                    halves = sources.cut(content, keep) if isinstance(content, bytes) else (b"", content)
                    for half, split in zip(halves, SPLITS):
                        if half:
                            writer.add([(name, half)], [split])
                elif (all_train or corpus.split_of(name) == "train") and not isinstance(content, ImageText):
                    writer.hold_out(name, content, "validation")


def _good_documents(unit: list[Piece], settings: Settings) -> Iterator[tuple]:
    for piece in unit:
        try:
            yield from list(_documents(piece, settings))
        except ConfigError:
            continue


def _write_manifest(out: Path, manifest: Manifest) -> None:
    content = dataclasses.asdict(manifest) | {"parts": [part._asdict() for part in manifest.parts],
                                              "border": manifest.border and manifest.border._asdict()}
    with atomic.replacing(out / layout.MANIFEST) as file:
        file.write(json_text.dumps(content, indent=1))


def _summary(out: Path, number: int | str) -> Path:
    return out / "parts" / (f"{number:05d}.json" if isinstance(number, int) else f"{number}.json")


def _read_summary(out: Path, number: int | str) -> Part:
    return Part(**json.loads(_summary(out, number).read_text()))
