"""LASP+ against the token recurrence in float64, with documents of many kinds; its exchanges, counted in the HLO."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mmx.compilers import hlo
from mmx.kernels.lightning import reference
from mmx.parallel import ring
from mmx.parallel.lightning import Kernel, bytes_per_device, lightning_attention

B, H, T, K, V = 6, 3, 64, 4, 6
LOG_DECAY_H = -np.array([0.3, 4e-8, 0], np.float32)
NAMES = ("o", "state", "dq", "dk", "dv", "dstate")
QUICK = {"xla_backend_optimization_level": 0}      # most of these tests' time is compilation


def documents():
    """Documents that cross shards, that end at their edges, with padding at both ends or of whole shards; a row of padding."""
    position = np.arange(T)
    rows = np.ones((B, T), np.int32)
    rows[0] = 1 + np.searchsorted(np.cumsum(np.arange(1, 15)), position, side="right")
    rows[1] = 2 + position // 8
    rows[2] = (position >= 19) * (1 + (position > 40)) * ((position < 24) | (position >= 40)) * (position < 55)
    rows[3] = 0
    rows[4] = (1 + position // 23) * (position % 5 != 2)
    return rows


def inputs():
    rng = np.random.default_rng(0)
    shapes = (B, H, T, K), (B, H, T, K), (B, H, T, V), (B, H, K, V), (B, H, T, V), (B, H, K, V)
    *args, do, dstate = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return args, (do, dstate)


def step(attention, args, cotangents, segments):
    out, pull = jax.vjp(lambda *args: attention(*args, segments), *args)
    return *out, *pull(cotangents)


@functools.cache
def oracle(packed):
    with jax.enable_x64(True):
        args, cotangents = jax.tree.map(lambda x: jnp.asarray(x, float), inputs())
        log_decay_H = jnp.asarray(LOG_DECAY_H, float)
        run = lambda q, k, v, state, segments: reference.lightning_attention(q, k, v, log_decay_H, segments, state)
        segments = jnp.asarray(documents() if packed else np.ones((B, T), int))
        return [np.asarray(x) for x in jax.jit(step, static_argnums=0)(run, args, cotangents, segments)]


def sharded(seq, edp=1, check_vma=True):
    """Returns `lightning_attention` for arrays that it shards: rows over edp and time over seq devices."""
    mesh = jax.make_mesh((edp, seq), ("edp", "seq"), axis_types=(AxisType.Auto,) * 2)
    tokens, state, rows = PartitionSpec("edp", None, "seq"), PartitionSpec("edp"), PartitionSpec("edp", "seq")

    def local(q, k, v, state, segments):
        return lightning_attention(q, k, v, LOG_DECAY_H, axis="seq", segments_BT=segments, state_BHKV=state)
    return jax.shard_map(local, mesh=mesh, in_specs=(tokens, tokens, tokens, state, rows), out_specs=(tokens, state),
                         check_vma=check_vma)


@pytest.mark.parametrize("seq, edp, packed, check_vma", [
    (1, 1, True, True), (2, 1, False, False), (4, 2, True, True), (8, 1, True, True), (8, 1, False, False)])
def test_equals_the_recurrence(seq, edp, packed, check_vma):
    run = jax.jit(step, static_argnums=0, compiler_options=QUICK)
    got = run(sharded(seq, edp, check_vma), *inputs(), documents() if packed else None)
    for name, x, y in zip(NAMES, got, oracle(packed)):
        error = np.linalg.norm(np.asarray(x, float) - y) / np.linalg.norm(y)
        assert error <= 1e-6, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("seq, kinds", [(4, ["all-gather"]), (8, ["collective-permute"] * 4)])
def test_exchanges(seq, kinds):
    """One exchange of states in each pass, of the size of `bytes_per_device`, and one of the documents' boundaries."""
    (q, k, v, _), (do, _) = inputs()

    def exchanged(function, *args):
        text = jax.jit(function, compiler_options=QUICK).lower(*args).compile().as_text()
        found = hlo.analyse(text, {"edp": 8 // seq, "seq": seq}).collectives
        return sorted(c.kind for c in found), sum(c.bytes for c in found)

    def outputs(q, k, v, segments=None):
        return sharded(seq, edp=8 // seq, check_vma=seq == 4)(q, k, v, None, segments)[0]
    rows = B * seq // 8
    states, boundaries = bytes_per_device(rows, H, K, V, seq, last=False), (seq - 1) * 16 * rows
    assert exchanged(outputs, q, k, v) == (kinds, states)
    gradients = lambda *args: jax.vjp(lambda *args: outputs(*args, documents()), *args)[1](do)
    assert exchanged(gradients, q, k, v) == (["all-gather", *kinds, *kinds], 2 * states + boundaries)
    with_last = exchanged(lambda q, k, v: sharded(seq)(q, k, v, None, None), q, k, v)
    assert with_last == (kinds if seq == 4 else ["all-reduce", *kinds], bytes_per_device(B, H, K, V, seq))


def test_states_are_less_than_tokens():
    """A layer of MiniMax-Text-01, a million tokens on 8 devices, bfloat16: bytes that a device receives in the forward pass."""
    tokens = dict(tokens=2 ** 17, axis_size=8, itemsize=2)
    moved = {"LASP+": bytes_per_device(1, 64, 128, 128, 8, last=False),
             "ring attention, 8 KV heads": ring.bytes_per_device(width=8 * 2 * 128, **tokens),
             "gathering k and v of 64 heads": ring.bytes_per_device(width=64 * 2 * 128, **tokens)}
    print({name: size / 1e9 for name, size in moved.items()})
    assert list(moved.values()) == [2 ** 24, 7 * 2 ** 29, 7 * 2 ** 32]


def test_a_million_tokens():
    """Two documents over 8 devices: outputs at the documents' first and last tokens and at the edges of shards; the last state.

    The tolerance is the kernel's error: its rounded decay is multiplied over 512 chunks.
    """
    T, boundary, g = 2 ** 20, 700_001, np.float32(-1e-6)
    q, k, v = (np.random.default_rng(n).standard_normal((1, 1, T, 8), np.float32) for n in range(3))
    position = np.arange(T)
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))
    tokens, rows, replicated = PartitionSpec(None, None, "seq"), PartitionSpec(None, "seq"), PartitionSpec()
    attention = functools.partial(lightning_attention, axis="seq", kernel=Kernel(chunk=256))
    run = jax.jit(jax.shard_map(
        lambda q, k, v, segments: attention(q, k, v, g[None], segments_BT=segments), mesh=mesh,
        in_specs=(tokens, tokens, tokens, rows), out_specs=(tokens, replicated)))
    o, state = map(np.asarray, run(q, k, v, 1 + (position >= boundary)[None]))

    for t in (0, T // 8 - 1, T // 8, boundary - 1, boundary, 7 * T // 8, T - 1):
        past = slice(boundary if t >= boundary else 0, t + 1)
        weight_S1 = np.exp(g.astype(float) * (t - position[past]))[:, None]
        want_KV = (k[0, 0, past] * weight_S1).T @ v[0, 0, past].astype(float)
        atol = 1e-5 * np.linalg.norm(want_KV)
        np.testing.assert_allclose(o[0, 0, t], q[0, 0, t] @ want_KV, rtol=0, atol=atol)
    np.testing.assert_allclose(state[0, 0], want_KV, rtol=0, atol=atol)
