"""Softmax attention in blocks, as plain XLA: differentiable, with memory linear in T; blocks without visible keys are skipped.

Each block of queries is combined with the blocks of keys that it sees, one after the other. A running maximum m, sum l and
output o are kept:

    z = q . k / sqrt(K)    m' = max(m, max_s z)    p = exp(z - m')
    l' = exp(m - m') l + sum_s p                   o' = exp(m - m') o + p v

The results are o / l and lse = m + log l, by which partial results over other keys can be combined. The backward pass keeps
q, k, v, o and lse, and visits the same pairs of blocks once more:

    p = exp(z - lse)    dz = p (do . v - o . do + dlse)    dv = p^T do    dk = dz^T q / sqrt(K)    dq = dz k / sqrt(K)

Each pair of a query and a key costs each head 2 (K + V) FLOPs forward and 6 K + 4 V backward. The R query heads of a KV head
are rows of one product. Scores, statistics and sums are float32. Axes: N blocks of queries, u blocks of keys, Q rows of a
query block (R heads times its tokens), p keys of a key block. If a length is not a multiple of the block, the last block
starts early: the queries that it shares with the previous block are computed twice, and the shared keys are masked.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from mmx.kernels.dtypes import wide_dtype
from mmx.kernels.products import einsum

# Tokens of a block of queries or keys. The fastest of 64 to 512 with 8 heads of 32 on 2 CPU cores, 2026-11-22.
BLOCK = 256
# A single query reads a cache of up to this length as one block, because slices are copied (2,112 keys take 68 us as one block
# and 130 us in blocks; same machine and day).
SINGLE_BLOCK_KEYS = 4096
# Initial maximum: below any score but finite, so that exp(-inf - LOWEST) = 0 for a row that has not seen a key.
LOWEST = -1e30


def block_sizes(T: int, S: int) -> tuple[int, int]:
    """Returns the tokens of a query block and of a key block."""
    if T == 1:
        return 1, S if S <= SINGLE_BLOCK_KEYS else 2 * BLOCK
    return min(T, BLOCK), min(S, BLOCK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def attention(q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS, start_B, queries, keys, window=0):
    """Returns o_BHTV and lse_BHT as `api.softmax_attention` defines them.

    Args:
      segments_BT, segments_BS: both given, or both None.
      queries, keys: tokens of a query block and of a key block.
    """
    return forward(q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS, start_B, queries, keys, window)[0]


def forward(q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS, start_B, queries, keys, window=0, scales=None):
    """Returns (o_BHTV, lse_BHT) and the residuals of `backward`. With `scales` (k_scale_BGS, v_scale_BGS), k and v are int8."""
    (B, H, T, K), (_, G, S, V) = q_BHTK.shape, v_BGSV.shape
    visibility = Visibility(T, S, queries, keys, segments_BT, segments_BS, start_B, window)
    wide, scale, R = wide_dtype(q_BHTK.dtype), K ** -0.5, H // G
    q_BGRTK = q_BHTK.reshape(B, G, R, T, K)
    first_N, end_N = visibility.block_ranges(axis=1)
    full_Nu = visibility.fully_visible()

    def rescaled(x_BGQp, u, which):
        """Multiplies scores by the keys' scales (which=0), or weights by the values' scales (which=1).

        This is outside the products, so the int8 blocks are not scaled themselves.
        """
        return x_BGQp * _keys(scales[which], u, keys)[:, :, None] if scales else x_BGQp

    def query_block(n, carry):
        o_BGRTV, lse_BGRT = carry
        q_BGQK = _rows(q_BGRTK, n, queries)

        def attend(u, carry, full=False):
            o_BGQV, m_BGQ, l_BGQ = carry
            k_BGpK, v_BGpV = _keys(k_BGSK, u, keys), _keys(v_BGSV, u, keys)
            z_BGQp = rescaled(einsum("BGQK,BGpK->BGQp", q_BGQK, k_BGpK.astype(q_BGQK.dtype)), u, 0)
            z_BGQp = z_BGQp if full else visibility.mask(z_BGQp, n, u)
            new_m_BGQ = jnp.maximum(m_BGQ, z_BGQp.max(-1))
            p_BGQp = jnp.exp((z_BGQp - new_m_BGQ[..., None]) * scale)
            decay_BGQ = jnp.exp((m_BGQ - new_m_BGQ) * scale)
            weight_BGQp = rescaled(p_BGQp, u, 1).astype(q_BGQK.dtype)
            o_BGQV = o_BGQV * decay_BGQ[..., None] + einsum("BGQp,BGpV->BGQV", weight_BGQp, v_BGpV.astype(q_BGQK.dtype))
            return o_BGQV, new_m_BGQ, l_BGQ * decay_BGQ + p_BGQp.sum(-1)

        def key_block(u, carry):
            if T == 1:
                return attend(u, carry)
            # Masking takes a sixth of the forward pass. In the backward pass its cost is hidden by the exponential.
            return lax.cond(full_Nu[n, u], functools.partial(attend, full=True), attend, u, carry)

        start = (jnp.zeros_like(q_BGQK, wide, shape=(B, G, R * queries, V)),
                 jnp.full_like(q_BGQK, LOWEST, wide, shape=(B, G, R * queries)),
                 jnp.zeros_like(q_BGQK, wide, shape=(B, G, R * queries)))
        if keys == S:       # a loop would copy the cache
            o_BGQV, m_BGQ, l_BGQ = attend(0, start)
        else:
            o_BGQV, m_BGQ, l_BGQ = lax.fori_loop(first_N[n], end_N[n], key_block, start)
        o_BGQV /= jnp.where(l_BGQ > 0, l_BGQ, 1)[..., None]
        lse_BGQ = m_BGQ * scale + jnp.log(l_BGQ)        # -inf without visible keys
        return _put_rows(o_BGRTV, o_BGQV.astype(o_BGRTV.dtype), n, queries), _put_rows(lse_BGRT, lse_BGQ, n, queries)

    start = jnp.zeros_like(q_BGRTK, shape=(B, G, R, T, V)), jnp.zeros_like(q_BGRTK, wide, shape=(B, G, R, T))
    o_BGRTV, lse_BGRT = lax.fori_loop(0, len(first_N), query_block, start)
    out = o_BGRTV.reshape(B, H, T, V), lse_BGRT.reshape(B, H, T)
    return out, (q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS, start_B, *out)


def backward(queries, keys, window, residuals, cotangents):
    """Returns the gradients of `attention` with respect to q, k and v, and None for the other three arrays.

    Args:
      residuals: the six arrays given to `attention`, then o_BHTV and lse_BHT, from any implementation.
      cotangents: do_BHTV, dlse_BHT.
    """
    q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS, start_B, o_BHTV, lse_BHT = residuals
    do_BHTV, dlse_BHT = cotangents
    (B, _, T, K), (_, G, S, V) = q_BHTK.shape, v_BGSV.shape
    visibility = Visibility(T, S, queries, keys, segments_BT, segments_BS, start_B, window)
    wide, scale = lse_BHT.dtype, K ** -0.5
    q_BGRTK, do_BGRTV = q_BHTK.reshape(B, G, -1, T, K), do_BHTV.reshape(B, G, -1, T, V)
    # A query without visible keys has z = lse = -inf. With lse = +inf instead, p = exp(z - lse) is 0. Its dlse is often NaN,
    # the gradient of a logsumexp of -inf only; it is replaced by 0.
    empty_BHT = jnp.isneginf(lse_BHT)
    lse_BGRT = jnp.where(empty_BHT, jnp.inf, lse_BHT).reshape(B, G, -1, T)
    delta_BHT = einsum("BHTV,BHTV->BHT", o_BHTV, do_BHTV) - jnp.where(empty_BHT, 0, dlse_BHT)
    delta_BGRT = delta_BHT.reshape(lse_BGRT.shape)
    first_u, end_u = visibility.block_ranges(axis=0)

    def key_block(u, carry):
        dq_BGRTK, dk_BGSK, dv_BGSV = carry
        k_BGpK, v_BGpV = _keys(k_BGSK, u, keys), _keys(v_BGSV, u, keys)
        # Float32 queries keep their precision beside bfloat16 keys and values, as in the forward pass.
        wide_k_BGpK, wide_v_BGpV = (x.astype(jnp.promote_types(x.dtype, q_BHTK.dtype)) for x in (k_BGpK, v_BGpV))

        def query_block(n, carry):
            dq_BGRTK, dk_BGKp, dv_BGVp = carry
            q_BGQK, do_BGQV = _rows(q_BGRTK, n, queries), _rows(do_BGRTV, n, queries)
            lse_BGQ, delta_BGQ = _rows(lse_BGRT, n, queries), _rows(delta_BGRT, n, queries)
            z_BGQp = visibility.mask(einsum("BGQK,BGpK->BGQp", q_BGQK, wide_k_BGpK), n, u, repeated_queries=True)
            p_BGQp = jnp.exp(z_BGQp * scale - lse_BGQ[..., None])
            dp_BGQp = einsum("BGQV,BGpV->BGQp", do_BGQV, wide_v_BGpV)
            dz_BGQp = (p_BGQp * (dp_BGQp - delta_BGQ[..., None]) * scale).astype(k_BGpK.dtype)
            dq_BGQK = _rows(dq_BGRTK, n, queries) + einsum("BGQp,BGpK->BGQK", dz_BGQp, k_BGpK)
            # These sum over Q with the operand that has more columns last: in the other order XLA's CPU product takes 1.6
            # times as long.
            dk_BGKp += einsum("BGQK,BGQp->BGKp", q_BGQK, dz_BGQp.astype(wide_k_BGpK.dtype))
            dv_BGVp += einsum("BGQV,BGQp->BGVp", do_BGQV, p_BGQp.astype(do_BGQV.dtype))
            return _put_rows(dq_BGRTK, dq_BGQK, n, queries), dk_BGKp, dv_BGVp

        start = dq_BGRTK, *(jnp.zeros_like(x.swapaxes(2, 3), wide) for x in (k_BGpK, v_BGpV))
        dq_BGRTK, dk_BGKp, dv_BGVp = lax.fori_loop(first_u[u], end_u[u], query_block, start)
        return dq_BGRTK, _add_keys(dk_BGSK, dk_BGKp, u, keys), _add_keys(dv_BGSV, dv_BGVp, u, keys)

    start = tuple(jnp.zeros_like(x, wide) for x in (q_BGRTK, k_BGSK, v_BGSV))
    dq_BGRTK, dk_BGSK, dv_BGSV = lax.fori_loop(0, len(first_u), key_block, start)
    grads = dq_BGRTK.reshape(q_BHTK.shape), dk_BGSK, dv_BGSV
    return *(g.astype(x.dtype) for g, x in zip(grads, residuals)), None, None, None


attention.defvjp(forward, backward)


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which of S keys each of T queries sees: by blocks for the loops, by tokens for the scores."""
    T: int
    S: int
    queries: int            # tokens of a query block
    keys: int               # tokens of a key block
    segments_BT: jax.Array | None
    segments_BS: jax.Array | None
    start_B: jax.Array | None
    window: int = 0         # largest number of keys that a query sees, including its own position; 0: no limit

    def block_ranges(self, axis: int):
        """Returns the first block to visit and the end (exclusive), for each query block (axis 1) or key block (axis 0).

        Segments are ignored for a single query: to read the segment of every key would cost more than the keys skipped.
        """
        n_N1, u_u = self._block_indices()
        last_N1 = jnp.minimum((n_N1 + 1) * self.queries, self.T) - 1
        visit_Nu = last_N1 + self._starts().max() >= u_u * self.keys
        if self.window:
            first_N1 = jnp.minimum(n_N1 * self.queries, self.T - self.queries)
            visit_Nu &= first_N1 + self._starts().min() - jnp.minimum((u_u + 1) * self.keys, self.S) + 1 < self.window
        if self.segments_BT is not None and self.T > 1:
            low_BN, high_BN, _ = _document_range(self.segments_BT, self.queries)
            low_Bu, high_Bu, _ = _document_range(self.segments_BS, self.keys)
            visit_Nu &= ((low_BN[:, :, None] <= high_Bu[:, None]) & (low_Bu[:, None] <= high_BN[:, :, None])).any(0)
        other = (n_N1, u_u)[axis]
        return jnp.where(visit_Nu, other, other.size).min(axis), jnp.where(visit_Nu, other + 1, 0).max(axis)

    def fully_visible(self):
        """Returns for which pairs of blocks, N x U, every query sees every key."""
        n_N1, u_u = self._block_indices()
        first_N1 = jnp.minimum(n_N1 * self.queries, self.T - self.queries)
        full_Nu = first_N1 + self._starts().min() >= (u_u + 1) * self.keys - 1
        if self.window:
            first_u = jnp.minimum(u_u * self.keys, self.S - self.keys)
            full_Nu &= first_N1 + self.queries - 1 + self._starts().max() - first_u < self.window
        if self.segments_BT is not None:
            only_BN, only_Bu = (_document_range(x, size)[2] for x, size in
                                ((self.segments_BT, self.queries), (self.segments_BS, self.keys)))
            full_Nu &= ((only_BN[:, :, None] == only_Bu[:, None]) & (only_Bu > 0)[:, None]).all(0)
        return full_Nu

    def mask(self, z_BGQp, n, u, repeated_queries=False):
        """Returns the scores of a pair of blocks, with -inf where the query does not see the key.

        If the last block of queries starts early, it repeats queries of the previous block. `repeated_queries` also masks
        these, for sums over queries.
        """
        t_Q1 = jnp.minimum(n * self.queries, self.T - self.queries) + jnp.arange(self.queries)[:, None]
        s_p = jnp.minimum(u * self.keys, self.S - self.keys) + jnp.arange(self.keys)
        visible_BQp = (self._starts()[:, None, None] + t_Q1 >= s_p) & (s_p >= u * self.keys)
        if self.window:
            visible_BQp &= self._starts()[:, None, None] + t_Q1 - s_p < self.window
        if repeated_queries:
            visible_BQp &= t_Q1 >= n * self.queries
        if self.segments_BT is not None:
            segments_BQ1 = lax.dynamic_slice_in_dim(self.segments_BT, n * self.queries, self.queries, 1)[:, :, None]
            segments_B1p = lax.dynamic_slice_in_dim(self.segments_BS, u * self.keys, self.keys, 1)[:, None]
            visible_BQp &= (segments_BQ1 == segments_B1p) & (segments_BQ1 > 0)
        z_BGRQp = z_BGQp.reshape(*z_BGQp.shape[:2], -1, self.queries, self.keys)
        return jnp.where(visible_BQp[:, None, None], z_BGRQp, -jnp.inf).reshape(z_BGQp.shape)

    def _block_indices(self):
        return jnp.arange(-(-self.T // self.queries))[:, None], jnp.arange(-(-self.S // self.keys))

    def _starts(self):
        return jnp.zeros(1, jnp.int32) if self.start_B is None else self.start_B


def _document_range(segments_BT, size: int):
    """Returns the documents of each block of `size` tokens, B x N each.

    Returns:
      The lowest document, the highest, and the only one. In a block of padding the lowest is above the highest. The only
      document is 0 if the block contains several documents or padding.
    """
    T = segments_BT.shape[1]
    first_N1 = jnp.minimum(jnp.arange(0, T, size), T - size)[:, None]
    segments_BNQ = jnp.take(segments_BT, first_N1 + jnp.arange(size), axis=1)
    low_BN = jnp.where(segments_BNQ > 0, segments_BNQ, jnp.iinfo(segments_BT.dtype).max).min(2)
    high_BN = segments_BNQ.max(2)
    return low_BN, high_BN, jnp.where(segments_BNQ.min(2) == high_BN, high_BN, 0)


# XLA moves a slice that would pass the end of an array back until it fits. `Visibility.mask` relies on this.

def _rows(x_BGRT, n, queries):
    """Returns a block of queries of all R heads as rows. x may have one more axis."""
    x_BGRT = lax.dynamic_slice_in_dim(x_BGRT, n * queries, queries, 3)
    return x_BGRT.reshape(*x_BGRT.shape[:2], -1, *x_BGRT.shape[4:])


def _put_rows(x_BGRT, rows_BGQ, n, queries):
    rows_BGRT = rows_BGQ.reshape(*x_BGRT.shape[:3], queries, *x_BGRT.shape[4:])
    return lax.dynamic_update_slice_in_dim(x_BGRT, rows_BGRT, n * queries, 3)


def _keys(x_BGSK, u, keys):
    return lax.dynamic_slice_in_dim(x_BGSK, u * keys, keys, 2)


def _add_keys(x_BGSK, new_BGKp, u, keys):
    return lax.dynamic_update_slice_in_dim(x_BGSK, _keys(x_BGSK, u, keys) + new_BGKp.swapaxes(2, 3), u * keys, 2)
