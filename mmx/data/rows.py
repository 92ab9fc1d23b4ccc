"""The packed training rows of a source, from its token store. The rows of generated sources are made in memory."""
import hashlib
import math
from pathlib import Path

import filelock
import numpy as np

from mmx import config
from mmx.config import ConfigError
from mmx.data import encoding, packing, row_plan, sources, token_tasks, tokens
from mmx.data.encoding import ImageOptions
from mmx.data.store import cache, reading
from mmx.files import atomic, json_text


def pack(source: str, data: config.Data, length: int, bounds: tuple, options: ImageOptions) -> packing.Packed:
    """The rows of T = `length` tokens of a source's training documents.

    Args:
      bounds: (least, below): only documents of at least `least` and fewer than `below` tokens (0: no limit), with bos and eos.
    """
    if is_generated(source):
        return _pack_generated(source, data.tokenizer, length, bounds, options)
    store = cache.open_store(source, data, options)
    if unread := next((part.unread for part in store.manifest.parts if part.unread), ""):
        encoding.refuse_images(f"{source}, {unread}")
    if not store.manifest.splits["train"]["targets"]:
        raise ConfigError(f"data.sources: the training documents of {source!r} have no target to learn: every one is -1")
    documents = reading.Documents(store, *bounds)
    plan = open_plan(store, documents, length, bounds, cache.cache_folder(data.cache))
    if not len(plan):
        limits = [size for _, sizes, _ in store.chosen() if len(sizes) for size in (sizes.min(), sizes.max())]
        _refuse_bounds(source, bounds, limits, store.manifest.splits["train"]["documents"])
    _check_images(source, documents, length)
    return packing.Packed(documents, length, plan)


def is_generated(source: str) -> bool:
    """Whether a source is generated, so that it has no files."""
    return source in sources.GENERATED or token_tasks.matches(source)


def open_plan(store: reading.Store, documents, length: int, bounds: tuple, cache_folder: Path) -> row_plan.Plan:
    """The plan of a store's rows. It is computed once, and kept in the cache folder."""
    manifest = (store.folder / "manifest.json").read_bytes()
    key = json_text.dumps([hashlib.sha256(manifest).hexdigest(), length, bounds])
    folder = cache_folder / "plans" / hashlib.sha256(key.encode()).hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            with atomic.temporary(folder) as partial:
                partial.mkdir()
                row_plan.plan_rows(documents.sizes(), length, partial)
                partial.rename(folder)
    return row_plan.open_plan(folder)


def _pack_generated(source: str, tokenizer_name: str, length: int, bounds, options: ImageOptions):
    tokenizer, (least, below) = tokens.tokenizer(tokenizer_name), bounds
    dtype = np.min_scalar_type(max(tokenizer.vocab, options.vision.layers and options.vision.token))
    named = [(f"{source}, {name}", content) for name, content in sources.documents(source, "train")]
    found = [(name, encoding.encode(tokenizer, content, name, options)) for name, content in named]
    chosen = [(name, d) for name, d in found if least <= len(d.ids_T) < (below or math.inf)]
    if not chosen:
        _refuse_bounds(source, bounds, [len(d.ids_T) for _, d in found], len(found))
    for name, d in chosen:
        if d.images and len(d.ids_T) > length:
            _refuse_images(name, len(d.ids_T), length)
    ids, targets, images = zip(*(d for _, d in chosen))
    return packing.Packed(packing.Documents([ids_T.astype(dtype) for ids_T in ids], targets, images), length)


def _check_images(source: str, documents: reading.Documents, length: int) -> None:
    if documents.store.manifest.images is not None:
        for numbers, sizes, _ in documents.sizes():
            for number, size in zip(numbers[sizes > length], sizes[sizes > length]):
                if documents.images(number):
                    _refuse_images(f"{source}, {documents.name(number)}", size, length)


def _refuse_images(name: str, size: int, length: int):
    raise ConfigError(f"{name} has {size} tokens with its images, more than train.length={length}. A document with images is "
                      "not split: raise train.length, or limit data.lengths")


def _refuse_bounds(source: str, bounds, sizes, count: int):
    least, below = bounds
    raise ConfigError(f"data.lengths: {source!r} has no training document of at least {least:,} tokens"
                      + f" and fewer than {below:,}" * bool(below)
                      + f"; its {count:,} documents have {min(sizes):,} to {max(sizes):,}")
