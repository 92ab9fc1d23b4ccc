"""Runs the GPU kernels on a GPU, not interpreted, and compares them with the oracles of their other tests.

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels/test_on_gpu.py
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lightning_cases import assert_close, case
from test_attention import assert_close as assert_attention_close
from test_attention import inputs, segments
from test_attention import values_and_gradients as attention_gradients
from test_attention_library import with_zero_lse
from test_lightning import values_and_gradients
from test_lightning_decode import assert_close as assert_step_close
from test_lightning_decode import inputs as step_inputs
from test_lightning_decode import layer, run

from mmx import config
from mmx.kernels import grouped
from mmx.kernels.attention import reference, softmax_attention
from mmx.model import Model
from mmx.training.loss import loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")]


@pytest.fixture(autouse=True)
def ieee():
    """Computes float32 products with full precision, not as tf32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("impl", ["gpu", "triton"])
@pytest.mark.parametrize("T, K, V, dtype, segmented, chunk", [
    (1, 16, 32, "float32", True, None), (300, 16, 32, "float32", True, 16), (300, 16, 32, "bfloat16", False, 64),
    (1024, 128, 128, "bfloat16", True, None), (1024, 128, 128, "float32", True, None), (777, 64, 128, "bfloat16", True, None),
    (300, 32, 64, "float32", False, None), (520, 256, 256, "bfloat16", True, None), (300, 256, 256, "float32", True, None)])
def test_lightning(impl, T, K, V, dtype, segmented, chunk):
    if impl == "triton":
        pytest.importorskip("jax_triton")
        if (K, dtype) == (256, "float32"):
            pytest.skip("not supported: it spills")
    with jax.default_device(jax.devices("cpu")[0]):      # keeps the state of every token in float64, too much for a GPU
        *problem, want = case(T, K, V, dtype, segmented)
    problem = jax.device_put(problem, jax.devices("gpu")[0])
    assert_close(values_and_gradients(*problem, impl, chunk), want, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("live", ["01011", "11111", "00000"])
def test_decode(live, dtype):
    live_B = np.array([c == "1" for c in live])
    arrays, state_BHKV = step_inputs(5, dtype)
    y_BHV, after_BHKV = run(arrays, state_BHKV, live_B, impl="gpu", interpret=False)
    want_BHV, want_BHKV = layer(arrays, state_BHKV)
    if live_B.any():
        assert_step_close((y_BHV[live_B], after_BHKV[live_B]), (want_BHV[live_B], want_BHKV[live_B]), dtype)
    assert not np.asarray(y_BHV, np.float32)[~live_B].any()
    np.testing.assert_array_equal(after_BHKV[~live_B], state_BHKV[~live_B])


@pytest.mark.parametrize("K, kind, return_lse", [(64, None, False), (128, "many", False), (128, "holes", True)])
def test_flash(K, kind, return_lse):
    args, do = inputs(4, 2, 512, B=2, K=K, V=K, dtype="bfloat16")
    segments_BT = segments(kind, 2, 512)
    kernel_attention = functools.partial(softmax_attention, segments_BT=segments_BT, impl="gpu", return_lse=return_lse)
    full = reference.attention_lse
    if not return_lse:
        kernel_attention, full = with_zero_lse(kernel_attention), with_zero_lse(reference.attention)
    got = [np.asarray(x, np.float64) for x in attention_gradients(kernel_attention, (), args, do)]
    args, do = jax.tree.map(lambda x: x.astype(np.float32), (args, do))
    assert_attention_close(got, attention_gradients(full, (), args, do, segments_BT, segments_BT), "bfloat16")


@pytest.mark.parametrize("impl", ["gpu", "ragged"])
def test_experts(impl):
    """Compares values and gradients with the implementation for CPU."""
    M, J, D, F, E, block = 200, 2, 64, 96, 8, 32
    rng = np.random.default_rng(0)
    expert_Mj = jnp.asarray(rng.integers(0, E, (M, J)))
    one_hot = jax.nn.one_hot(expert_Mj.ravel(), E, dtype=jnp.int32)
    rank_Mj = (jnp.cumsum(one_hot, 0) * one_hot).sum(1).reshape(M, J) - 1
    plan = grouped.plan(expert_Mj, rank_Mj, jnp.asarray(rng.random((M, J)) < 0.9), one_hot.sum(0), block)
    x = [jnp.asarray(rng.standard_normal(s, np.float32) / 8) for s in ((M, D), (M, J), (E, D, F), (E, D, F), (E, F, D))]
    def run(impl):
        squares = lambda *x: (grouped.expert_ffn(*x, plan, block=block, impl=impl) ** 2).sum()
        return jax.jit(jax.value_and_grad(squares, (0, 1, 2, 3, 4)))(*x)
    got, want = run(impl), run("blocks")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_model_equals_the_model_on_cpu():
    assert_model_equals_the_model_on_cpu("gpu")


def assert_model_equals_the_model_on_cpu(accelerator):
    """Compares loss and every gradient of a packed batch in float32: the accelerator's kernels, and XLA on the CPU."""
    model, B, T = Model(config.Model(dim=64, layers=4, pattern="LLLS", heads=4, kv_heads=2, head_dim=32, rotary_dim=16,
                                     experts=4, expert_dim=64, vocab=257)), 2, 256
    rng = np.random.default_rng(0)
    segments_BT = np.sort(rng.integers(1, 4, (B, T)), 1).astype(np.int32)
    batch = {"tokens": rng.integers(0, 257, (B, T)).astype(np.int32), "targets": rng.integers(0, 257, (B, T)).astype(np.int32),
             "segments": segments_BT, "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
             "weights": np.ones((B, T), np.float32)}

    def loss_and_grads(platform):
        device = jax.devices(platform)[0]
        with jax.default_device(device):
            params = jax.device_put(initial, device)
            return jax.device_get(jax.jit(jax.value_and_grad(lambda p: loss(model, p, batch, 128)[0]))(params))
    initial = jax.device_get(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    (own_loss, own_grads), (cpu_loss, cpu_grads) = loss_and_grads(accelerator), loss_and_grads("cpu")
    assert abs(own_loss - cpu_loss) < 1e-5 * cpu_loss
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(own_grads), jax.tree.leaves(cpu_grads)):
        assert np.linalg.norm(a - b) <= 2e-4 * max(np.linalg.norm(b), 1e-6), jax.tree_util.keystr(path)
