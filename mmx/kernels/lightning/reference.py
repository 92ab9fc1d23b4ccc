"""Lightning attention as the token-by-token recurrence, in float32: the oracle of every other form.

    S_t = exp(g) S_{t-1} + k_t^T v_t        o_t = q_t S_t        (model.md section 3; paper eq. 8 with decay)

A token of segment 0 is padding: it brings nothing and reads zero. Between real tokens it decays the state like any
token; before the first and after the last real token time stands still. A token whose segment differs from that of the
last real token starts from an empty state; the first real token continues the given state.
"""
import jax
import jax.numpy as jnp

from mmx.kernels.dtypes import wide_dtype


def lightning_attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV):
    """Same contract as `api.lightning_attention`, all arguments given; computes in float32 (float64 stays)."""
    dtype = wide_dtype(q_BHTK.dtype)
    decay_H11 = jnp.exp(log_decay_H.astype(dtype))[:, None, None]

    def token(carry, xs):
        state_BHKV, document_B = carry
        q_BHK, k_BHK, v_BHV, segment_B, passes_B = xs
        real_B111 = (segment_B > 0)[:, None, None, None]
        fresh_B111 = real_B111 & ((segment_B != document_B) & (document_B > 0))[:, None, None, None]
        state_BHKV = jnp.where(passes_B[:, None, None, None], decay_H11, 1) * jnp.where(fresh_B111, 0, state_BHKV)
        state_BHKV += jnp.where(real_B111, k_BHK[..., None] * v_BHV[..., None, :], 0)
        o_BHV = jnp.einsum("BHK,BHKV->BHV", q_BHK, jnp.where(real_B111, state_BHKV, 0))
        return (state_BHKV, jnp.where(segment_B > 0, segment_B, document_B)), o_BHV

    real_BT = segments_BT > 0
    passes_BT = jax.lax.cummax(real_BT.astype(int), axis=1) * jax.lax.cummax(real_BT.astype(int), axis=1, reverse=True) > 0
    time_first = [jnp.moveaxis(x.astype(dtype), 2, 0) for x in (q_BHTK, k_BHTK, v_BHTV)] + [segments_BT.T, passes_BT.T]
    start = (state_BHKV.astype(dtype), jnp.zeros_like(segments_BT[:, 0]))
    (state_BHKV, _), o_TBHV = jax.lax.scan(token, start, tuple(time_first))
    return jnp.moveaxis(o_TBHV, 0, 2).astype(v_BHTV.dtype), state_BHKV
