"""Softmax attention on NVIDIA GPUs: JAX's flash attention (Pallas-Triton), forward and backward, blocks above the diagonal
skipped.

A thin wrapper. The library has segments, and no groups: the R query heads of a KV head meet its keys and values along a
batch axis that these lack, so that nothing is repeated in memory. (cuDNN takes segments only as a mask of T x T, the Mosaic
GPU kernels take none.)
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as flash

from mmx.kernels import platform

FORWARD = 128           # queries of a block, forward
# A100's were chosen on 2026-11-23 among a few that compile without a spill, and never timed. H100's backward spills, and of
# eight timed on 2026-11-27 is among the fastest: 8,192 tokens, 64 heads of 128 take 12.6 ms with gradients, A100's 25.1.
BLOCKS = {chip: flash.BlockSizes(block_q=FORWARD, block_k=keys, block_q_dkv=back, block_kv_dkv=back, block_q_dq=back,
                                 block_kv_dq=back) for chip, keys, back in (("h100", 128, 64), ("a100", 64, 32))}


def refusal(q_BHTK, k_BGSK, v_BGSV) -> str:
    """Why flash attention does not take these arrays; empty where it does."""
    T, K, V = q_BHTK.shape[2], q_BHTK.shape[3], v_BGSV.shape[3]
    if T % FORWARD or K != V or K not in (64, 128):
        return f"T={T}, K={K}, V={V}: flash attention takes multiples of {FORWARD} tokens and K = V = 64 or 128"
    if not q_BHTK.dtype == k_BGSK.dtype == v_BGSV.dtype == jnp.bfloat16:
        return f"q_BHTK is {q_BHTK.dtype}: flash attention takes bfloat16, and would round float32 to tf32"
    return ""


def attention(q_BHTK, k_BGSK, v_BGSV, segments_BT, with_lse=False, interpret=False):
    """o_BHTV and, where asked for, lse_BHT, through which no gradient goes; padding is a document like others."""
    B, H, T, K = q_BHTK.shape
    mha = functools.partial(flash.mha, sm_scale=K ** -0.5, causal=True, block_sizes=BLOCKS[platform.gpu_model()],
                            interpret=interpret, return_residuals=with_lse)
    q_BRTGK = jnp.einsum("BGRTK->BRTGK", q_BHTK.reshape(B, k_BGSK.shape[1], -1, T, K))
    k_BSGK, v_BSGV = (jnp.einsum("BGSK->BSGK", x) for x in (k_BGSK, v_BGSV))
    out = jax.vmap(mha, (1, None, None, None), 1)(q_BRTGK, k_BSGK, v_BSGV, segments_BT)
    o_BRTGV, lse_BRGT = out if with_lse else (out, None)
    o_BHTV = jnp.einsum("BRTGV->BGRTV", o_BRTGV).reshape(q_BHTK.shape)
    # The library counts in powers of two.
    return o_BHTV, jnp.einsum("BRGT->BGRT", lse_BRGT).reshape(B, H, T) * math.log(2) if with_lse else None
