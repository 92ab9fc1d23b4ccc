"""Lightning attention's one contract, whatever computes it."""
import functools
import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from mmx.dims import check
from mmx.kernels import platform
from mmx.kernels.lightning import gpu, tpu, xla

IMPLS = {"xla": xla, "tpu": tpu, "gpu": gpu}
NAMES = *IMPLS, "triton"        # which needs a package of its own: imported where it is named


def lightning_attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, *, segments_BT=None, state_BHKV=None, impl=None,
                        chunk=None):
    """Decayed causal linear attention with a carried state (paper section 2.2; model.md section 3).

    S_t = exp(log_decay) S_{t-1} + k_t^T v_t and o_t = q_t S_t, per head, with no scale and no denominator.

    Args:
      q_BHTK, k_BHTK, v_BHTV: queries, keys, values, float32 or bfloat16 (float64 under x64); any T >= 1.
      log_decay_H: minus the slope, in nats per token; never positive. A constant: its gradient is zero.
      segments_BT: ints. Documents count upwards from 1 along T, and a token sees its own document alone; 0 is
        padding, which brings nothing and reads zero. Padding between real tokens decays the state as they do, padding
        at either end is skipped. None: one document, no padding. Documents that go back are an error, under jit one
        of `checkify.checkify`.
      state_BHKV: the state before the first token, whose document it continues; None: zeros.
      impl: "xla"; "tpu" and "gpu", Pallas kernels; "triton", the GPU's through jax-triton; None picks one of the first
        three by platform, chip, dtype and shape. A named one runs or raises NotImplementedError with the reason.
      chunk: tokens per chunk, any positive number (on GPUs 16, 32, 64 or 128): it moves the speed alone. None picks.

    Returns:
      o_BHTV in v's dtype, and state_BHKV after the last (real) token, float32 (float64 for float64 inputs).
    """
    check(q_BHTK, "BHTK", "q_BHTK")
    B, H, T, K = q_BHTK.shape
    if not T:
        raise ValueError("q_BHTK has T=0 tokens; it needs one at least")
    check(k_BHTK, "BHTK", "k_BHTK", B=B, H=H, T=T, K=K)
    check(v_BHTV, "BHTV", "v_BHTV", B=B, H=H, T=T)
    check(log_decay_H, "H", "log_decay_H", H=H)
    if not q_BHTK.dtype == k_BHTK.dtype == v_BHTV.dtype or not jnp.issubdtype(q_BHTK.dtype, jnp.floating):
        raise ValueError(f"q_BHTK, k_BHTK, v_BHTV need one floating dtype, got {q_BHTK.dtype}, {k_BHTK.dtype}, {v_BHTV.dtype}")
    if not isinstance(log_decay_H, jax.core.Tracer) and np.asarray(log_decay_H).max() > 0:
        raise ValueError(f"log_decay_H reaches {np.asarray(log_decay_H).max()}; it is minus the slope and must not be positive")
    dtype = jnp.promote_types(q_BHTK.dtype, jnp.float32)
    log_decay_H = jnp.asarray(log_decay_H, dtype)
    if segments_BT is not None:
        check(segments_BT, "BT", "segments_BT", B=B, T=T)
        _check_documents(segments_BT)
    if state_BHKV is None:
        state_BHKV = jnp.zeros((B, H, K, v_BHTV.shape[3]), dtype)
    check(state_BHKV, "BHKV", "state_BHKV", B=B, H=H, K=K, V=v_BHTV.shape[3])
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    impl = _pick(q_BHTK, v_BHTV, chunk) if impl is None else _named(impl, q_BHTK, v_BHTV, chunk)
    return _attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV.astype(dtype), impl, chunk)


def _check_documents(segments_BT):
    if not jnp.issubdtype(segments_BT.dtype, jnp.integer):
        raise ValueError(f"segments_BT needs integers, got {segments_BT.dtype}")
    concrete = not isinstance(segments_BT, jax.core.Tracer)
    numbers = np if concrete else jnp
    latest_BT = np.maximum.accumulate(segments_BT, axis=1) if concrete else jax.lax.cummax(segments_BT, axis=1)
    rise = numbers.all((segments_BT == 0) | (segments_BT == latest_BT)) & numbers.all(segments_BT >= 0)
    message = "segments_BT must count documents upwards along T, with 0 for padding: sort each row's documents"
    if not concrete:
        checkify.debug_check(rise, message)
    elif not rise:
        raise ValueError(message)


def _named(impl, q_BHTK, v_BHTV, chunk):
    if impl not in NAMES:
        raise NotImplementedError(f"impl={impl!r}: lightning attention has {', '.join(NAMES)}")
    if reason := refusal(impl, q_BHTK, v_BHTV, chunk):
        raise NotImplementedError(f"impl={impl!r}: {reason}")
    return impl


def _pick(q_BHTK, v_BHTV, chunk):
    """The platform's kernel where it can run, else XLA; a GPU without one is told of."""
    impl = platform.name()
    # A kernel's work is not split over devices by itself: inside shard_map it runs on what each has.
    if impl not in IMPLS or platform.splits_by_itself():
        return "xla"
    if reason := refusal(impl, q_BHTK, v_BHTV, chunk):
        _say_once(f"lightning attention runs as plain XLA: {reason}")
        return "xla"
    return impl


def refusal(impl, q_BHTK, v_BHTV, chunk) -> str:
    """Why the implementation cannot run here, or on these arrays; empty where it can."""
    if impl == "xla":
        return ""
    if platform.name() != ("gpu" if impl == "triton" else impl):
        return f"this computation is for {platform.name()}; give impl='xla' or None"
    if platform.splits_by_itself():
        return "XLA cannot split a kernel over devices; call it inside shard_map"
    try:
        return _module(impl).refusal(q_BHTK, v_BHTV, chunk)
    except ImportError as error:
        return str(error)


def _module(impl):
    return IMPLS.get(impl) or importlib.import_module(f"mmx.kernels.lightning.{impl}")


@functools.cache
def _say_once(message):
    warnings.warn(message, stacklevel=2)


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
