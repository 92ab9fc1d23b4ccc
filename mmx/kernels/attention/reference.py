"""Softmax attention over the whole score matrix, in float32: what the other implementations are tested against.

    o_t = sum_s p_ts v_s,   p_t = softmax over the keys s that t sees of q_t . k_s / sqrt(K)

Query t of row b stands at start_b + t on the key axis and sees the keys s <= start_b + t of its own segment, with a window w
those of them above start_b + t - w; segment 0 is padding, which sees and is seen by nothing. A query that sees nothing
gives 0. Memory B H T S. `attention_lse` gives lse_t as well, the log of the sum that divides p_t, -inf for a query that sees
nothing.
"""
import jax.numpy as jnp


def attention(*args, **how):
    return attention_lse(*args, **how)[0]


def attention_lse(q_BHTK, k_BGSK, v_BGSV, segments_BT=None, segments_BS=None, start_B=None, window=0):
    (B, H, T, K), (_, G, S, V) = q_BHTK.shape, v_BGSV.shape
    q_BGRTK = q_BHTK.astype(jnp.float32).reshape(B, G, H // G, T, K)
    k_BGSK, v_BGSV = k_BGSK.astype(jnp.float32), v_BGSV.astype(jnp.float32)

    start_B = jnp.zeros(B, int) if start_B is None else start_B
    sees_BTS = jnp.arange(S) <= start_B[:, None, None] + jnp.arange(T)[:, None]
    if window:
        sees_BTS &= jnp.arange(S) > start_B[:, None, None] + jnp.arange(T)[:, None] - window
    if segments_BT is not None:
        sees_BTS &= (segments_BT[:, :, None] == segments_BS[:, None, :]) & (segments_BT > 0)[:, :, None]
    sees_BGRTS = sees_BTS[:, None, None]

    s_BGRTS = jnp.einsum("BGRTK,BGSK->BGRTS", q_BGRTK, k_BGSK) / K ** 0.5
    s_BGRTS = jnp.where(sees_BGRTS, s_BGRTS, -1e30)
    top_BGRT1 = s_BGRTS.max(-1, keepdims=True)
    p_BGRTS = jnp.where(sees_BGRTS, jnp.exp(s_BGRTS - top_BGRT1), 0)
    sum_BGRT1 = p_BGRTS.sum(-1, keepdims=True)
    p_BGRTS /= jnp.maximum(sum_BGRT1, 1e-30)
    o_BHTV = jnp.einsum("BGRTS,BGSV->BGRTV", p_BGRTS, v_BGSV).reshape(B, H, T, V)
    lse_BHT = jnp.where(sum_BGRT1 > 0, top_BGRT1 + jnp.log(jnp.maximum(sum_BGRT1, 1e-30)), -jnp.inf).reshape(B, H, T)
    return o_BHTV.astype(q_BHTK.dtype), lse_BHT
