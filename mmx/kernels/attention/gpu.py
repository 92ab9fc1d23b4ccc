"""Softmax attention on NVIDIA GPUs: JAX's flash attention (Pallas-Triton), forward and backward.

This is a thin wrapper. The library supports segments and skips blocks above the diagonal. It does not support grouped heads:
the wrapper maps it over the R query heads of each KV head, so keys and values are not repeated in memory. cuDNN and Pallas'
Mosaic GPU kernels are not used: cuDNN supports segments only as a T x T mask, and the Mosaic kernels do not support them.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as flash

from mmx.kernels import platform

QUERY_BLOCK = 128       # queries of a block in the forward pass
# A100's sizes were chosen on 2026-11-23 among a few that compile without a spill; they were never timed. H100's backward pass
# spills, but of eight sizes timed on 2026-11-27 it is among the fastest: 8,192 tokens with 64 heads of 128 take 12.6 ms with
# gradients, compared with 25.1 ms for A100's sizes.
BLOCKS = {chip: flash.BlockSizes(block_q=QUERY_BLOCK, block_k=keys, block_q_dkv=back, block_kv_dkv=back, block_q_dq=back,
                                 block_kv_dq=back) for chip, keys, back in (("h100", 128, 64), ("a100", 64, 32))}


def array_refusal(q_BHTK, k_BGSK, v_BGSV) -> str:
    """Returns why flash attention does not support these arrays; empty if it does."""
    T, K, V = q_BHTK.shape[2], q_BHTK.shape[3], v_BGSV.shape[3]
    if T % QUERY_BLOCK or K != V or K not in (64, 128):
        return f"T={T}, K={K}, V={V}: flash attention supports multiples of {QUERY_BLOCK} tokens and K = V = 64 or 128"
    if not q_BHTK.dtype == k_BGSK.dtype == v_BGSV.dtype == jnp.bfloat16:
        return f"q_BHTK is {q_BHTK.dtype}: flash attention supports bfloat16 only; it would round float32 to tf32"
    return ""


def attention(q_BHTK, k_BGSK, v_BGSV, segments_BT, with_lse=False, interpret=False):
    """Returns o_BHTV and, if `with_lse`, lse_BHT (without gradients), otherwise None.

    Padding is treated as a document: segment 0 attends to itself.
    """
    B, H, T, K = q_BHTK.shape
    mha = functools.partial(flash.mha, sm_scale=K ** -0.5, causal=True, block_sizes=BLOCKS[platform.gpu_model()],
                            interpret=interpret, return_residuals=with_lse)
    q_BRTGK = jnp.einsum("BGRTK->BRTGK", q_BHTK.reshape(B, k_BGSK.shape[1], -1, T, K))
    k_BSGK, v_BSGV = (jnp.einsum("BGSK->BSGK", x) for x in (k_BGSK, v_BGSV))
    out = jax.vmap(mha, (1, None, None, None), 1)(q_BRTGK, k_BSGK, v_BSGV, segments_BT)
    o_BRTGV, lse_BRGT = out if with_lse else (out, None)
    o_BHTV = jnp.einsum("BRTGV->BGRTV", o_BRTGV).reshape(q_BHTK.shape)
    # The library's log-sum-exp has base 2.
    return o_BHTV, jnp.einsum("BRGT->BGRT", lse_BRGT).reshape(B, H, T) * math.log(2) if with_lse else None
