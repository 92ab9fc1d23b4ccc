"""Softmax attention on NVIDIA GPUs: flash attention (Pallas-Triton) of tokamax or of JAX, forward and backward.

This is a thin wrapper. JAX's own kernel is deprecated since JAX 0.11.1, in favour of tokamax (Python 3.12 and newer). From
that version on, tokamax is used if it is installed, with three exceptions that only JAX's kernel supports: the log-sum-exp,
described GPUs, and documents in rows of more than `MASK_TOKENS` tokens. tokamax's public function takes documents as a mask of
T x T bytes for each row; JAX's kernel takes segments. Both skip blocks above the diagonal.

JAX's kernel does not support grouped heads: the wrapper maps it over the R query heads of each KV head, so keys and values are
not repeated in memory. cuDNN supports segments only as a T x T mask too.
"""
import functools
import importlib
import importlib.util
import math
import warnings

import jax
import jax.numpy as jnp

from mmx.kernels import platform

DEPRECATED = jax.version.__version_info__ >= (0, 11, 1)
MASK_TOKENS = 16_384    # a mask of 256 MiB for each row
QUERY_BLOCK = 128       # queries of a block in the forward pass
# For JAX's kernel: keys of a block, and queries and keys of a block in the backward pass. A100's sizes were chosen on
# 2026-11-23 among a few that compile without a spill; they were never timed. H100's backward pass spills, but of eight sizes
# timed on 2026-11-27 it is among the fastest: 8,192 tokens with 64 heads of 128 take 12.6 ms with gradients, compared with
# 25.1 ms for A100's sizes.
BLOCKS = {"h100": (128, 64), "a100": (64, 32)}


def array_refusal(q_BHTK, k_BGSK, v_BGSV) -> str:
    """Returns why flash attention does not support these arrays; empty if it does."""
    T, K, V = q_BHTK.shape[2], q_BHTK.shape[3], v_BGSV.shape[3]
    if T % QUERY_BLOCK or K != V or K not in (64, 128):
        return f"T={T}, K={K}, V={V}: flash attention supports multiples of {QUERY_BLOCK} tokens and K = V = 64 or 128"
    if not q_BHTK.dtype == k_BGSK.dtype == v_BGSV.dtype == jnp.bfloat16:
        return f"q_BHTK is {q_BHTK.dtype}: flash attention supports bfloat16 only; it would round float32 to tf32"
    return "" if _jax_kernel() else f"JAX {jax.__version__} has no flash attention for GPUs; use an older one, or impl='xla'"


def attention(q_BHTK, k_BGSK, v_BGSV, segments_BT, with_lse=False, interpret=False):
    """Returns o_BHTV and, if `with_lse`, lse_BHT (without gradients), otherwise None.

    Padding is treated as a document: segment 0 attends to itself.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device is not None
    fits = segments_BT is None or q_BHTK.shape[2] <= MASK_TOKENS
    if has_tokamax() and fits and not (with_lse or described or interpret):
        return _tokamax(q_BHTK, k_BGSK, v_BGSV, segments_BT), None
    return _jax(q_BHTK, k_BGSK, v_BGSV, segments_BT, with_lse, interpret)


@functools.cache
def has_tokamax() -> bool:
    """Whether tokamax is installed and this JAX deprecates its own kernel."""
    return DEPRECATED and importlib.util.find_spec("tokamax") is not None


def _tokamax(q_BHTK, k_BGSK, v_BGSV, segments_BT):
    import tokamax

    mask_B1TS = None if segments_BT is None else segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    time_first = (jnp.einsum("BHTK->BTHK", x) for x in (q_BHTK, k_BGSK, v_BGSV))
    # tokamax can also use its Mosaic kernel on H100; that kernel cannot be checked without a GPU.
    o_BTHV = tokamax.dot_product_attention(*time_first, mask=mask_B1TS, is_causal=True, implementation="triton")
    return jnp.einsum("BTHV->BHTV", o_BTHV)


def _jax(q_BHTK, k_BGSK, v_BGSV, segments_BT, with_lse, interpret):
    B, H, T, K = q_BHTK.shape
    keys, back = BLOCKS[platform.gpu_model()]
    flash = _jax_kernel()
    blocks = flash.BlockSizes(block_q=QUERY_BLOCK, block_k=keys, block_q_dkv=back, block_kv_dkv=back, block_q_dq=back,
                              block_kv_dq=back)
    mha = functools.partial(flash.mha, sm_scale=K ** -0.5, causal=True, block_sizes=blocks, interpret=interpret,
                            return_residuals=with_lse)
    q_BRTGK = jnp.einsum("BGRTK->BRTGK", q_BHTK.reshape(B, k_BGSK.shape[1], -1, T, K))
    k_BSGK, v_BSGV = (jnp.einsum("BGSK->BSGK", x) for x in (k_BGSK, v_BGSV))
    out = jax.vmap(mha, (1, None, None, None), 1)(q_BRTGK, k_BSGK, v_BSGV, segments_BT)
    o_BRTGV, lse_BRGT = out if with_lse else (out, None)
    o_BHTV = jnp.einsum("BRTGV->BGRTV", o_BRTGV).reshape(q_BHTK.shape)
    # The library's log-sum-exp has base 2.
    return o_BHTV, jnp.einsum("BRGT->BGRT", lse_BRGT).reshape(B, H, T) * math.log(2) if with_lse else None


@functools.cache
def _jax_kernel():
    """JAX's flash attention, without its warning that it is deprecated; None in a JAX without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return importlib.import_module("jax.experimental.pallas.ops.gpu.attention")
        except ImportError:
            return None
