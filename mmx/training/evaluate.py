"""The loss on held-out documents. It covers the targets that training would learn from these documents.

    loss = (sum over all targets of -ln p) / (number of targets)
    bits per byte = (sum over the targets of texts of -log2 p) / (bytes of the learned text)

The targets of a text include the end-of-text token. Of a prompt and its completion, only the completion counts, in both
formulas. Documents of token ids have no bytes and count only for the loss. Each document starts a new row.
"""
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmx.config import ConfigError
from mmx.data import encoding, packing
from mmx.data.document_types import TokenIds
from mmx.files import output
from mmx.model import Model
from mmx.training.loss import cross_entropy

NO_TARGETS = "the held-out documents have no targets, so they have no loss: each target is -1"


class HeldOut(NamedTuple):
    """The loss on held-out documents."""
    loss: float                     # nats per target
    bits_per_byte: float | None     # None if no document has learned text
    targets: int
    bytes: int                      # of learned text
    documents: int
    by_document: dict[str, float]   # bits per byte of each document with learned text


def make_evaluator(model: Model, tokenizer, *, length: int, batch: int, overlap: int, loss_chunk: int, sharding=None):
    """Makes a function (params, documents, limit) -> HeldOut. It compiles the model once.

    `documents` is a list of (name, content) as `held_out.validation` returns it. The function scores only their first `limit`
    bytes, as `first_bytes` counts them (0: all).

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

    def evaluate(params, documents, limit: int = 0, progress: bool = False) -> HeldOut:
        documents = first_bytes(documents, limit)
        encoded = [encoding.encode(tokenizer, content, name)[:2] for name, content in documents]
        targets = sum(map(_count_targets, encoded))
        if not targets:
            raise ConfigError(NO_TARGETS)
        row_count = sum(len(packing.row_starts(ids_T, length, overlap, targets_T)) for ids_T, targets_T in encoded)
        batches = packing.batches(encoded, length, batch, overlap)
        nats, pending = np.zeros(len(documents)), []
        bar = output.bar(batches, "held-out loss", -(-row_count // batch), unit="batch", disable=not progress)
        for document_B, arrays in bar:
            if sharding:
                arrays = {k: jax.make_array_from_process_local_data(sharding, x, x.shape) for k, x in arrays.items()}
            pending.append((document_B, nats_B(params, arrays)))
        for document_B, value_B in pending:     # document_B: index of each row's document
            np.add.at(nats, document_B, jax.device_get(value_B))
        sizes = np.array([len(encoding.learned_text(content)) for _, content in documents])
        bits = nats / math.log(2)
        return HeldOut(float(nats.sum() / targets),
                       float(bits[sizes > 0].sum() / sizes.sum()) if sizes.any() else None, targets, int(sizes.sum()),
                       len(documents), {name: float(n / s) for (name, _), n, s in zip(documents, bits, sizes) if s})

    return evaluate


def _count_targets(encoded) -> int:
    ids_T, targets_T = encoded
    return len(ids_T) - 1 if targets_T is None else int((targets_T >= 0).sum())


def has_targets(tokenizer, documents) -> bool:
    """Whether a document has a target."""
    return any(_count_targets(encoding.encode(tokenizer, content, name)[:2]) for name, content in documents)


def bytes_per_token(tokenizer, documents) -> float:
    """The mean number of bytes per token of the learned text, without special tokens; 1 if there is no text."""
    texts = [(name, content) for name, content in documents if encoding.learned_text(content)]
    count = sum(_count_targets(encoding.encode(tokenizer, content, name)[:2]) - 1 for name, content in texts)      # without eos
    return sum(len(encoding.learned_text(content)) for _, content in texts) / count if count else 1.0


def first_bytes(documents, limit: int):
    """The first documents, `limit` bytes in all (0: no limit). A text is cut between two UTF-8 characters.

    Other documents are not cut. A prompt counts with its completion, and a token id counts as one byte.
    """
    chosen, remaining = [], limit or math.inf
    for name, content in documents:
        size = _size(content)
        if isinstance(content, bytes) and size > remaining:
            content, size = content[:_cut(content, int(remaining))], math.inf
        if content:
            chosen.append((name, content))
        remaining -= size
        if remaining <= 0:
            break
    return chosen


def _size(content) -> int:
    if isinstance(content, bytes):
        return len(content)
    return len(content.tokens_T) if isinstance(content, TokenIds) else sum(map(len, content))


def _cut(raw: bytes, most: int) -> int:
    """The largest size up to `most` at which a character ends. Bytes that are not UTF-8 are cut at `most`."""
    # a UTF-8 character has at most 3 continuation bytes
    return next((n for n in range(most, max(most - 4, 0), -1) if raw[n] & 0xC0 != 0x80), most)
