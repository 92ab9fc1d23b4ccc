"""Bits per byte of held-out text.

    bits per byte = sum over all targets (end of text included) of -log2 p / bytes of the raw text

Each file starts anew, from its beginning-of-text token.
"""
import functools
import math

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm.auto import tqdm

from mmx.data import packing, tokens
from mmx.model import Model
from mmx.training.loss import cross_entropy


def make_evaluator(model: Model, tokenizer, *, length: int, batch: int, context: int, loss_chunk: int, sharding=None):
    """A function (params, [(name, raw bytes)], limit) -> {name: bits per byte, ..., "all": ...}, jitted once.

    Rows of `length` tokens, of which the first `context` only serve as context; `limit` bytes at most (0: all). Logits of
    `loss_chunk` tokens exist at a time. `sharding` cuts a batch over a mesh, of which each process gives all of it.
    """
    whole = sharding and NamedSharding(sharding.mesh, P())

    @functools.partial(jax.jit, out_shardings=whole)
    def nats_B(params, row):
        x_BTD, _, _ = model.apply({"params": params}, row["tokens"], row["segments"], row["positions"])
        return cross_entropy(x_BTD, params["head_WD"], row["targets"], row["weights"], loss_chunk)

    def evaluate(params, documents, limit: int = 0, progress: bool = False) -> dict[str, float]:
        documents = head(documents, limit)
        encoded = [tokens.document(tokenizer, raw, name) for name, raw in documents]
        rows = packing.batches(encoded, length, batch, context)
        count = sum(len(range(0, max(len(d) - 1 - context, 1), length - context)) for d in encoded)
        nats, waiting = np.zeros(len(documents)), []
        for document_B, row in tqdm(rows, "bits per byte", -(-count // batch), unit="batch", disable=not progress):
            if sharding:
                row = {k: jax.make_array_from_process_local_data(sharding, x, x.shape) for k, x in row.items()}
            waiting.append((document_B, nats_B(params, row)))
        for document_B, value_B in waiting:
            np.add.at(nats, document_B, jax.device_get(value_B))
        sizes = np.array([len(raw) for _, raw in documents])
        each = {name: float(n / math.log(2) / s) for (name, _), n, s in zip(documents, nats, sizes)}
        return each | {"all": float(nats.sum() / math.log(2) / sizes.sum())}

    return evaluate


def bytes_per_token(tokenizer, documents) -> float:
    """Of held-out text (1 for bytes but for the special tokens, which count for nothing; 1 where all documents are ids)."""
    count = sum(len(tokenizer.encode(raw, name)) for name, raw in documents)
    return sum(len(raw) for _, raw in documents) / count if count else 1.0


def head(documents, limit: int):
    """The first documents up to `limit` bytes (0: all), the last one cut where a character begins."""
    kept, left = [], limit or math.inf
    for name, raw in documents:
        size = min(left, len(raw))
        if size < len(raw):     # UTF-8 goes on for three bytes at most; other text is cut anywhere
            size = next((n for n in range(size, max(size - 4, 0), -1) if raw[n] & 0xC0 != 0x80), size)
        if size:
            kept.append((name, raw[:size]))
        left -= size
        if size < len(raw):
            break
    return kept
