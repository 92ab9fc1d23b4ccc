"""Softmax attention over the whole score matrix, in float32: the oracle that the other implementations are tested against.

    o_t = sum_s p_ts v_s,   p_t = softmax over the visible keys s of q_t . k_s / sqrt(K)

Query t of row b has position start_b + t on the key axis. It sees the keys s <= start_b + t of its segment; with a window w,
only the keys s > start_b + t - w. Segment 0 is padding: it sees no keys, and no query sees it. A query without visible
keys gives 0. Memory is proportional to B H T S.
"""
import jax.numpy as jnp


def attention(*args, **options):
    """Returns o_BHTV of `attention_lse`."""
    return attention_lse(*args, **options)[0]


def attention_lse(q_BHTK, k_BGSK, v_BGSV, segments_BT=None, segments_BS=None, start_B=None, window=0):
    """Returns o_BHTV and lse_BHT, the log of the sum that divides p_t (-inf for a query without visible keys)."""
    (B, H, T, K), (_, G, S, V) = q_BHTK.shape, v_BGSV.shape
    q_BGRTK = q_BHTK.astype(jnp.float32).reshape(B, G, H // G, T, K)
    k_BGSK, v_BGSV = k_BGSK.astype(jnp.float32), v_BGSV.astype(jnp.float32)

    start_B = jnp.zeros(B, int) if start_B is None else start_B
    visible_BTS = jnp.arange(S) <= start_B[:, None, None] + jnp.arange(T)[:, None]
    if window:
        visible_BTS &= jnp.arange(S) > start_B[:, None, None] + jnp.arange(T)[:, None] - window
    if segments_BT is not None:
        visible_BTS &= (segments_BT[:, :, None] == segments_BS[:, None, :]) & (segments_BT > 0)[:, :, None]
    visible_BGRTS = visible_BTS[:, None, None]

    score_BGRTS = jnp.einsum("BGRTK,BGSK->BGRTS", q_BGRTK, k_BGSK) / K ** 0.5
    score_BGRTS = jnp.where(visible_BGRTS, score_BGRTS, -1e30)
    max_BGRT1 = score_BGRTS.max(-1, keepdims=True)
    p_BGRTS = jnp.where(visible_BGRTS, jnp.exp(score_BGRTS - max_BGRT1), 0)
    sum_BGRT1 = p_BGRTS.sum(-1, keepdims=True)
    p_BGRTS /= jnp.maximum(sum_BGRT1, 1e-30)
    o_BHTV = jnp.einsum("BGRTS,BGSV->BGRTV", p_BGRTS, v_BGSV).reshape(B, H, T, V)
    lse_BHT = jnp.where(sum_BGRT1 > 0, max_BGRT1 + jnp.log(jnp.maximum(sum_BGRT1, 1e-30)), -jnp.inf).reshape(B, H, T)
    return o_BHTV.astype(q_BHTK.dtype), lse_BHT
