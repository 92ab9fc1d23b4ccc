"""Bits per byte of held-out text.

    bits per byte = (sum over all targets of -log2 p) / (bytes of the raw text)

The targets include the end-of-text token. Each document starts a new row, with its beginning-of-text token.
"""
import functools
import math

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmx.data import packing, tokens
from mmx.files import output
from mmx.model import Model
from mmx.training.loss import cross_entropy


def make_evaluator(model: Model, tokenizer, *, length: int, batch: int, overlap: int, loss_chunk: int, sharding=None):
    """Makes a function (params, documents, limit) -> {name: bits per byte, ..., "all": bits per byte of all documents}.

    `documents` is a list of (name, raw bytes). The function reads only their first `limit` bytes, counted over all documents
    (0: all). It compiles the model once.

    Args:
      length: tokens in a row.
      batch: rows in a batch.
      overlap: each row of a document after the first starts with the last `overlap` tokens of the row before. These tokens are
        not scored again.
      loss_chunk: number of tokens whose logits are in memory at the same time.
      sharding: the sharding of a batch on a mesh, or None. Every process passes the whole batch.
    """
    replicated = sharding and NamedSharding(sharding.mesh, P())

    @functools.partial(jax.jit, out_shardings=replicated)
    def nats_B(params, arrays):
        x_BTD, _, _ = model.apply({"params": params}, arrays["tokens"], arrays["segments"], arrays["positions"])
        return cross_entropy(x_BTD, params["head_WD"], arrays["targets"], arrays["weights"], loss_chunk)

    def evaluate(params, documents, limit: int = 0, progress: bool = False) -> dict[str, float]:
        documents = first_bytes(documents, limit)
        encoded = [tokens.document(tokenizer, raw, name) for name, raw in documents]
        batches = packing.batches(encoded, length, batch, overlap)
        row_count = sum(len(range(0, max(len(d) - 1 - overlap, 1), length - overlap)) for d in encoded)     # as in packing.rows
        nats, pending = np.zeros(len(documents)), []
        bar = output.bar(batches, "bits per byte", -(-row_count // batch), unit="batch", disable=not progress)
        for document_B, arrays in bar:
            if sharding:
                arrays = {k: jax.make_array_from_process_local_data(sharding, x, x.shape) for k, x in arrays.items()}
            pending.append((document_B, nats_B(params, arrays)))
        for document_B, value_B in pending:     # document_B: index of each row's document
            np.add.at(nats, document_B, jax.device_get(value_B))
        sizes = np.array([len(raw) for _, raw in documents])
        bits = {name: float(n / math.log(2) / s) for (name, _), n, s in zip(documents, nats, sizes)}
        return bits | {"all": float(nats.sum() / math.log(2) / sizes.sum())}

    return evaluate


def bytes_per_token(tokenizer, documents) -> float:
    """The mean number of bytes per token, without special tokens; 1 if there is no text."""
    count = sum(len(tokenizer.encode(raw, name)) for name, raw in documents)
    return sum(len(raw) for _, raw in documents) / count if count else 1.0


def first_bytes(documents, limit: int):
    """The first documents, `limit` bytes in all (0: no limit). The last one is cut between two UTF-8 characters."""
    chosen, remaining = [], limit or math.inf
    for name, raw in documents:
        size = min(remaining, len(raw))
        if size < len(raw):
            # A UTF-8 character has up to 3 continuation bytes (10xxxxxx). After 4 of them, it is not UTF-8: cut at `size`.
            size = next((n for n in range(size, max(size - 4, 0), -1) if raw[n] & 0xC0 != 0x80), size)
        if size:
            chosen.append((name, raw[:size]))
        remaining -= size
        if size < len(raw):
            break
    return chosen
