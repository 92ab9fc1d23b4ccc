"""Tests the GPU products of rows with the matrix of their expert: interpreted, and compiled for described GPUs."""
import functools

import jax
import jax.numpy as jnp
import pytest
import test_grouped
from test_grouped import assert_close, inputs, oracle, ranks, routing, sorted_experts, value_and_gradients

from mmx.compilers import ptx
from mmx.kernels import grouped, grouped_gpu, platform


@pytest.mark.parametrize("kind, dtype", [("random", "float32"), ("drops", "bfloat16"), ("empty", "float32"), ("one", "float32"),
                                         ("none", "float32")])
def test_against_all_experts(monkeypatch, kind, dtype):
    monkeypatch.setattr(test_grouped, "D", 48)
    monkeypatch.setattr(test_grouped, "F", 32)
    monkeypatch.setattr(platform, "name", lambda: "gpu")
    monkeypatch.setattr(grouped_gpu, "dot", functools.partial(grouped_gpu.dot, interpret=True))
    args, dy_MD = inputs(dtype)
    expert_Mj, keep_Mj = routing(kind)
    function = functools.partial(sorted_experts, block=32, impl=None)
    got = value_and_gradients(function, args, dy_MD, expert_Mj, keep_Mj, *ranks(expert_Mj, keep_Mj))
    assert_close(got, oracle(args, dy_MD, expert_Mj, keep_Mj), dtype)


def test_refusals_give_the_reason(monkeypatch):
    x, w = jnp.zeros((64, 48)), jnp.zeros((2, 48, 32))
    assert "is for cpu" in grouped_gpu.refusal(x, w, 16)
    monkeypatch.setattr(platform, "name", lambda: "gpu")
    assert not grouped_gpu.refusal(x, w, 16)
    assert "multiples of 16" in grouped_gpu.refusal(x, w, 8) and "multiples of 16" in grouped_gpu.refusal(x, w[:, :, :7], 16)
    assert "float16" in grouped_gpu.refusal(x.astype(jnp.float16), w, 16)
    with pytest.raises(NotImplementedError, match="multiples of 16"):
        grouped.expert_ffn(x, None, w, w, None, None, block=8, impl="gpu")


@pytest.mark.skipif(bool(ptx.missing()), reason=ptx.missing())
@pytest.mark.parametrize("chip, dtype", [("h100", "bfloat16"), ("a100", "bfloat16"), ("a100", "float32")])
def test_resources(chip, dtype):
    def run(x_rD, w_EDF, blocks_E, dy_rF):
        y_rF, pull = jax.vjp(lambda x, w: grouped_gpu.dot(x, w, blocks_E, 128), x_rD, w_EDF)
        return y_rF, pull(dy_rF)
    array = jax.ShapeDtypeStruct
    kernels = ptx.resources(run, array((4096, 1024), dtype), array((8, 1024, 2048), dtype), array((8,), jnp.int32),
                            array((4096, 2048), dtype), chip=chip)
    assert not ptx.faults(kernels, chip)
    kernels = [kernel for name, kernel in kernels.items() if name.startswith("grouped")]
    assert len(kernels) == 3 and all(kernel.ctas >= 132 and (kernel.tensor or dtype == "float32") for kernel in kernels)
