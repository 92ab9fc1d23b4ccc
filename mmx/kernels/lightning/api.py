"""Lightning attention's one contract, whatever computes it."""
import jax
import jax.numpy as jnp
import numpy as np

from mmx.dims import check
from mmx.kernels.lightning import xla

IMPLS = ("xla",)


def lightning_attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, *, segments_BT=None, state_BHKV=None, impl=None,
                        chunk=None):
    """Decayed causal linear attention with a carried state (paper section 2.2; model.md section 3).

    S_t = exp(log_decay) S_{t-1} + k_t^T v_t and o_t = q_t S_t, per head, with no scale and no denominator.

    Args:
      q_BHTK, k_BHTK, v_BHTV: queries, keys, values, float32 or bfloat16 (float64 under x64); any T >= 1.
      log_decay_H: minus the slope, in nats per token; never positive. A constant: its gradient is zero.
      segments_BT: ints. Documents count upwards from 1 along T, and a token sees its own document alone; 0 is
        padding, which brings nothing and reads zero. Padding between real tokens decays the state as they do, padding
        at either end is skipped. None: one document, no padding.
      state_BHKV: the state before the first token, whose document it continues; None: zeros.
      impl: "xla", or None to pick by platform.
      chunk: tokens per chunk, any positive number: it moves the speed alone. None picks.

    Returns:
      o_BHTV in v's dtype, and state_BHKV after the last (real) token, float32 (float64 for float64 inputs).
    """
    check(q_BHTK, "BHTK", "q_BHTK")
    B, H, T, K = q_BHTK.shape
    check(k_BHTK, "BHTK", "k_BHTK", B=B, H=H, T=T, K=K)
    check(v_BHTV, "BHTV", "v_BHTV", B=B, H=H, T=T)
    check(log_decay_H, "H", "log_decay_H", H=H)
    if not isinstance(log_decay_H, jax.core.Tracer) and np.asarray(log_decay_H).max() > 0:
        raise ValueError(f"log_decay_H reaches {np.asarray(log_decay_H).max()}; it is minus the slope and must not be positive")
    dtype = jnp.promote_types(q_BHTK.dtype, jnp.float32)
    log_decay_H = jnp.asarray(log_decay_H, dtype)
    if segments_BT is not None:
        check(segments_BT, "BT", "segments_BT", B=B, T=T)
    if state_BHKV is None:
        state_BHKV = jnp.zeros((B, H, K, v_BHTV.shape[3]), dtype)
    check(state_BHKV, "BHKV", "state_BHKV", B=B, H=H, K=K, V=v_BHTV.shape[3])
    if impl not in (None, *IMPLS):
        raise NotImplementedError(f"impl={impl!r}: lightning attention has {', '.join(IMPLS)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    # 64 is best on CPU, 128-256 on accelerators (128 divides the matrix unit's tiles).
    chunk = min(chunk or (64 if jax.default_backend() == "cpu" else 128), T)
    return xla.lightning_attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV.astype(dtype), chunk)
