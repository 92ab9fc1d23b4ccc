"""Runs the TPU kernels on a TPU, not interpreted, and compares them with the oracles of their other tests.

    JAX_PLATFORMS=tpu,cpu python -m pytest tests/kernels/test_on_tpu.py
"""
import functools

import jax
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
from test_on_gpu import assert_model_equals_the_model_on_cpu

from mmx.kernels.attention import reference, softmax_attention

pytestmark = [pytest.mark.tpu, pytest.mark.skipif(jax.default_backend() != "tpu", reason="needs a TPU")]


@pytest.fixture(autouse=True)
def highest():
    """Computes float32 products with full precision, not as bfloat16."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("T, K, V, dtype, segmented, chunk", [
    (1, 16, 32, "float32", True, None), (300, 16, 32, "float32", True, 16), (1024, 128, 128, "bfloat16", True, None),
    (777, 128, 128, "float32", True, None), (512, 128, 128, "float32", False, 64)])
def test_lightning(T, K, V, dtype, segmented, chunk):
    with jax.default_device(jax.devices("cpu")[0]):
        *problem, want = case(T, K, V, dtype, segmented)
    problem = jax.device_put(problem, jax.devices("tpu")[0])
    assert_close(values_and_gradients(*problem, "tpu", chunk), want, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("live", ["01011", "11111", "00000"])
def test_decode(live, dtype):
    live_B = np.array([c == "1" for c in live])
    arrays, state_BHKV = step_inputs(5, dtype)
    y_BHV, after_BHKV = run(arrays, state_BHKV, live_B, impl="tpu", interpret=False)
    with jax.default_device(jax.devices("cpu")[0]):
        want_BHV, want_BHKV = layer(arrays, state_BHKV)
    if live_B.any():
        assert_step_close((y_BHV[live_B], after_BHKV[live_B]), (want_BHV[live_B], want_BHKV[live_B]), dtype)
    assert not np.asarray(y_BHV, np.float32)[~live_B].any()
    np.testing.assert_array_equal(after_BHKV[~live_B], state_BHKV[~live_B])


@pytest.mark.parametrize("kind, return_lse", [(None, False), ("many", False), ("holes", True)])
def test_splash(kind, return_lse):
    args, do = inputs(4, 2, 512, B=2, K=128, V=128, dtype="bfloat16")
    segments_BT = segments(kind, 2, 512)
    kernel_attention = functools.partial(softmax_attention, segments_BT=segments_BT, impl="tpu", return_lse=return_lse)
    full = reference.attention_lse
    if not return_lse:
        kernel_attention, full = with_zero_lse(kernel_attention), with_zero_lse(reference.attention)
    got = [np.asarray(x, np.float64) for x in attention_gradients(kernel_attention, (), args, do)]
    args, do = jax.tree.map(lambda x: x.astype(np.float32), (args, do))
    with jax.default_device(jax.devices("cpu")[0]):
        want = attention_gradients(full, (), args, do, segments_BT, segments_BT)
    assert_attention_close(got, want, "bfloat16")


def test_model_equals_the_model_on_cpu():
    assert_model_equals_the_model_on_cpu("tpu")
