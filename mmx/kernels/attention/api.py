"""Softmax attention's one contract, whatever computes it."""
import jax.numpy as jnp

from mmx.dims import check
from mmx.kernels import platform
from mmx.kernels.attention import tpu, xla

IMPLS = ("xla", "tpu")


def softmax_attention(q_BHTK, k_BGSK, v_BGSV, *, segments_BT=None, segments_BS=None, start_B=None, impl=None):
    """Causal attention with grouped KV heads (model.md section 4): KV head g serves query heads g R .. (g + 1) R - 1.

    o_t = sum_s p_ts v_s with p_t the softmax over the keys s that t sees of q_t . k_s / sqrt(K). Query t of row b
    stands at start_b + t on the key axis, sees itself and what is before it, and of that its own segment alone.

    Args:
      q_BHTK, k_BGSK, v_BGSV: queries, keys, values, float32 or bfloat16 (float64 under x64); any T, S >= 1.
      segments_BT: the queries' documents, ints; 0 is padding, whose output is zero. None: all in one document.
      segments_BS: the keys' documents; 0 is seen by nothing. None: with a start, all keys are valid; without, keys and
        queries are the same tokens, and so are their segments.
      start_B: the key index of each row's first query, for a chunk or one token against a cache of capacity S, whose
        keys past the last query are never seen. None: 0.
      impl: "xla"; "tpu", splash attention, for whole sequences; None picks by platform and shape. A named one runs or
        raises NotImplementedError with the reason.

    Returns:
      o_BHTV in q's dtype. A query that sees nothing gives zero.
    """
    check(q_BHTK, "BHTK", "q_BHTK")
    B, H, T, K = q_BHTK.shape
    check(k_BGSK, "BGSK", "k_BGSK", B=B, K=K)
    G, S = k_BGSK.shape[1:3]
    check(v_BGSV, "BGSV", "v_BGSV", B=B, G=G, S=S)
    if H % G:
        raise ValueError(f"k_BGSK has G={G} heads, which does not divide the H={H} of q_BHTK")
    if start_B is not None:
        check(start_B, "B", "start_B", B=B)
    if segments_BT is not None:
        check(segments_BT, "BT", "segments_BT", B=B, T=T)
        if segments_BS is None and start_B is None:
            segments_BS = segments_BT
        elif segments_BS is None:
            segments_BT, segments_BS = jnp.minimum(segments_BT, 1), jnp.ones_like(segments_BT, shape=(B, S))
    if segments_BS is not None:
        if segments_BT is None:
            raise ValueError("segments_BS needs segments_BT: a query sees the keys of its own segment")
        check(segments_BS, "BS", "segments_BS", B=B, S=S)
    if impl not in (None, *IMPLS):
        raise NotImplementedError(f"impl={impl!r}: softmax attention has {', '.join(IMPLS)}")
    refusal = (f"this computation is for {platform.name()}" if platform.name() != "tpu" else
               tpu.refusal(q_BHTK, k_BGSK, v_BGSV, start_B))
    if impl == "tpu" and refusal:
        raise NotImplementedError(f"impl='tpu': {refusal}")
    if impl == "tpu" or (impl is None and not refusal and not platform.splits_by_itself()):
        return tpu.attention(q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS)
    return xla.attention(q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BS, start_B, *xla.block_sizes(T, S))
