"""Tests the decode step: every implementation against one step of the recurrence, idle rows, and compiled kernels."""
import functools
import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from mmx import config
from mmx.compilers import ptx
from mmx.kernels import platform
from mmx.kernels.lightning import decode as decoding
from mmx.kernels.lightning import reference
from mmx.kernels.lightning.decode import decode
from mmx.layers.common import rms_norm
from mmx.model import Model, empty_cache

TOLERANCE = {"float32": 3e-6, "bfloat16": 6e-3}
EPS = 1e-6
QUICK = {"xla_backend_optimization_level": 0}      # most of the time of these tests is compilation
H, K, V = 4, 16, 32
LOG_DECAY_H = -np.asarray([1.0, 1e-2, 4e-8, 0.0], np.float32)
LIVE = {"first": "10000", "last": "00001", "middle": "01011", "ends": "10001", "gap": "01100", "none": "00000",
        "all": "11111", "one": "1", "not one": "0"}


def inputs(B, dtype):
    """Returns (q, k, v, gate, norm) and the state, as numpy arrays so that nothing is compiled."""
    rng = np.random.default_rng(B)
    shapes = (B, H, K), (B, H, K), (B, H, V), (B, H, V), (H, V)
    return [rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for shape in shapes], \
        rng.standard_normal((B, H, K, V), np.float32)


@functools.partial(jax.jit, static_argnames=("impl", "interpret"))
def run(arrays, state_BHKV, live_B=None, impl="xla", interpret=True):
    return decode(*arrays, LOG_DECAY_H, state_BHKV, live_B, eps=EPS, impl=impl, interpret=interpret)


@jax.jit
def layer(arrays, state_BHKV):
    """Computes the step in float32 from its parts: SiLU, the recurrence, norm and gate."""
    q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV = (x.astype(jnp.float32) for x in arrays)
    B = len(q_BHK)
    tokens = (jax.nn.silu(x)[:, :, None] for x in (q_BHK, k_BHK, v_BHV))
    o_BHTV, state_BHKV = reference.lightning_attention(*tokens, LOG_DECAY_H, jnp.ones((B, 1), jnp.int32), state_BHKV)
    o_normed = rms_norm(o_BHTV.reshape(B, H * V), norm_HV.reshape(H * V), EPS)
    return jax.nn.sigmoid(gate_BHV) * o_normed.reshape(B, H, V), state_BHKV


def assert_close(got, want, dtype="float32"):
    """Compares y with the tolerance of its dtype, and the state with the tolerance of float32."""
    assert got[0].dtype == dtype
    for name, x, y, tolerance in zip(("y", "state"), got, want, (TOLERANCE[dtype], TOLERANCE["float32"])):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("impl", decoding.IMPLS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("B", [1, 5])
def test_equals_the_recurrence(B, dtype, impl):
    arrays, state_BHKV = inputs(B, dtype)
    got = run(arrays, state_BHKV, impl=impl)
    assert_close(got, layer(arrays, state_BHKV), dtype)
    assert_close(got, run(arrays, state_BHKV), dtype)


@pytest.mark.parametrize("impl", decoding.IMPLS)
@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE)
def test_idle_rows_keep_their_state_and_give_zero(live, impl):
    """NaN in the inputs of idle rows does not reach other rows."""
    live_B = np.array([c == "1" for c in live])
    arrays, state_BHKV = inputs(len(live), "float32")
    want = layer(arrays, state_BHKV)
    for x in arrays[:4]:
        x[~live_B] = np.nan
    y_BHV, new_BHKV = map(np.asarray, run(arrays, state_BHKV, live_B, impl=impl))
    np.testing.assert_array_equal(new_BHKV[~live_B], state_BHKV[~live_B])
    np.testing.assert_array_equal(y_BHV[~live_B], 0)
    if live_B.any():
        assert_close((y_BHV[live_B], new_BHKV[live_B]), [np.asarray(x)[live_B] for x in want])


def test_idle_rows_move_no_state_on_tpu():
    """The pipeline copies a block when its index changes: only blocks of live rows, or one block if a core has no live row."""
    cores, rows, parts = 2, 4, 3
    patterns = (np.arange(1 << cores * rows)[:, None] >> np.arange(cores * rows)) % 2 > 0
    places = np.asarray(jax.jit(jax.vmap(functools.partial(decoding._first_blocks, cores=cores, parts=parts)))(patterns))
    for live_B, place_B in zip(patterns, places):
        steps = (place_B[:, None] + live_B[:, None] * np.arange(parts)).reshape(cores, rows * parts)
        for core, live in zip(steps, live_B.reshape(cores, rows)):
            copied = core[np.append(True, np.diff(core) != 0)]
            assert len(copied) == max(parts * live.sum(), 1) == len(set(copied)), live_B
            assert not live.any() or set(copied // parts) == set(np.flatnonzero(live) + core[0] // parts // rows * rows)


@pytest.mark.parametrize("live", ["00110", "10010", "00000"])
def test_no_races_and_nothing_uninitialized(live):
    arrays, state_BHKV = inputs(len(live), "float32")
    live_B = np.array([c == "1" for c in live])
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    got = jax.block_until_ready(run(arrays, state_BHKV, live_B, impl="tpu", interpret=interpret))
    assert not interpret_pallas_call.races.races_found
    for x, y in zip(got, run(arrays, state_BHKV, live_B)):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def prefilled():
    """Returns a model's apply function, tokens, the cache after four of them, and the hidden states of the whole rows."""
    c = config.Model(vocab=16, dim=16, layers=1, pattern="L", heads=2, head_dim=16, experts=1, top_k=1, expert_dim=16, chunk=4)
    tokens_BT = np.random.default_rng(0).integers(0, c.vocab, (3, 7)).astype(np.int32)
    params = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).standard_normal(x.shape, np.float32)),
                          jax.eval_shape(Model(c).init, jax.random.key(0), tokens_BT)["params"])
    apply = functools.partial(Model(c).apply, {"params": params})
    whole_BTD = jax.jit(apply, compiler_options=QUICK)(tokens_BT)[0]
    cache = jax.jit(lambda cache: apply(tokens_BT[:, :4], cache=cache)[1], compiler_options=QUICK)(empty_cache(c, 3, 8))
    return apply, tokens_BT, cache, whole_BTD


@pytest.mark.parametrize("impl", decoding.IMPLS)
def test_prefill_and_decode_equal_forward(impl, prefilled, monkeypatch):
    """Each implementation in a model; some rows are idle in some steps."""
    apply, tokens_BT, cache, whole_BTD = prefilled
    monkeypatch.setattr(decoding, "decode", lambda *args, **how: decode(*args, **how | {"impl": impl, "interpret": True}))
    step = jax.jit(lambda token_BT, live_BT, cache: apply(token_BT, live_BT, cache=cache)[:2], compiler_options=QUICK)
    at_B = np.full(3, 4)
    for live_B in np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1]], np.int32):
        x_BTD, cache = step(tokens_BT[np.arange(3), at_B][:, None], live_B[:, None], cache)
        for b in np.flatnonzero(live_B):
            np.testing.assert_allclose(x_BTD[b, 0], whole_BTD[b, at_B[b]], atol=1e-5)
        at_B += live_B
        assert cache["length_B"].tolist() == at_B.tolist()


def test_errors_say_what_would_work():
    arrays, state_BHKV = inputs(2, "float32")
    step = functools.partial(decode, eps=EPS)
    with pytest.raises(ValueError, match="gate_BHV has V=16"):
        step(*arrays[:3], arrays[3][..., :16], arrays[4], LOG_DECAY_H, state_BHKV)
    with pytest.raises(ValueError, match="v_BHV is bfloat16"):
        step(*arrays[:2], arrays[2].astype(jnp.bfloat16), *arrays[3:], LOG_DECAY_H, state_BHKV)
    with pytest.raises(ValueError, match="state_BHKV is bfloat16.*must be float32"):
        step(*arrays, LOG_DECAY_H, state_BHKV.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="must not be positive"):
        step(*arrays, -LOG_DECAY_H, state_BHKV)
    with pytest.raises(ValueError, match="live_B is int32; it must be bool"):
        step(*arrays, LOG_DECAY_H, state_BHKV, np.ones(2, np.int32))
    with pytest.raises(NotImplementedError, match="impl='cuda'"):
        step(*arrays, LOG_DECAY_H, state_BHKV, impl="cuda")
    for impl in "tpu", "gpu":
        with pytest.raises(NotImplementedError, match=f"impl='{impl}': this computation is for cpu; use impl='xla' or None"):
            step(*arrays, LOG_DECAY_H, state_BHKV, impl=impl)
    with pytest.raises(NotImplementedError, match="K=12"):
        short = [x[..., :12] for x in arrays[:2]]
        step(*short, *arrays[2:], LOG_DECAY_H, state_BHKV[:, :, :12], impl="gpu", interpret=True)
    for dtype in ("float16", "int32"):
        with pytest.raises(ValueError, match=f"q_BHK is {dtype}; it must be float32"):
            step(*(x.astype(dtype) for x in arrays), LOG_DECAY_H, state_BHKV)
    for impl in "tpu", "gpu":
        with pytest.raises(NotImplementedError, match=f"impl='{impl}': the kernels of the decode step have no gradients"):
            jax.eval_shape(jax.grad(lambda q: run([q, *arrays[1:]], state_BHKV, impl=impl)[0].sum()), arrays[0])


@pytest.mark.parametrize("capability, supported", [("7.5", False), ("8.0", True), ("12.1", True), ("gfx90a", False)])
def test_which_gpus_are_supported(capability, supported, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu", compute_capability=capability)])
    assert platform.gpu_refusal() == ("" if supported else f"this GPU has compute capability {capability}; the kernels need an "
                                                       "NVIDIA GPU with 8.0 (A100) or newer")


def test_unsupported_gpu_gives_a_warning_and_uses_xla(monkeypatch):
    arrays, state_BHKV = inputs(1, "float32")
    monkeypatch.setattr(platform, "name", lambda: "gpu")
    monkeypatch.setattr(platform, "gpu_refusal", lambda: "this GPU is old")
    with pytest.warns(UserWarning, match="the decode step runs as plain XLA: this GPU is old"):
        jax.eval_shape(functools.partial(decode, eps=EPS), *arrays, LOG_DECAY_H, state_BHKV)


def structs(B, H, K, V, dtype, sharding=None):
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    q, v, f32 = array((B, H, K), dtype), array((B, H, V), dtype), jnp.float32
    return q, q, v, v, array((H, V), dtype), array((H,), f32), array((B, H, K, V), f32), array((B,), bool)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_on_tpu(chip, dtype, monkeypatch):
    """The program consists of one kernel, updates the state in place, and moves hardly more than the states."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), "x")
    args = structs(64, 64, 128, 128, dtype, jax.NamedSharding(mesh, jax.P()))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(functools.partial(decode, eps=EPS), donate_argnums=6).lower(*args).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    memory, state = compiled.memory_analysis(), 4 * 64 * 64 * 128 * 128
    assert memory.alias_size_in_bytes == state
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
    assert moved <= 1.1 * 2 * state


@pytest.mark.parametrize("chip", ["h100", "a100"])
@pytest.mark.parametrize("B, K, V, dtype", [(1, 128, 128, "bfloat16"), (64, 128, 128, "bfloat16"), (64, 256, 256, "float32")])
def test_resources_on_gpu(chip, B, K, V, dtype):
    if ptx.missing():
        pytest.skip(ptx.missing())
    kernels = ptx.resources(functools.partial(decode, eps=EPS), *structs(B, 64, K, V, dtype), chip=chip)
    assert not ptx.faults(kernels, chip)
    assert kernels["lightning_decode"].ctas >= ptx.limit(chip, "core_count")
