"""Lightning attention: the public function, its checks, and the choice of an implementation."""
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from mmx.dims import check
from mmx.kernels import LIGHTNING_IMPLS, platform
from mmx.kernels.dtypes import as_int32, check_floats, wide_dtype
from mmx.kernels.lightning import gpu, tpu, xla

MODULES = {"xla": xla, "tpu": tpu, "gpu": gpu}      # "triton" needs jax-triton, so it is imported only when it is used


def lightning_attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, *, segments_BT=None, state_BHKV=None, impl=None,
                        chunk=None):
    """Computes causal linear attention with decay and a carried state (paper section 2.2; docs/model.md section 3).

    S_t = exp(log_decay) S_{t-1} + k_t^T v_t and o_t = q_t S_t for each head, without scale or denominator.

    Args:
      q_BHTK, k_BHTK, v_BHTV: queries, keys, values, of one dtype, float32 or bfloat16 (float64 under x64); any T >= 1.
      log_decay_H: log of the factor by which the state decays at each token; at most 0. A constant: its gradient is zero.
      segments_BT: the document number of each token, an integer. A token attends only to its own document. Document numbers are
        positive and never decrease along T; 0 is padding. Padding adds nothing to the state, and its output is zero. Padding
        between real tokens decays the state as a real token does; padding at either end does not. None: one document, no
        padding.
      state_BHKV: the state before the first token; the first document of the row continues it. None: zeros.
      impl: "xla"; "tpu" or "gpu" (Pallas kernels); "triton" (the GPU kernels written in Triton, which needs jax-triton). None:
        chosen by platform, GPU, dtype and shape; never "triton".
      chunk: tokens of a chunk; it affects speed only. None: chosen by platform. XLA and the TPU kernel accept any positive
        number. GPU kernels support 16, 32 and 64 in bfloat16 on H100, 16 and 32 in bfloat16 on A100, and 16 in float32. With
        another number, a GPU kernel named by `impl` raises NotImplementedError; with impl=None, the GPU kernel uses the next
        smaller supported chunk (16 if there is none).

    Returns:
      o_BHTV in v's dtype, and state_BHKV after the last real token, float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes, dtypes or values do not match this description. Under jit, document numbers are not known. If they
        decrease in a row, there is no ValueError: the results of that row are NaN, and `checkify.checkify` reports the error.
      NotImplementedError: the named implementation does not exist, or cannot run here or on these arrays.
    """
    check(q_BHTK, "BHTK", "q_BHTK")
    B, H, T, K = q_BHTK.shape
    check(k_BHTK, "BHTK", "k_BHTK", B=B, H=H, T=T, K=K)
    check(v_BHTV, "BHTV", "v_BHTV", B=B, H=H, T=T)
    check_log_decay(log_decay_H, H)
    check_floats(q_BHTK=q_BHTK)
    if not q_BHTK.dtype == k_BHTK.dtype == v_BHTV.dtype:
        raise ValueError(f"q_BHTK, k_BHTK, v_BHTV must have one dtype, got {q_BHTK.dtype}, {k_BHTK.dtype}, {v_BHTV.dtype}")
    dtype = wide_dtype(q_BHTK.dtype)
    log_decay_H = jnp.asarray(log_decay_H, dtype)
    if segments_BT is not None:
        check(segments_BT, "BT", "segments_BT", B=B, T=T)
        segments_BT = as_int32(segments_BT, "segments_BT")
    if state_BHKV is None:
        # Only the shape and the sharding of this product are used.
        product_BHKV = k_BHTK.sum(2)[..., None] * v_BHTV.sum(2)[:, :, None]
        state_BHKV = xla.zeros_like(product_BHKV).astype(dtype)
    check(state_BHKV, "BHKV", "state_BHKV", B=B, H=H, K=K, V=v_BHTV.shape[3])
    check_floats(state_BHKV=state_BHKV)
    if segments_BT is not None:     # if a row's document numbers decrease, NaN in its state makes all results of the row NaN
        state_BHKV = jnp.where(_documents_ascend(segments_BT)[:, None, None, None], state_BHKV, jnp.nan)
    if chunk is not None and (not isinstance(chunk, (int, np.integer)) or chunk < 1):
        raise ValueError(f"chunk={chunk!r} must be a positive integer")
    # A kernel named by the caller must support the chunk. A kernel chosen here uses the nearest one that it supports.
    named = impl is not None
    impl = platform.choose("lightning attention", impl, LIGHTNING_IMPLS,
                           lambda impl: refusal(impl, q_BHTK, v_BHTV, chunk if named else None), q_BHTK)
    if not named and impl == "gpu":
        chunk = gpu.nearest_chunk(q_BHTK, v_BHTV, chunk)
    return _attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV.astype(dtype), impl, chunk)


def check_log_decay(log_decay_H, H: int) -> None:
    """Raises a one-line ValueError if `log_decay_H` is not an array of H floats, or if a known value is positive or NaN."""
    check(log_decay_H, "H", "log_decay_H", H=H)
    if not jnp.issubdtype(log_decay_H.dtype, jnp.floating):
        raise ValueError(f"log_decay_H is {log_decay_H.dtype}; it must contain floating-point numbers")
    if not isinstance(log_decay_H, jax.core.Tracer) and not (np.asarray(log_decay_H) <= 0).all():
        raise ValueError(f"log_decay_H reaches {np.asarray(log_decay_H).max()}; the log of a decay must not be positive")


def _documents_ascend(segments_BT):
    """Returns for each row whether its document numbers are positive and never decrease (0 is padding).

    If the numbers are known, raises a ValueError unless this is true for all rows. If they are traced, adds a checkify check.
    """
    known = not isinstance(segments_BT, jax.core.Tracer)
    segments_BT = np.asarray(segments_BT) if known else segments_BT     # inside a jit, jnp would trace even known values
    latest_BT = np.maximum.accumulate(segments_BT, axis=1) if known else jax.lax.cummax(segments_BT, axis=1)
    ascend_B = ((segments_BT == 0) | ((segments_BT == latest_BT) & (segments_BT > 0))).all(axis=1)
    message = "document numbers in segments_BT must not decrease along T (0 is padding): sort the documents of each row"
    if not known:
        checkify.debug_check(ascend_B.all(), message)
    elif not ascend_B.all():
        raise ValueError(message)
    return ascend_B


def refusal(impl, q_BHTK, v_BHTV, chunk=None) -> str:
    """Returns why the implementation cannot run here or on these arrays; empty if it can."""
    if impl == "xla":
        return ""
    if reason := platform.device_refusal("gpu" if impl == "triton" else impl, q_BHTK):
        return reason
    return missing(impl) or _module(impl).array_refusal(q_BHTK, v_BHTV, chunk)


def missing(impl) -> str:
    """Returns why the implementation cannot be imported; empty if it can."""
    try:
        _module(impl)
    except ImportError as error:
        return str(error)
    return ""


def _module(impl):
    return MODULES.get(impl) or importlib.import_module(f"mmx.kernels.lightning.{impl}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, impl, chunk):
    return _module(impl).forward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, chunk)


def _attention_forward(*args):
    return _attention(*args), args[:6]


def _attention_backward(impl, chunk, inputs, cotangents):
    dq_BHTK, dk_BHTK, dv_BHTV, dstate_BHKV = _gradients(inputs, cotangents, impl, chunk)
    return dq_BHTK, dk_BHTK, dv_BHTV, jnp.zeros_like(inputs[3]), None, dstate_BHKV


_attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _gradients(inputs, cotangents, impl, chunk):
    return _module(impl).backward(*inputs, *cotangents, chunk)


@_gradients.defjvp
def _refuse_second_derivative(*_):
    raise NotImplementedError("lightning attention has no second derivatives; differentiate a scalar loss once")
