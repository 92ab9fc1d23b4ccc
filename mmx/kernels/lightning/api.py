"""Lightning attention's one contract, whatever computes it."""
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

# "triton" is imported only when it is named: it needs jax-triton.
MODULES = {"xla": xla, "tpu": tpu, "gpu": gpu}


def lightning_attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, *, segments_BT=None, state_BHKV=None, impl=None,
                        chunk=None):
    """Decayed causal linear attention with a carried state (paper section 2.2; model.md section 3).

    S_t = exp(log_decay) S_{t-1} + k_t^T v_t and o_t = q_t S_t, per head, with no scale and no denominator.

    Args:
      q_BHTK, k_BHTK, v_BHTV: queries, keys, values, of one dtype, float32 or bfloat16 (float64 under x64); any T >= 1.
      log_decay_H: minus the slope, in nats per token; never positive. A constant: its gradient is zero.
      segments_BT: ints. Documents count upwards from 1 along T, and a token sees its own document alone; 0 is
        padding, which brings nothing and reads zero. Padding between real tokens decays the state as they do, padding
        at either end is skipped. None: one document, no padding. Documents that go back are an error, under jit one
        of `checkify.checkify`; without it the row's results are NaN.
      state_BHKV: the state before the first token, whose document it continues; None: zeros.
      impl: "xla"; "tpu" and "gpu", Pallas kernels; "triton", the GPU's through jax-triton; None picks one of the first
        three by platform, chip, dtype and shape. A named one runs or raises NotImplementedError with the reason.
      chunk: tokens per chunk, any positive number: it moves the speed alone. None picks. GPUs' kernels take 16, 32 or 64, as
        registers allow: by name they refuse others, and when they are picked they take the nearest.

    Returns:
      o_BHTV in v's dtype, and state_BHKV after the last (real) token, float32 (float64 for float64 inputs).
    """
    check(q_BHTK, "BHTK", "q_BHTK")
    B, H, T, K = q_BHTK.shape
    check(k_BHTK, "BHTK", "k_BHTK", B=B, H=H, T=T, K=K)
    check(v_BHTV, "BHTV", "v_BHTV", B=B, H=H, T=T)
    check_log_decay(log_decay_H, H)
    check_floats(q_BHTK=q_BHTK)
    if not q_BHTK.dtype == k_BHTK.dtype == v_BHTV.dtype:
        raise ValueError(f"q_BHTK, k_BHTK, v_BHTV need one floating dtype, got {q_BHTK.dtype}, {k_BHTK.dtype}, {v_BHTV.dtype}")
    dtype = wide_dtype(q_BHTK.dtype)
    log_decay_H = jnp.asarray(log_decay_H, dtype)
    if segments_BT is not None:
        check(segments_BT, "BT", "segments_BT", B=B, T=T)
        segments_BT = as_int32(segments_BT, "segments_BT")
    if state_BHKV is None:
        some_BHKV = k_BHTK.sum(2)[..., None] * v_BHTV.sum(2)[:, :, None]        # over the devices as k and v are
        state_BHKV = xla.zeros_like(some_BHKV).astype(dtype)
    check(state_BHKV, "BHKV", "state_BHKV", B=B, H=H, K=K, V=v_BHTV.shape[3])
    check_floats(state_BHKV=state_BHKV)
    if segments_BT is not None:     # where nobody asks checkify there is no wrong answer: NaN in the state reaches every token
        state_BHKV = jnp.where(_rise(segments_BT)[:, None, None, None], state_BHKV, jnp.nan)
    if chunk is not None and (not isinstance(chunk, (int, np.integer)) or chunk < 1):
        raise ValueError(f"chunk={chunk!r} must be a whole number, 1 at least")
    # A chunk moves the speed alone: a kernel that is picked takes the nearest that it can, one that is named the one asked for.
    given = impl
    impl = platform.choose("lightning attention", given, LIGHTNING_IMPLS,
                           lambda impl: refusal(impl, q_BHTK, v_BHTV, chunk if given else None), q_BHTK)
    if given is None and impl == "gpu":
        chunk = gpu.nearest_chunk(q_BHTK, v_BHTV, chunk)
    return _attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV.astype(dtype), impl, chunk)


def check_log_decay(log_decay_H, H: int) -> None:
    """Raises a one-line ValueError unless it is H real numbers, none of them positive or NaN where they are known."""
    check(log_decay_H, "H", "log_decay_H", H=H)
    if not jnp.issubdtype(log_decay_H.dtype, jnp.floating):
        raise ValueError(f"log_decay_H is {log_decay_H.dtype}; it needs floating-point numbers")
    if not isinstance(log_decay_H, jax.core.Tracer) and not (np.asarray(log_decay_H) <= 0).all():
        raise ValueError(f"log_decay_H reaches {np.asarray(log_decay_H).max()}; it is minus the slope and must not be positive")


def _rise(segments_BT):
    """Of each row whether its documents count upwards; where they are known an error unless they do, else a check."""
    concrete = not isinstance(segments_BT, jax.core.Tracer)
    segments_BT = np.asarray(segments_BT) if concrete else segments_BT      # a known jax.Array too: jit would trace its sums
    latest_BT = np.maximum.accumulate(segments_BT, axis=1) if concrete else jax.lax.cummax(segments_BT, axis=1)
    rise_B = ((segments_BT == 0) | ((segments_BT == latest_BT) & (segments_BT > 0))).all(axis=1)
    message = "segments_BT must count documents upwards along T, with 0 for padding: sort each row's documents"
    if not concrete:
        checkify.debug_check(rise_B.all(), message)
    elif not rise_B.all():
        raise ValueError(message)
    return rise_B


def refusal(impl, q_BHTK, v_BHTV, chunk=None) -> str:
    """Why the implementation cannot run here, or on these arrays; empty where it can."""
    if impl == "xla":
        return ""
    if reason := platform.refusal("gpu" if impl == "triton" else impl, q_BHTK):
        return reason
    try:
        return _module(impl).refusal(q_BHTK, v_BHTV, chunk)
    except ImportError as error:
        return str(error)


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
def _refuse(*_):
    raise NotImplementedError("lightning attention has no second derivatives: take the gradient once, of a scalar loss")
