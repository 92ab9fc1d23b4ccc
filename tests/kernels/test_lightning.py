"""Compares every implementation of lightning attention with the recurrence: values, every gradient, the state.

The Pallas kernels are interpreted.
"""
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lightning_cases import TOLERANCE, assert_close, case, errors

from mmx.kernels import platform
from mmx.kernels.lightning import api, lightning_attention


@pytest.fixture(params=["xla", "tpu", "gpu"])
def impl(request, monkeypatch):
    """The name of an implementation; the platform is set to the one that it is for."""
    name = request.param
    if name != "xla":
        kernel = api.MODULES[name]
        monkeypatch.setattr(platform, "name", lambda: name)
        monkeypatch.setitem(api.MODULES, name, types.SimpleNamespace(
            array_refusal=lambda q, v, chunk: kernel.array_refusal(q, v, None),
            forward=functools.partial(kernel.forward, interpret=True),
            backward=functools.partial(kernel.backward, interpret=True)))
    return name


@functools.partial(jax.jit, static_argnames=("impl", "chunk"))
def attend(q, k, v, state, log_decay_H, segments_BT, impl, chunk):
    return lightning_attention(q, k, v, log_decay_H, segments_BT=segments_BT, state_BHKV=state, impl=impl, chunk=chunk)


@functools.partial(jax.jit, static_argnames=("impl", "chunk"))
def values_and_gradients(args, cotangents, log_decay_H, segments_BT, impl, chunk):
    out, pull = jax.vjp(lambda *args: attend(*args, log_decay_H, segments_BT, impl, chunk), *args)
    return out + pull(cotangents)


@pytest.mark.parametrize("T, K, V, dtype, segmented, chunk", [
    (1, 16, 32, "float32", True, None), (17, 16, 128, "bfloat16", True, 16), (20, 256, 16, "float32", False, 16),
    (300, 16, 32, "float32", True, 64), (300, 16, 32, "bfloat16", False, 64), (1024, 16, 32, "float32", True, None),
    (128, 64, 128, "float32", False, None)])
def test_equals_the_recurrence(impl, T, K, V, dtype, segmented, chunk):
    *problem, want = case(T, K, V, dtype, segmented)
    assert_close(values_and_gradients(*problem, impl, chunk), want, dtype)


def test_error_does_not_grow_with_length(impl):
    """131,072 tokens in one call are as exact as 1,024, in values and gradients, for a head with a slope of 1e-3."""
    def largest_errors(T):
        *problem, want = case(T, 16, 16, "float32", False, slopes=(1e-3,), B=1)
        got = values_and_gradients(*problem, impl, 128 if impl == "gpu" else 512)
        return {name: error.max() for name, error in errors(got, want).items()}
    short, long = largest_errors(1024), largest_errors(131_072)
    for name, error in long.items():
        assert error <= 1.5 * short[name] and error <= TOLERANCE["float32"], f"{name}: {error:.1e}, {short[name]:.1e} at 1,024"


def inputs(B, H, T, K, V, slopes):
    """Returns q, k, v and a state, and log decays whose slopes are a geometric sequence."""
    keys = jax.random.split(jax.random.key(T), 4)
    shapes = (B, H, T, K), (B, H, T, K), (B, H, T, V), (B, H, K, V)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]
    return arrays, -jnp.asarray(np.geomspace(*slopes, H), jnp.float32)


def test_split_sequence_equals_whole_sequence():
    (q, k, v, state), log_decay_H = inputs(2, 3, 60, 8, 8, (0.5, 1e-3))
    seg = jnp.asarray([[1] * 7 + [2] * 33 + [3] * 20, [0] * 9 + [1] * 51])
    part = lambda q, k, v, seg, state: attend(q, k, v, state, log_decay_H, seg, "xla", 16)
    whole = part(q, k, v, seg, state)
    # The state belongs to the document of the first token, so the split is inside a document in every row.
    first = part(q[:, :, :30], k[:, :, :30], v[:, :, :30], seg[:, :30], state)
    second = part(q[:, :, 30:], k[:, :, 30:], v[:, :, 30:], seg[:, 30:], first[1])
    np.testing.assert_allclose(jnp.concatenate([first[0], second[0]], 2), whole[0], atol=1e-5)
    np.testing.assert_allclose(second[1], whole[1], atol=1e-5)


def test_memory_is_linear_in_length():
    def temporary_bytes(T):
        args, log_decay_H = inputs(1, 2, T, 16, 16, (0.5, 1e-3))
        loss = lambda q, k, v, s: lightning_attention(q, k, v, log_decay_H, state_BHKV=s)[0].sum()
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile().memory_analysis().temp_size_in_bytes
    small, large = temporary_bytes(1024), temporary_bytes(8192)
    assert large <= 8.5 * small


def test_errors_say_what_would_work():
    (q, k, v, state), log_decay_H = inputs(1, 2, 8, 4, 4, (0.5, 1e-3))
    with pytest.raises(ValueError, match="k_BHTK has T=7"):
        lightning_attention(q, k[:, :, :7], v, log_decay_H)
    for decay_H, message in ((-log_decay_H, "must not be positive"), (log_decay_H * jnp.nan, "reaches nan"),
                             (log_decay_H.astype(complex), "is complex64")):
        with pytest.raises(ValueError, match=f"log_decay_H .*{message}"):
            lightning_attention(q, k, v, decay_H)
    for bad, message in ((None, "q_BHTK needs an array with axes BHTK, got NoneType"), (q[:0], "q_BHTK is empty"),
                         (q.astype("float16"), "q_BHTK is float16; it must be float32, bfloat16 or float64")):
        with pytest.raises(ValueError, match=message):
            lightning_attention(bad, *[bad] * 2, log_decay_H)
    for chunk in (0, 2.5):
        with pytest.raises(ValueError, match=f"chunk={chunk} must be a positive integer"):
            lightning_attention(q, k, v, log_decay_H, chunk=chunk)
    with pytest.raises(ValueError, match="segments_BT contains values from 1 to 4294967296; they must fit int32"):
        lightning_attention(q, k, v, log_decay_H, segments_BT=np.array([[1] * 7 + [2 ** 32]]))
    with pytest.raises(ValueError, match="state_BHKV needs 4 axes"):
        lightning_attention(q, k, v, log_decay_H, state_BHKV=state[0])
    with pytest.raises(NotImplementedError, match="impl='cuda'"):
        lightning_attention(q, k, v, log_decay_H, impl="cuda")
    for impl in ("tpu", "gpu", "triton"):
        with pytest.raises(NotImplementedError, match=f"impl='{impl}': this computation is for cpu"):
            lightning_attention(q, k, v, log_decay_H, impl=impl)
    with pytest.raises(ValueError, match="must have one dtype"):
        lightning_attention(q, k, v.astype("bfloat16"), log_decay_H)
    with pytest.raises(ValueError, match="segments_BT must contain integers"):
        lightning_attention(q, k, v, log_decay_H, segments_BT=jnp.ones((1, 8)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_arrays_over_several_devices_use_xla(kind, monkeypatch):
    """Without jax.set_mesh the mesh is known only from the arrays, with and without jit."""
    (q, k, v, _), log_decay_H = inputs(4, 2, 8, 16, 16, (0.5, 1e-3))
    mesh = jax.make_mesh((4,), ("rows",), (kind,), devices=jax.devices()[:4])
    q, k, v = jax.device_put((q, k, v), NamedSharding(mesh, P("rows")))
    attend = lambda *qkv, impl=None: lightning_attention(*qkv, log_decay_H, impl=impl)[0]
    want = attend(q, k, v)
    monkeypatch.setattr(platform, "name", lambda: "tpu")
    for run in (attend, jax.jit(attend)):
        np.testing.assert_allclose(run(q, k, v), want, atol=1e-5)
    with pytest.raises(NotImplementedError, match="impl='tpu': XLA cannot partition a kernel over devices; call it"):
        jax.jit(functools.partial(attend, impl="tpu"))(2 * q, k, v)


def test_segments_of_any_integers():
    """Narrow and unsigned integers are converted before sums and maxima that do not support them."""
    (q, k, v, state), log_decay_H = inputs(1, 2, 8, 4, 4, (0.5, 1e-3))
    want, *others = (attend(q, k, v, state, log_decay_H, np.asarray([[1, 1, 2, 2, 2, 3, 3, 0]], dtype), "xla", None)[0]
                     for dtype in ("int32", "int16", "uint32"))
    for got in others:
        np.testing.assert_array_equal(got, want)


def test_decreasing_documents_are_an_error():
    (q, k, v, _), log_decay_H = inputs(1, 2, 8, 4, 4, (0.5, 1e-3))
    good, decreasing = (jnp.asarray([row]) for row in ([0, 1, 1, 0, 1, 2, 2, 0], [1, 1, 2, 2, 0, 1, 1, 1]))
    attend = lambda seg: lightning_attention(q, k, v, log_decay_H, segments_BT=seg)[0]
    attend(good)
    with pytest.raises(ValueError, match="document numbers in segments_BT must not decrease"):
        attend(decreasing)
    jax.jit(lambda: attend(good))()             # values are known in the trace, too
    with pytest.raises(ValueError, match="segments_BT"):
        jax.jit(lambda: attend(decreasing))()
    checked = jax.jit(checkify.checkify(jax.jit(attend)))
    assert checked(good)[0].get() is None
    assert "document numbers in segments_BT must not decrease" in checked(decreasing)[0].get()


def test_decreasing_documents_give_nan_without_checkify(impl):
    """Under jit, the results of the wrong row are NaN; the other rows are not affected."""
    (q, k, v, state), log_decay_H = inputs(3, 2, 20, 16, 16, (0.5, 1e-3))
    seg = jnp.asarray([[1] * 9 + [2] * 11, [1] * 3 + [2] * 9 + [1] * 8, [0] * 3 + [1] * 17])
    for x in attend(q, k, v, state, log_decay_H, seg, impl, 16):
        assert np.isnan(x[1]).all() and np.isfinite(x[::2]).all()


def test_second_derivatives_are_refused():
    (q, k, v, _), log_decay_H = inputs(1, 2, 8, 4, 4, (0.5, 1e-3))
    slope = jax.grad(lambda q: lightning_attention(q, k, v, log_decay_H)[0].sum() ** 2)
    for second in (jax.grad(lambda q: slope(q).sum()), jax.jit(jax.grad(lambda q: slope(q).sum()))):
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            second(q)
