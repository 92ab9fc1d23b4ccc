"""The GPU kernels in the interpreter against the recurrence in float64, and compiled for GPUs that need not be here.

The oracle is the float64 recurrence: the float32 one is itself off by up to 8e-6 at 300 tokens, since exp(-4e-8) is
1 - 6e-8 in float32 and the error grows with every token.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmx.compilers import ptx
from mmx.kernels.lightning import gpu, reference

TOLERANCE = {"float32": 3e-6, "bfloat16": 6e-3}
NAMES = ("o", "state", "dq", "dk", "dv", "dstate")
SLOPES = (1.0, 1e-2, 4e-8, 0.0)


def documents(T):
    """Segments of seven rows: every way in which documents and padding meet chunks and spans."""
    t = np.arange(T)
    rows = [1 + t // 16,                                                            # on chunk edges
            1 + t // 256,                                                           # on span edges
            1 + np.searchsorted(np.cumsum(t + 1), t, side="right"),                 # 1, 2, 3, ... tokens
            np.where(t < T // 3, 0, 1 + t // 100),                                  # padding at the left
            np.where(t >= T - T // 3, 0, 1),                                        # at the right
            (1 + t // 23) * (t % 5 != 2),                                           # inside documents and between
            np.zeros(T)]                                                            # nothing else
    return jnp.asarray(np.stack(rows), jnp.int32)


def inputs(B, T, K, V, dtype):
    H = len(SLOPES)
    keys = jax.random.split(jax.random.key(T * K + V), 6)
    shapes = [(B, H, T, K), (B, H, T, K), (B, H, T, V), (B, H, K, V), (B, H, T, V), (B, H, K, V)]
    q, k, v, state, do, dstate = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    q, k, v, do = (x.astype(dtype) for x in (q, k, v, do))
    return q, k, v, state.at[0].set(0), do, dstate


def oracle(q, k, v, state, do, dstate, log_decay_H, segments_BT):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, state, do, dstate, log_decay_H)]

        @jax.jit
        def run(q, k, v, state, do, dstate, log_decay_H):
            attend = lambda q, k, v, s: reference.lightning_attention(q, k, v, log_decay_H, segments_BT, s)
            out, pull = jax.vjp(attend, q, k, v, state)
            return out + pull((do, dstate))
        return [np.asarray(x) for x in run(*wide)]


def ours(q, k, v, state, do, dstate, log_decay_H, segments_BT, chunk=None):
    run = functools.partial(gpu.forward, interpret=True), functools.partial(gpu.backward, interpret=True)
    return (run[0](q, k, v, log_decay_H, segments_BT, state, chunk)
            + run[1](q, k, v, log_decay_H, segments_BT, state, do, dstate, chunk))


@pytest.mark.parametrize("T, K, V, dtype, segmented", [
    (1, 16, 32, "float32", True), (17, 16, 128, "float32", True), (128, 128, 16, "float32", False),
    (300, 16, 32, "float32", True), (300, 32, 16, "float32", False), (1024, 16, 32, "float32", True),
    (17, 128, 16, "bfloat16", False), (300, 32, 16, "bfloat16", True), (1024, 16, 32, "bfloat16", False)])
def test_against_recurrence(T, K, V, dtype, segmented):
    B = 7 if segmented else 2
    args = inputs(B, T, K, V, dtype)
    log_decay_H = -jnp.asarray(SLOPES, jnp.float32)
    segments_BT = documents(T) if segmented else None
    got = jax.jit(ours)(*args, log_decay_H, segments_BT)
    want = oracle(*args, log_decay_H, segments_BT if segmented else jnp.ones((B, T), jnp.int32))
    for name, x, y in zip(NAMES, got, want):
        x = np.asarray(x, np.float64)
        error = np.linalg.norm(x - y, axis=(2, 3)) / np.maximum(np.linalg.norm(y, axis=(2, 3)), 1e-30)
        b, h = np.unravel_index(error.argmax(), error.shape)
        assert error.max() <= TOLERANCE[dtype], f"{name}: relative error {error.max():.2e} in row {b}, slope {SLOPES[h]}"


def test_what_the_kernels_do_not_take_is_refused():
    q, _, v, state, _, _ = inputs(1, 8, 16, 16, "float32")
    run = lambda q, v, chunk: gpu.forward(q, q, v, -jnp.ones(4), None, state, chunk, interpret=True)
    with pytest.raises(NotImplementedError, match="K=12"):
        run(q[..., :12], v, None)
    with pytest.raises(NotImplementedError, match="q is float16"):
        run(q.astype("float16"), v, None)
    with pytest.raises(NotImplementedError, match="chunk=48"):
        run(q, v, 48)


needs_compiler = pytest.mark.skipif(bool(ptx.missing()), reason=ptx.missing())


def compiled(chip, H, T, K, V, dtype, segmented, chunk=None):
    """The kernels of a forward and a backward pass."""
    struct = jax.ShapeDtypeStruct
    q, v = struct((1, H, T, K), dtype), struct((1, H, T, V), dtype)
    state = struct((1, H, K, V), jnp.float32)
    segments = struct((1, T), jnp.int32) if segmented else None

    def run(q, k, v, do, log_decay_H, segments, state, dstate):
        return (gpu.forward(q, k, v, log_decay_H, segments, state, chunk),
                gpu.backward(q, k, v, log_decay_H, segments, state, do, dstate, chunk))
    return ptx.resources(run, q, q, v, v, struct((H,), jnp.float32), segments, state, state, chip=chip)


@needs_compiler
@pytest.mark.parametrize("chip", ["h100", "a100"])
@pytest.mark.parametrize("H, T, K, V, dtype, segmented", [
    (16, 8190, 64, 64, "bfloat16", True), (16, 8190, 128, 128, "bfloat16", True), (16, 8190, 256, 256, "bfloat16", True),
    (64, 1024, 128, 128, "bfloat16", False), (16, 8190, 256, 64, "bfloat16", False), (16, 8190, 128, 256, "float32", True)])
def test_resources(chip, H, T, K, V, dtype, segmented):
    kernels = compiled(chip, H, T, K, V, dtype, segmented)
    assert not ptx.faults(kernels, chip)
    assert gpu.CORES[chip] == ptx.limit(chip, "core_count")
    own = {name: kernel for name, kernel in kernels.items() if name.startswith(("contribution", "carry", "output"))}
    assert len(own) == 8        # the compiler shares the forward states between the passes
    for name, kernel in own.items():
        assert kernel.ctas >= gpu.CORES[chip], f"{name} leaves SMs idle: {kernel.ctas} CTAs"
        if dtype == "bfloat16" and not name.startswith("carry"):
            assert kernel.tensor, f"{name} uses no tensor cores"


@needs_compiler
def test_the_check_sees_a_spill():
    faults = ptx.faults(compiled("a100", 16, 8190, 128, 128, "bfloat16", True, chunk=64), "a100")
    assert any("output_kernel" in fault and "spills" in fault for fault in faults)


def products(shape):
    """A kernel that sums eight products of tiles of a shape, three pairs of them in flight."""
    def kernel(x_ref, y_ref, o_ref):
        def step(i, total):
            x, y = x_ref[i], y_ref[i]
            return total + jnp.dot(x, y.T, preferred_element_type=jnp.float32)
        o_ref[...] = jax.lax.fori_loop(0, 8, step, jnp.zeros(o_ref.shape, jnp.float32))
    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((shape[0], shape[0]), jnp.float32),
                          compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=4), name="products")
    tiles = jax.ShapeDtypeStruct((8, *shape), jnp.bfloat16)
    return call, tiles, tiles


@needs_compiler
@pytest.mark.parametrize("chip", ["h100", "a100"])
def test_too_much_shared_memory_is_refused(chip):
    call, *tiles = products((64, 64))
    assert not ptx.faults(ptx.resources(call, *tiles, chip=chip), chip)
    call, *tiles = products((128, 512))
    with pytest.raises(jax.errors.JaxRuntimeError, match="[Ss]hared memory"):
        ptx.resources(call, *tiles, chip=chip)


@needs_compiler
def test_an_illegal_tile_is_refused():
    call, *tiles = products((48, 64))
    with pytest.raises(Exception, match="power"):
        ptx.resources(call, *tiles, chip="h100")


@needs_compiler
def test_tf32_is_seen():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    call = pl.pallas_call(lambda x_ref, o_ref: o_ref.__setitem__(..., jnp.dot(x_ref[...], x_ref[...])), out_shape=x,
                          compiler_params=plgpu.CompilerParams(num_warps=4), name="rounded")
    assert ptx.faults(ptx.resources(call, x, chip="h100"), "h100")
