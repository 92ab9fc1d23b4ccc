"""Bits per byte against a direct computation on logits, and the baselines against direct calls."""
import gzip
import lzma

import jax
import numpy as np
import pytest

from mmx import config
from mmx.data import tokens
from mmx.evals import compression
from mmx.model import Model, logits

MODEL = Model(config.Model(dim=16, layers=2, pattern="LS", heads=2, kv_heads=1, head_dim=8, rotary_dim=4, experts=4,
                           expert_dim=16, init="fan_in", embed_std=1.0))
TEXT = "Fellow citizens, the état of the Union is strong. ".encode()
DOCUMENTS = [("a", TEXT), ("b", TEXT[:7]), ("c", b"\xff\x00\x80" * 9)]


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]


@jax.jit
def logp_TW(params, window_T):
    return jax.nn.log_softmax(logits(params, MODEL.apply({"params": params}, window_T[None])[0])[0])


def direct(params, raw, length, context):
    """A document's windows one by one, after the first of which `context` tokens only serve as context."""
    ids, nats, start = np.array([256, *raw, 257]), 0.0, 0
    while not start or start + context < len(ids) - 1:
        window, targets = ids[start:start + length], ids[start + 1:start + length + 1]
        logps = np.array(logp_TW(params, np.pad(window, (0, length - len(window)))))   # causal: what follows is no matter
        first = context if start else 0
        nats -= logps[np.arange(first, len(targets)), targets[first:]].sum()
        start += length - context
    return nats / np.log(2) / len(raw)


@pytest.mark.parametrize("length,context,batch", [(64, 0, 2), (16, 0, 3), (16, 8, 2), (12, 11, 4)])
def test_bits_per_byte_are_those_of_the_logits(params, length, context, batch):
    evaluate = compression.make_evaluator(MODEL, tokens.tokenizer("bytes"), length=length, batch=batch, context=context)
    found = evaluate(params, DOCUMENTS)
    for name, raw in DOCUMENTS:
        assert found[name] == pytest.approx(direct(params, raw, length, context), rel=1e-5)
    sizes = [len(raw) for _, raw in DOCUMENTS]
    assert found["all"] == pytest.approx(np.average([found[name] for name, _ in DOCUMENTS], weights=sizes))


def test_limit_reads_the_first_bytes(params):
    evaluate = compression.make_evaluator(MODEL, tokens.tokenizer("bytes"), length=16, batch=4, context=8)
    assert evaluate(params, DOCUMENTS, 20) == evaluate(params, [("a", TEXT[:20])])
    assert evaluate(params, DOCUMENTS, 10**6) == evaluate(params, DOCUMENTS) == evaluate(params, DOCUMENTS, 0)


def test_head_cuts_where_a_character_begins():
    def head(limit):
        return compression.head([("a", "aé€😀".encode()), ("b", b"xyz")], limit)
    whole = "aé€😀".encode()
    kept = [b"a", b"a", whole[:3], whole[:3], whole[:3], whole[:6], whole[:6], whole[:6], whole[:6], whole]
    assert [head(limit) for limit in range(1, 11)] == [[("a", raw)] for raw in kept]
    assert head(12) == [("a", whole), ("b", b"xy")] and head(13) == head(0) == head(99) == [("a", whole), ("b", b"xyz")]
    assert compression.head([("c", b"\x80" * 9)], 5) == [("c", b"\x80" * 5)]      # no UTF-8: cut anywhere


def test_baselines_pack_each_file_alone():
    a, b = TEXT * 20, bytes(range(256))
    found = compression.baselines([("a", a), ("b", b)])
    size = len(a) + len(b)
    assert found["gzip"] == 8 * (len(gzip.compress(a, 9, mtime=0)) + len(gzip.compress(b, 9, mtime=0))) / size
    assert found["xz"] == 8 * sum(len(lzma.compress(x, preset=9 | lzma.PRESET_EXTREME)) for x in (a, b)) / size
    assert found["gzip"] != 8 * len(gzip.compress(a + b, 9, mtime=0)) / size
