"""Bits per byte of held-out text, beside what gzip and xz make of the same files.

    bits per byte = sum over all targets (end of text included) of -log2 p / bytes of the raw text

Each file starts anew, from its beginning-of-text token: no file helps another, as none helps gzip or xz.
"""
import gzip
import lzma
import math

import jax
import numpy as np
from tqdm.auto import tqdm

from mmx.data import packing, tokens
from mmx.loss import cross_entropy
from mmx.model import Model


def make_evaluator(model: Model, tokenizer, *, length: int, batch: int, context: int, sharding=None):
    """A function (params, [(name, raw bytes)], limit) -> {name: bits per byte, ..., "all": ...}, jitted once.

    Rows of `length` tokens, of which the first `context` only serve as context; `limit` bytes at most (0: all).
    """
    @jax.jit
    def nats_B(params, row):
        x_BTD, _, _ = model.apply({"params": params}, row["tokens"], row["segments"], row["positions"])
        per_row = jax.vmap(lambda x, t, w: cross_entropy(x[None], params["head_WD"], t[None], w[None], length))
        return per_row(x_BTD, row["targets"], row["weights"])

    def evaluate(params, documents, limit: int = 0, progress: bool = False) -> dict[str, float]:
        documents = _head(documents, limit)
        encoded = [tokens.document(tokenizer, raw, name) for name, raw in documents]
        rows = packing.batches(encoded, length, batch, context)
        count = sum(len(range(0, max(len(d) - 1 - context, 1), length - context)) for d in encoded)
        nats, waiting = np.zeros(len(documents)), []
        for document_B, row in tqdm(rows, "bits per byte", -(-count // batch), unit="batch", disable=not progress):
            waiting.append((document_B, nats_B(params, jax.device_put(row, sharding))))
        for document_B, value_B in waiting:
            np.add.at(nats, document_B, jax.device_get(value_B))
        sizes = np.array([len(raw) for _, raw in documents])
        each = {name: float(n / math.log(2) / s) for (name, _), n, s in zip(documents, nats, sizes)}
        return each | {"all": float(nats.sum() / math.log(2) / sizes.sum())}

    return evaluate


def baselines(documents) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9e, each file alone."""
    size = sum(len(raw) for _, raw in documents)
    pack = {"gzip": lambda raw: gzip.compress(raw, 9, mtime=0),
            "xz": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * sum(len(f(raw)) for _, raw in documents) / size for name, f in pack.items()}


def _head(documents, limit):
    """The first documents, the last of them cut, up to `limit` bytes."""
    kept, left = [], limit or math.inf
    for name, raw in documents:
        if left > 0:
            kept.append((name, raw[:int(min(left, len(raw)))]))
            left -= len(raw)
    return kept
