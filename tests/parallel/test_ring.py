"""Ring attention against the full score matrix, with documents of many kinds; its products and its exchanges, counted."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mmx.compilers import hlo
from mmx.kernels.attention import reference
from mmx.parallel import ring

B, H, G, T, K, V = 4, 4, 2, 64, 4, 6
NAMES = ("o", "dq", "dk", "dv")
TOLERANCE = {"float32": 1e-6, "bfloat16": 6e-3}
QUICK = {"xla_backend_optimization_level": 0}      # most of these tests' time is compilation


def documents():
    """Documents that cross shards, that end at their edges, with padding at both ends or of whole shards; a row of padding."""
    position = np.arange(T)
    rows = np.zeros((B, T), np.int32)
    rows[0] = 1 + np.searchsorted(np.cumsum(np.arange(1, 15)), position, side="right")
    rows[1] = 2 + position // 8
    rows[2] = (position >= 19) * (1 + (position > 40)) * ((position < 24) | (position >= 40)) * (position < 55)
    return rows


def inputs(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (B, H, T, K), (B, G, T, K), (B, G, T, V), (B, H, T, V)
    return [rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def step(attention, q, k, v, do, segments):
    o, pull = jax.vjp(lambda *args: attention(*args, segments), q, k, v)
    return o, *pull(do)


def sharded(seq, edp=1, check_vma=True, balanced=False):
    """Returns `softmax_attention` for arrays that it shards: rows over edp, time over seq, by `zigzag` if balanced."""
    mesh = jax.make_mesh((edp, seq), ("edp", "seq"), axis_types=(AxisType.Auto,) * 2)
    tokens, rows = PartitionSpec("edp", None, "seq"), PartitionSpec("edp", "seq")
    local = lambda q, k, v, segments: ring.softmax_attention(q, k, v, axis="seq", segments_BT=segments, balanced=balanced)
    run = jax.shard_map(local, mesh=mesh, in_specs=(tokens, tokens, tokens, rows), out_specs=tokens, check_vma=check_vma)
    if not balanced:
        return run
    order, back = ring.zigzag(T, seq), ring.unzigzag(T, seq)
    return lambda q, k, v, segments: run(q[:, :, order], k[:, :, order], v[:, :, order],
                                         None if segments is None else segments[:, order])[:, :, back]


@functools.cache
def oracle(packed):
    segments = documents() if packed else np.ones((B, T), np.int32)
    return step(lambda q, k, v, segments: reference.attention(q, k, v, segments, segments), *inputs(), segments)


def assert_close(got, want, dtype="float32"):
    for name, x, y in zip(NAMES, got, want):
        error = np.linalg.norm(np.asarray(x, float) - y) / np.linalg.norm(y)
        assert x.dtype == dtype and error <= TOLERANCE[dtype], f"{name}: {x.dtype}, relative error {error:.2e}"


@pytest.mark.parametrize("seq, edp, balanced, check_vma, dtype", [
    (1, 1, True, True, "float32"), (2, 2, False, True, "float32"), (2, 1, True, True, "bfloat16"),
    (4, 1, True, False, "float32"), (8, 1, False, True, "float32")])
def test_equals_the_full_matrix(seq, edp, balanced, check_vma, dtype):
    got = step(sharded(seq, edp, check_vma, balanced), *inputs(dtype), documents())
    assert_close(got, oracle(packed=True), dtype)


@pytest.mark.parametrize("balanced, packed, squares", [
    (False, False, [0.5, 1.5, 2.5, 3.5]), (True, False, [2, 2, 2, 2]), (False, True, [0.5, 0.5, 1.5, 0.5])])
def test_number_of_products(monkeypatch, balanced, packed, squares):
    """Scores that each of 4 devices computes in the forward and in the backward pass, in squares of its number of tokens."""
    pairs = np.zeros((2, 4))

    def counted(function, which, shapes):
        def count(*args, **kwargs):
            t, s, full = shapes(*args, **kwargs)
            jax.debug.callback(lambda x: np.add.at(pairs, (which, x), t * s if full else t * s / 2), jax.lax.axis_index("seq"))
            return function(*args, **kwargs)
        return count
    forward = lambda q, k, v, start_B=None, **_: (q.shape[2], k.shape[2], start_B is not None)
    backward = lambda queries, keys, window, saved, _: (saved[0].shape[2], saved[1].shape[2], saved[5] is not None)
    monkeypatch.setattr(ring, "attention", counted(ring.attention, 0, forward))
    monkeypatch.setattr(ring.xla, "backward", counted(ring.xla.backward, 1, backward))
    # the second document crosses an edge between devices, the others end at one
    segments = np.repeat([[1, 2, 3]], [16, 32, 16], axis=1).repeat(B, 0) if packed else None
    got = jax.block_until_ready(step(sharded(4, balanced=balanced), *inputs(), segments))
    jax.effects_barrier()
    np.testing.assert_allclose(pairs / (T // 4) ** 2, [squares, squares])
    if not packed:
        assert_close(got, oracle(packed=False))


def test_bytes_and_memory():
    """The exchanges have the size of `bytes_per_device`. No step saves anything, so memory is a few local arrays."""
    seq, T = 8, 8192
    sizes = dict(tokens=T // seq, width=64 + 64, axis_size=seq, documents=True)
    array = jax.ShapeDtypeStruct((1, 1, T, 64), jnp.float32)
    compiled = step.lower(sharded(seq), *[array] * 4, jax.ShapeDtypeStruct((1, T), jnp.int32)).compile()
    found = hlo.analyse(compiled.as_text(), {"seq": seq}).collectives
    assert {c.kind for c in found} == {"collective-permute"}
    passes = ring.bytes_per_device(**sizes), ring.bytes_per_device(**sizes, backward=True)
    want = sum(passes) - passes[0] // (seq - 1)         # both passes share the first step's exchange
    assert sum(c.bytes * c.times for c in found) == want
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * (T // seq) * 64 * 4      # 28 more if all steps saved keys


def test_scan_over_layers_saves_no_step():
    """A scan over layers may precompute for all steps what depends on documents, but no array of the queries' size."""
    layers, steps = 3, 8 - 2        # of the loop: without the first exchange and the last keys
    run = sharded(8, balanced=True)

    def loss(q, segments):
        return jax.lax.scan(lambda q, _: (run(q, q[:, :G], q[:, G:], segments), None), q, length=layers)[0].sum()
    program = str(jax.make_jaxpr(jax.grad(loss))(inputs()[0], documents()))
    assert f"i32[{steps},{B}," in program and f"f32[{steps},{B}," not in program


def test_zigzag():
    np.testing.assert_array_equal(ring.zigzag(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])
    np.testing.assert_array_equal(ring.unzigzag(8, 2), [0, 1, 4, 5, 6, 7, 2, 3])
    for seq in (1, 3, 8):
        position = jnp.arange(6 * seq)[None]
        rows = dict(mesh=jax.make_mesh((seq,), ("seq",), axis_types=(AxisType.Auto,)), in_specs=PartitionSpec(None, "seq"),
                    out_specs=PartitionSpec(None, "seq"))
        reordered = jax.jit(jax.shard_map(lambda x: ring.to_zigzag(x, "seq", time=1), **rows))(position)
        np.testing.assert_array_equal(reordered[0], ring.zigzag(6 * seq, seq))
        back = jax.jit(jax.shard_map(lambda x: ring.from_zigzag(x, "seq", time=1), **rows))(reordered)
        np.testing.assert_array_equal(back, position)
    with pytest.raises(ValueError, match="T=10 must be divisible by the number of blocks, 2 x 2"):
        ring.zigzag(10, 2)
    q = np.zeros((1, 1, 3, 4))
    with pytest.raises(ValueError, match="balanced=True needs an even number"):
        ring.softmax_attention(q, q, q, axis="seq", balanced=True)
