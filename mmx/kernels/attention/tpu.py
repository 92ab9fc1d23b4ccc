"""Softmax attention on TPU: JAX's splash attention, forward and backward.

This is a thin wrapper. The library supports grouped KV heads and segments, and skips blocks above the diagonal. It does not
scale the scores; the wrapper scales the queries.
"""
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128
# Tokens of a block of queries or keys: the largest that divides T is used. The library recommends 512 on v5p.
BLOCKS = 512, 256, 128


def array_refusal(q_BHTK, k_BGSK, v_BGSV) -> str:
    """Returns why splash attention does not support these arrays; empty if it does."""
    T, K, V = q_BHTK.shape[2], q_BHTK.shape[3], v_BGSV.shape[3]
    if T % LANES or K % LANES or V % LANES:
        return f"T={T}, K={K}, V={V}: splash attention supports multiples of {LANES}"
    return "" if q_BHTK.dtype.name in ("bfloat16", "float32") else f"q_BHTK is {q_BHTK.dtype}; it must be bfloat16 or float32"


def attention(q_BHTK, k_BGSK, v_BGSV, segments_BT, with_lse=False, interpret=False):
    """Returns o_BHTV and, if `with_lse`, lse_BHT (without gradients), otherwise None.

    Padding is treated as a document: segment 0 attends to itself.
    """
    _, H, T, K = q_BHTK.shape
    block = next(b for b in BLOCKS if T % b == 0)
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in (
        "q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")})
    kernel = splash.make_splash_mha_single_device(mask=masks.MultiHeadMask([masks.CausalMask((T, T))] * H),
                                                  block_sizes=sizes, save_residuals=with_lse, interpret=interpret)
    q_BHTK = (q_BHTK * jnp.float32(K ** -0.5)).astype(q_BHTK.dtype)
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
    out = jax.vmap(kernel)(q_BHTK, k_BGSK, v_BGSV, segments)
    return (out[0], out[1][0]) if with_lse else (out, None)
