"""Lightning attention as a recurrence over tokens, in float32: the oracle of all other implementations.

    S_t = exp(g) S_{t-1} + k_t^T v_t        o_t = q_t S_t        (docs/model.md section 3; paper equation 8 with decay)

docs/model.md also specifies padding (segment 0) and documents. The state decays once for every token, real or padding, from the
first to the last real token of the row.
"""
import jax
import jax.numpy as jnp

from mmx.kernels.dtypes import wide_dtype


def lightning_attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV):
    """Computes `api.lightning_attention` with all arguments given, in float32 (float64 for float64 inputs)."""
    dtype = wide_dtype(q_BHTK.dtype)
    decay_H11 = jnp.exp(log_decay_H.astype(dtype))[:, None, None]

    def token(carry, xs):
        state_BHKV, document_B = carry
        q_BHK, k_BHK, v_BHV, segment_B, decaying_B = xs
        real_B111 = (segment_B > 0)[:, None, None, None]
        new_document_B111 = real_B111 & ((segment_B != document_B) & (document_B > 0))[:, None, None, None]
        state_BHKV = jnp.where(decaying_B[:, None, None, None], decay_H11, 1) * jnp.where(new_document_B111, 0, state_BHKV)
        state_BHKV += jnp.where(real_B111, k_BHK[..., None] * v_BHV[..., None, :], 0)
        o_BHV = jnp.einsum("BHK,BHKV->BHV", q_BHK, jnp.where(real_B111, state_BHKV, 0))
        return (state_BHKV, jnp.where(segment_B > 0, segment_B, document_B)), o_BHV

    real_BT = segments_BT > 0
    decaying_BT = jax.lax.cummax(real_BT.astype(int), axis=1) * jax.lax.cummax(real_BT.astype(int), axis=1, reverse=True) > 0
    time_first = [jnp.moveaxis(x.astype(dtype), 2, 0) for x in (q_BHTK, k_BHTK, v_BHTV)] + [segments_BT.T, decaying_BT.T]
    start = (state_BHKV.astype(dtype), jnp.zeros_like(segments_BT[:, 0]))
    (state_BHKV, _), o_TBHV = jax.lax.scan(token, start, tuple(time_first))
    return jnp.moveaxis(o_TBHV, 0, 2).astype(v_BHTV.dtype), state_BHKV
