"""Compares a model's loss and gradients with each lightning kernel, interpreted, with the loss and gradients with XLA."""
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import config
from mmx.kernels import grouped_gpu, platform
from mmx.kernels.lightning import api
from mmx.model import Model
from mmx.training.loss import loss

C = config.Model(vocab=32, dim=32, layers=2, pattern="L", heads=2, kv_heads=1, head_dim=16, rotary_dim=8, experts=2, top_k=1,
                 expert_dim=32)
T = 40


@functools.cache
def params_and_xla_results():
    params = jax.jit(Model(C).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return params, loss_and_grads(params, "xla")


def loss_and_grads(params, impl):
    rows_BT = np.random.default_rng(0).integers(0, C.vocab, (2, T)).astype(np.int32)
    segments_BT = np.array([[1] * 17 + [2] * 23, [1] * 33 + [0] * 7], np.int32)
    batch = {"tokens": rows_BT, "targets": np.roll(rows_BT, -1, 1), "segments": segments_BT,
             "positions": np.tile(np.arange(T, dtype=np.int32), (2, 1)), "weights": (segments_BT > 0).astype(np.float32)}
    model = Model(dataclasses.replace(C, impl=impl))
    return jax.jit(jax.value_and_grad(lambda p: loss(model, p, batch, 64)[0]))(params)


def compare(impl, kernel, monkeypatch):
    """Compares loss and gradients with `kernel`, a module, on its platform, with those with XLA."""
    params, (want, want_grads) = params_and_xla_results()
    calls = []

    def interpreted(function):
        def call(*args):
            calls.append(function)
            return function(*args, interpret=True)
        return call
    monkeypatch.setattr(platform, "name", lambda: "gpu" if impl == "triton" else impl)
    monkeypatch.setattr(grouped_gpu, "refusal", lambda *_: "the experts' products are tested elsewhere")
    monkeypatch.setitem(api.MODULES, impl, types.SimpleNamespace(
        array_refusal=kernel.array_refusal, forward=interpreted(kernel.forward), backward=interpreted(kernel.backward)))
    got, grads = loss_and_grads(params, impl)
    assert {kernel.forward, kernel.backward} <= set(calls)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want_grads)):
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
        assert error <= 1e-5, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


@pytest.mark.parametrize("impl", ["tpu", "gpu"])
def test_loss_and_gradients_equal_xla(impl, monkeypatch):
    compare(impl, api.MODULES[impl], monkeypatch)
