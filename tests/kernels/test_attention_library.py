"""Tests the wrapped library kernels: interpreted, against the full score matrix; and with the compilers of TPUs and GPUs."""
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from test_attention import assert_close, inputs, segments, values_and_gradients

from mmx.compilers import ptx, schedule
from mmx.kernels import platform
from mmx.kernels.attention import api, gpu, reference, softmax_attention


def with_zero_lse(attention):
    """Returns a function that returns zeros as lse, so that only o is compared."""
    return lambda *args: (attention(*args), jnp.zeros(args[0].shape[:3]))


@pytest.mark.parametrize("impl, K, kind, return_lse, dtype", [
    ("tpu", 128, None, False, "float32"), ("tpu", 128, "holes", True, "float32"),
    ("gpu", 16, "many", False, "bfloat16"), ("gpu", 16, "holes", True, "float32")])
def test_equals_the_full_matrix(monkeypatch, impl, K, kind, return_lse, dtype):
    args, do = inputs(4, 2, 256, B=2, K=K, V=K, dtype=dtype)
    segments_BT = segments(kind, 2, 256)
    kernel = api.MODULES[impl]
    monkeypatch.setattr(platform, "name", lambda: impl)
    monkeypatch.setitem(api.MODULES, impl, types.SimpleNamespace(
        array_refusal=lambda *args: "", attention=functools.partial(kernel.attention, interpret=True)))
    kernel_attention = functools.partial(softmax_attention, segments_BT=segments_BT, impl=impl, return_lse=return_lse)
    full = reference.attention_lse
    if not return_lse:      # tests the libraries' own backward passes
        kernel_attention, full = with_zero_lse(kernel_attention), with_zero_lse(reference.attention)
    got = [np.asarray(x, np.float64) for x in values_and_gradients(kernel_attention, (), args, do)]
    args, do = jax.tree.map(lambda x: x.astype(np.float32), (args, do))
    assert_close(got, values_and_gradients(full, (), args, do, segments_BT, segments_BT), dtype)


@pytest.mark.parametrize("kind", [None, "holes"])
def test_tokamax_gets_time_first_and_a_mask(monkeypatch, kind):
    """A fake tokamax computes the full score matrix with numpy, in tokamax's layout: batch, tokens, heads, dims."""
    def dot_product_attention(q_BTHK, k_BSGK, v_BSGV, *, mask, is_causal, implementation):
        assert is_causal and implementation == "triton" and (mask is None) == (kind is None)
        q, k, v = (np.asarray(x, np.float64) for x in (q_BTHK, k_BSGK, v_BSGV))
        k, v = (x.repeat(q.shape[2] // k_BSGK.shape[2], axis=2) for x in (k, v))
        scores = np.einsum("BTHK,BSHK->BHTS", q, k) / np.sqrt(q.shape[3])
        seen = np.tri(q.shape[1], dtype=bool) if mask is None else np.tri(q.shape[1], dtype=bool) & np.asarray(mask)
        weights = np.where(seen, np.exp(scores), 0)
        return jnp.asarray(np.einsum("BHTS,BSHV->BTHV", weights / weights.sum(-1, keepdims=True), v), q_BTHK.dtype)
    (q, k, v), _ = inputs(4, 2, 128, B=2, K=64, V=64, dtype="bfloat16")
    segments_BT = segments(kind, 2, 128)
    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(dot_product_attention=dot_product_attention))
    monkeypatch.setattr(gpu, "has_tokamax", lambda: True)
    monkeypatch.setattr(platform, "name", lambda: "gpu")
    got = softmax_attention(q, k, v, segments_BT=segments_BT, impl="gpu")
    want = reference.attention(*(x.astype(np.float32) for x in (q, k, v)), segments_BT, segments_BT)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2**-8, atol=1e-6)     # the result is rounded to bfloat16


def test_refusals_give_the_reason(monkeypatch):
    (q, k, v), _ = inputs(2, 1, 128, K=128, V=128, B=1)
    seg = np.ones((1, 128), np.int32)

    def message(impl, *args, **kwargs):
        with pytest.raises(NotImplementedError) as caught:
            softmax_attention(*args, impl=impl, **kwargs)
        return str(caught.value)
    assert message("tpu", q, k, v) == "impl='tpu': this computation is for cpu; use impl='xla' or None"
    for impl in ("tpu", "gpu"):
        monkeypatch.setattr(platform, "name", lambda: impl)
        assert "T=100, K=128, V=128" in message(impl, *(x[:, :, :100] for x in (q, k, v)))
        assert "of a cache" in message(impl, q, k, v, start_B=jnp.zeros(1, jnp.int32))
        assert "of other segments" in message(impl, q, k, v, segments_BT=seg, segments_BS=2 * seg)
        with jax.enable_x64(True):
            assert "jax_enable_x64 is on" in message(impl, q, k, v)
    assert "q_BHTK is float32: flash attention supports bfloat16" in message("gpu", q, k, v)


@pytest.mark.skipif(bool(schedule.missing()), reason=schedule.missing())
def test_splash_is_chosen_and_compiles_for_v5p(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), "x")
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))
    q, k, segments_BT = array(1, 4, 512, 128), array(1, 2, 512, 128), array(1, 512, dtype=jnp.int32)
    loss = lambda q, k, v, s: softmax_attention(q, k, v, segments_BT=s).astype(jnp.float32).sum()

    def both(q, k, v, s):
        return jax.grad(loss, (0, 1, 2))(q, k, v, s), softmax_attention(q, k, v, segments_BT=s, return_lse=True)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(both).lower(q, k, k, segments_BT).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 4


@pytest.mark.skipif(bool(ptx.missing()), reason=ptx.missing())
@pytest.mark.parametrize("chip, K", [("h100", 128), ("a100", 128), ("a100", 64)])
def test_flash_is_chosen_and_compiles(chip, K):
    array = jax.ShapeDtypeStruct
    q, k, segments_BT = array((1, 16, 1024, K), jnp.bfloat16), array((1, 2, 1024, K), jnp.bfloat16), array((1, 1024), jnp.int32)

    def run(q, k, v, s, do):
        o, pull = jax.vjp(lambda *args: softmax_attention(*args, segments_BT=s), q, k, v)
        return o, pull(do)
    kernels = ptx.resources(run, q, k, k, segments_BT, q, chip=chip)
    unexpected = [fault for fault in ptx.faults(kernels, chip) if not (chip == "h100" and "mha_backward spills" in fault)]
    assert not unexpected       # on an H100 the backward kernel that spills is faster than those that do not
    for name in ("mha_forward", "mha_backward"):
        assert kernels[name].tensor and kernels[name].ctas >= 108
