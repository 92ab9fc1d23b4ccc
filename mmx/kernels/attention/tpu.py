"""Softmax attention on TPU: JAX's splash attention, forward and backward, causal blocks above the diagonal skipped.

A thin wrapper: it has grouped KV heads and segments; the scale is ours.
"""
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128
BLOCKS = 512, 256, 128      # tokens, of queries and of keys: the largest that divides T (512: the library's advice on v5p)


def refusal(q_BHTK, k_BGSK, v_BGSV) -> str:
    """Why splash attention does not take these arrays; empty where it does."""
    T, K, V = q_BHTK.shape[2], q_BHTK.shape[3], v_BGSV.shape[3]
    if T % LANES or K % LANES or V % LANES:
        return f"T={T}, K={K}, V={V}: splash attention takes multiples of {LANES}"
    return "" if q_BHTK.dtype.name in ("bfloat16", "float32") else f"q_BHTK is {q_BHTK.dtype}; give bfloat16 or float32"


def attention(q_BHTK, k_BGSK, v_BGSV, segments_BT, with_lse=False, interpret=False):
    """o_BHTV and, where asked for, lse_BHT, through which no gradient goes; padding is a document like others."""
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
