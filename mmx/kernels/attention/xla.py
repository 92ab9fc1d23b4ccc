"""Softmax attention in blocks, as plain XLA: differentiable, memory linear in T, blocks that see nothing skipped.

A block of queries meets the key blocks it sees one by one, with a running maximum m, sum l and output o:

    z = q . k / sqrt(K)    m' = max(m, max_s z)    p = exp(z - m')
    l' = exp(m - m') l + sum_s p                   o' = exp(m - m') o + p v

and ends with o / l and lse = m + log l, by which partial results over other keys can be joined. The backward pass keeps
q, k, v, o and lse, and meets the same pairs once more:

    p = exp(z - lse)    dz = p (do . v - o . do + dlse)    dv = p^T do    dk = dz^T q / sqrt(K)    dq = dz k / sqrt(K)

A pair of tokens costs each head 2 (K + V) FLOPs forward and 6 K + 4 V backward. The R query heads of a KV head are rows
of one product. Scores, statistics and sums are float32. Letters beyond `dims`: N query blocks, J key blocks, Q rows of
a query block (R heads times its tokens), P keys of a key block. Where a length is ragged its last block starts early:
the queries it shares with the block before are worked out twice, the keys masked.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from mmx.kernels.dtypes import wide_dtype
from mmx.kernels.products import einsum

# Tokens a block, of queries and of keys: of 64 to 512 the fastest with 8 heads of 32 on 2 CPU cores, 2026-11-22.
BLOCK = 256
# Slicing copies, so one query reads a cache up to this length whole (2112 keys: 68 us, 130 us by blocks; same day).
WHOLE = 4096
# Below any score, yet finite: exp(-inf - LOWEST) = 0 while a row has seen nothing.
LOWEST = -1e30


def block_sizes(T: int, S: int) -> tuple[int, int]:
    """Tokens of a query block and of a key block."""
    if T == 1:
        return 1, S if S <= WHOLE else 2 * BLOCK
    return min(T, BLOCK), min(S, BLOCK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def attention(q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS, start_B, queries, keys, window=0):
    """o_BHTV, lse_BHT: see `api.softmax_attention`. Segments are both given or both None; `queries`, `keys` count a block's."""
    return forward(q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS, start_B, queries, keys, window)[0]


def forward(q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS, start_B, queries, keys, window=0, scales=None):
    """(o_BHTV, lse_BHT) and the residuals of `backward`. With `scales` (k_scale_BGS, v_scale_BGS) keys and values are int8."""
    (B, H, T, K), (_, G, S, V) = q_BHTK.shape, v_BGSV.shape
    sight = Sight(T, S, queries, keys, segments_BT, segments_BS, start_B, window)
    acc, scale, R = wide_dtype(q_BHTK.dtype), K ** -0.5, H // G
    q_BGRTK = q_BHTK.reshape(B, G, R, T, K)
    first_N, end_N = sight.spans(axis=1)
    clear_NJ = sight.clear()
    def scaled(x_BGQP, j, of):
        """Scores by their keys' scales, or weights by their values': outside the sums, so that no block itself is scaled."""
        return x_BGQP * _keys(scales[of], j, keys)[:, :, None] if scales else x_BGQP

    def query_block(n, carry):
        o_BGRTV, lse_BGRT = carry
        q_BGQK = _rows(q_BGRTK, n, queries)

        def meet(j, carry, clear=False):
            o_BGQV, m_BGQ, l_BGQ = carry
            k_BGPK, v_BGPV = _keys(k_BGSK, j, keys), _keys(v_BGSV, j, keys)
            z_BGQP = scaled(einsum("BGQK,BGPK->BGQP", q_BGQK, k_BGPK.astype(q_BGQK.dtype)), j, 0)
            z_BGQP = z_BGQP if clear else sight.hide(z_BGQP, n, j)
            top_BGQ = jnp.maximum(m_BGQ, z_BGQP.max(-1))
            p_BGQP = jnp.exp((z_BGQP - top_BGQ[..., None]) * scale)
            keep_BGQ = jnp.exp((m_BGQ - top_BGQ) * scale)
            weight_BGQP = scaled(p_BGQP, j, 1).astype(q_BGQK.dtype)
            o_BGQV = o_BGQV * keep_BGQ[..., None] + einsum("BGQP,BGPV->BGQV", weight_BGQP, v_BGPV.astype(q_BGQK.dtype))
            return o_BGQV, top_BGQ, l_BGQ * keep_BGQ + p_BGQP.sum(-1)

        def key_block(j, carry):
            if T == 1:
                return meet(j, carry)
            # Masking costs the forward pass a sixth of its time; in the backward pass it disappears in the exponential.
            return lax.cond(clear_NJ[n, j], functools.partial(meet, clear=True), meet, j, carry)

        start = (jnp.zeros_like(q_BGQK, acc, shape=(B, G, R * queries, V)),
                 jnp.full_like(q_BGQK, LOWEST, acc, shape=(B, G, R * queries)),
                 jnp.zeros_like(q_BGQK, acc, shape=(B, G, R * queries)))
        if keys == S:       # for a loop a cache would be copied
            o_BGQV, m_BGQ, l_BGQ = meet(0, start)
        else:
            o_BGQV, m_BGQ, l_BGQ = lax.fori_loop(first_N[n], end_N[n], key_block, start)
        o_BGQV /= jnp.where(l_BGQ > 0, l_BGQ, 1)[..., None]
        lse_BGQ = m_BGQ * scale + jnp.log(l_BGQ)        # -inf where nothing is seen
        return _put_rows(o_BGRTV, o_BGQV.astype(o_BGRTV.dtype), n, queries), _put_rows(lse_BGRT, lse_BGQ, n, queries)

    start = jnp.zeros_like(q_BGRTK, shape=(B, G, R, T, V)), jnp.zeros_like(q_BGRTK, acc, shape=(B, G, R, T))
    o_BGRTV, lse_BGRT = lax.fori_loop(0, len(first_N), query_block, start)
    out = o_BGRTV.reshape(B, H, T, V), lse_BGRT.reshape(B, H, T)
    return out, (q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS, start_B, *out)


def backward(queries, keys, window, residuals, cotangents):
    """The gradients of `attention`'s first three arguments, from its first six and its results, whoever worked them out."""
    q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS, start_B, o_BHTV, lse_BHT = residuals
    do_BHTV, dlse_BHT = cotangents
    (B, _, T, K), (_, G, S, V) = q_BHTK.shape, v_BGSV.shape
    sight = Sight(T, S, queries, keys, segments_BT, segments_BS, start_B, window)
    acc, scale = lse_BHT.dtype, K ** -0.5
    q_BGRTK, do_BGRTV = q_BHTK.reshape(B, G, -1, T, K), do_BHTV.reshape(B, G, -1, T, V)
    # Who sees nothing has p = exp(-inf - lse), 0 with the other infinity, and often dlse = nan: a logsumexp of -inf alone.
    blind_BHT = jnp.isneginf(lse_BHT)
    lse_BGRT = jnp.where(blind_BHT, jnp.inf, lse_BHT).reshape(B, G, -1, T)
    delta_BHT = einsum("BHTV,BHTV->BHT", o_BHTV, do_BHTV) - jnp.where(blind_BHT, 0, dlse_BHT)
    delta_BGRT = delta_BHT.reshape(lse_BGRT.shape)
    first_J, end_J = sight.spans(axis=0)

    def key_block(j, carry):
        dq_BGRTK, dk_BGSK, dv_BGSV = carry
        k_BGPK, v_BGPV = _keys(k_BGSK, j, keys), _keys(v_BGSV, j, keys)
        # Wider queries keep their precision beside narrow keys, as in the forward pass.
        wide_k_BGPK, wide_v_BGPV = (x.astype(jnp.promote_types(x.dtype, q_BHTK.dtype)) for x in (k_BGPK, v_BGPV))

        def query_block(n, carry):
            dq_BGRTK, dk_BGKP, dv_BGVP = carry
            q_BGQK, do_BGQV = _rows(q_BGRTK, n, queries), _rows(do_BGRTV, n, queries)
            lse_BGQ, delta_BGQ = _rows(lse_BGRT, n, queries), _rows(delta_BGRT, n, queries)
            z_BGQP = sight.hide(einsum("BGQK,BGPK->BGQP", q_BGQK, wide_k_BGPK), n, j, once=True)
            p_BGQP = jnp.exp(z_BGQP * scale - lse_BGQ[..., None])
            dp_BGQP = einsum("BGQV,BGPV->BGQP", do_BGQV, wide_v_BGPV)
            dz_BGQP = (p_BGQP * (dp_BGQP - delta_BGQ[..., None]) * scale).astype(k_BGPK.dtype)
            dq_BGQK = _rows(dq_BGRTK, n, queries) + einsum("BGQP,BGPK->BGQK", dz_BGQP, k_BGPK)
            # Sums over Q with the wide operand last: the other way round XLA's CPU product takes 1.6 times as long.
            dk_BGKP += einsum("BGQK,BGQP->BGKP", q_BGQK, dz_BGQP.astype(wide_k_BGPK.dtype))
            dv_BGVP += einsum("BGQV,BGQP->BGVP", do_BGQV, p_BGQP.astype(do_BGQV.dtype))
            return _put_rows(dq_BGRTK, dq_BGQK, n, queries), dk_BGKP, dv_BGVP

        start = dq_BGRTK, *(jnp.zeros_like(x.swapaxes(2, 3), acc) for x in (k_BGPK, v_BGPV))
        dq_BGRTK, dk_BGKP, dv_BGVP = lax.fori_loop(first_J[j], end_J[j], query_block, start)
        return dq_BGRTK, _add_keys(dk_BGSK, dk_BGKP, j, keys), _add_keys(dv_BGSV, dv_BGVP, j, keys)

    start = tuple(jnp.zeros_like(x, acc) for x in (q_BGRTK, k_BGSK, v_BGSV))
    dq_BGRTK, dk_BGSK, dv_BGSV = lax.fori_loop(0, len(first_J), key_block, start)
    grads = dq_BGRTK.reshape(q_BHTK.shape), dk_BGSK, dv_BGSV
    return *(g.astype(x.dtype) for g, x in zip(grads, residuals)), None, None, None


attention.defvjp(forward, backward)


@dataclasses.dataclass(frozen=True)
class Sight:
    """Who sees whom among T queries and S keys: by block for the loops, by token for the scores."""
    T: int
    S: int
    queries: int
    keys: int
    segments_BT: jax.Array | None
    segments_BS: jax.Array | None
    start_B: jax.Array | None
    window: int = 0         # keys that a query sees, the last of them its own; 0: all

    def spans(self, axis: int):
        """For every block of queries (axis 1) or of keys (axis 0): the first block it has to meet, and the end.

        One query alone goes by causality: to look at every key's segment would cost it more than the keys it skips.
        """
        n_N1, j_J = self._numbers()
        last_N1 = jnp.minimum((n_N1 + 1) * self.queries, self.T) - 1
        meet_NJ = last_N1 + self._starts().max() >= j_J * self.keys
        if self.window:
            first_N1 = jnp.minimum(n_N1 * self.queries, self.T - self.queries)
            meet_NJ &= first_N1 + self._starts().min() - jnp.minimum((j_J + 1) * self.keys, self.S) + 1 < self.window
        if self.segments_BT is not None and self.T > 1:
            low_BN, high_BN, _ = _documents(self.segments_BT, self.queries)
            low_BJ, high_BJ, _ = _documents(self.segments_BS, self.keys)
            meet_NJ &= ((low_BN[:, :, None] <= high_BJ[:, None]) & (low_BJ[:, None] <= high_BN[:, :, None])).any(0)
        other = (n_N1, j_J)[axis]
        return jnp.where(meet_NJ, other, other.size).min(axis), jnp.where(meet_NJ, other + 1, 0).max(axis)

    def clear(self):
        """The pairs of blocks in which every query sees every key."""
        n_N1, j_J = self._numbers()
        first_N1 = jnp.minimum(n_N1 * self.queries, self.T - self.queries)
        clear_NJ = first_N1 + self._starts().min() >= (j_J + 1) * self.keys - 1
        if self.window:
            first_J = jnp.minimum(j_J * self.keys, self.S - self.keys)
            clear_NJ &= first_N1 + self.queries - 1 + self._starts().max() - first_J < self.window
        if self.segments_BT is not None:
            only_BN, only_BJ = (_documents(x, size)[2] for x, size in
                                ((self.segments_BT, self.queries), (self.segments_BS, self.keys)))
            clear_NJ &= ((only_BN[:, :, None] == only_BJ[:, None]) & (only_BJ > 0)[:, None]).all(0)
        return clear_NJ

    def hide(self, z_BGQP, n, j, once=False):
        """The scores of a pair of blocks, -inf where the query does not see the key.

        `once` hides as well the queries that the block before has too, for sums over queries.
        """
        t_Q1 = jnp.minimum(n * self.queries, self.T - self.queries) + jnp.arange(self.queries)[:, None]
        s_P = jnp.minimum(j * self.keys, self.S - self.keys) + jnp.arange(self.keys)
        sees_BQP = (self._starts()[:, None, None] + t_Q1 >= s_P) & (s_P >= j * self.keys)
        if self.window:
            sees_BQP &= self._starts()[:, None, None] + t_Q1 - s_P < self.window
        if once:
            sees_BQP &= t_Q1 >= n * self.queries
        if self.segments_BT is not None:
            segments_BQ1 = lax.dynamic_slice_in_dim(self.segments_BT, n * self.queries, self.queries, 1)[:, :, None]
            segments_B1P = lax.dynamic_slice_in_dim(self.segments_BS, j * self.keys, self.keys, 1)[:, None]
            sees_BQP &= (segments_BQ1 == segments_B1P) & (segments_BQ1 > 0)
        z_BGRQP = z_BGQP.reshape(*z_BGQP.shape[:2], -1, self.queries, self.keys)
        return jnp.where(sees_BQP[:, None, None], z_BGRQP, -jnp.inf).reshape(z_BGQP.shape)

    def _numbers(self):
        return jnp.arange(-(-self.T // self.queries))[:, None], jnp.arange(-(-self.S // self.keys))

    def _starts(self):
        return jnp.zeros(1, jnp.int32) if self.start_B is None else self.start_B


def _documents(segments_BT, size: int):
    """Of every block the least and the greatest document, the least above the greatest where all is padding, and the
    only one, 0 where there are several or padding."""
    T = segments_BT.shape[1]
    first_N1 = jnp.minimum(jnp.arange(0, T, size), T - size)[:, None]
    segments_BNQ = jnp.take(segments_BT, first_N1 + jnp.arange(size), axis=1)
    low_BN = jnp.where(segments_BNQ > 0, segments_BNQ, jnp.iinfo(segments_BT.dtype).max).min(2)
    high_BN = segments_BNQ.max(2)
    return low_BN, high_BN, jnp.where(segments_BNQ.min(2) == high_BN, high_BN, 0)


# Slices start no later than they fit: XLA clamps them, and `Sight.hide` counts on it.

def _rows(x_BGRT, n, queries):
    """A block of queries of all the R heads, as rows; x may have one more axis."""
    x_BGRT = lax.dynamic_slice_in_dim(x_BGRT, n * queries, queries, 3)
    return x_BGRT.reshape(*x_BGRT.shape[:2], -1, *x_BGRT.shape[4:])


def _put_rows(x_BGRT, rows_BGQ, n, queries):
    rows_BGRT = rows_BGQ.reshape(*x_BGRT.shape[:3], queries, *x_BGRT.shape[4:])
    return lax.dynamic_update_slice_in_dim(x_BGRT, rows_BGRT, n * queries, 3)


def _keys(x_BGSK, j, keys):
    return lax.dynamic_slice_in_dim(x_BGSK, j * keys, keys, 2)


def _add_keys(x_BGSK, new_BGKP, j, keys):
    return lax.dynamic_update_slice_in_dim(x_BGSK, _keys(x_BGSK, j, keys) + new_BGKP.swapaxes(2, 3), j * keys, 2)
