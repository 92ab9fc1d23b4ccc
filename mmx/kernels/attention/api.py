"""Softmax attention: the public function, its checks, and the choice of an implementation."""
import functools

import jax
import jax.numpy as jnp

from mmx.dims import check
from mmx.kernels import platform
from mmx.kernels.attention import gpu, tpu, xla
from mmx.kernels.dtypes import as_int32, check_floats

MODULES = {"xla": xla, "tpu": tpu, "gpu": gpu}
KERNEL_MIN_TOKENS = 128         # shorter sequences do not fill one block of a TPU or GPU kernel


def softmax_attention(q_BHTK, k_BGSK, v_BGSV, *, segments_BT=None, segments_BS=None, start_B=None, window=0,
                      scales=None, return_lse=False, impl=None):
    """Computes causal softmax attention with grouped KV heads (docs/model.md section 4).

    o_t = sum_s p_ts v_s, where p_t is the softmax of q_t . k_s / sqrt(K) over the keys s that query t sees. Each KV head
    is used by H / G consecutive query heads. Query t of row b has position start_b + t on the key axis. It sees the keys of its
    segment up to and including this position.

    Args:
      q_BHTK, k_BGSK, v_BGSV: queries, keys, values, float32 or bfloat16 (float64 under x64); any T, S >= 1.
      segments_BT: the document of each query, an integer. 0 is padding, whose output is zero. None: one document, no padding.
      segments_BS: the document of each key. No query sees keys of segment 0. None: if start_B is None, the same as
        segments_BT; otherwise all keys belong to one document, without padding.
      start_B: position of each row's first query on the key axis; it may be negative. With a cache, it is the number of cached
        tokens before the queries. In ring attention, where the keys are one part of the sequence, it is the position of the
        first query minus that of the first key. None: 0.
      window: number of keys that a query sees at most, its own position included. 0: no limit.
      scales: (k_scale_BGS, v_scale_BGS), which multiply int8 keys and values; there are no gradients then. None: keys and
        values are floating-point.
      return_lse: whether to return lse_BHT too.
      impl: "xla"; "tpu" (splash attention) or "gpu" (flash attention), for whole sequences only. None: chosen by platform,
        dtype and shape.

    Returns:
      o_BHTV in q's dtype; zero for a query that sees no key. If return_lse, (o_BHTV, lse_BHT), where lse is the log of the
      sum of exp(q_t . k_s / sqrt(K)) over the keys that t sees: float32 (float64 for float64 inputs), -inf without visible
      keys. lse has gradients. It combines results o_i, lse_i over disjoint parts of the keys: o = sum_i exp(lse_i - lse) o_i,
      lse = logsumexp_i lse_i.

    Raises:
      ValueError: shapes or dtypes do not match.
      NotImplementedError: the named implementation does not exist, or cannot run here or on these arrays.
    """
    check(q_BHTK, "BHTK", "q_BHTK")
    B, H, T, K = q_BHTK.shape
    check(k_BGSK, "BGSK", "k_BGSK", B=B, K=K)
    G, S = k_BGSK.shape[1:3]
    check(v_BGSV, "BGSV", "v_BGSV", B=B, G=G, S=S)
    if H % G:
        raise ValueError(f"q_BHTK has H={H} heads, which must be a multiple of the G={G} heads of k_BGSK")
    if start_B is not None:
        check(start_B, "B", "start_B", B=B)
        start_B = as_int32(start_B, "start_B")
    if segments_BT is not None:
        check(segments_BT, "BT", "segments_BT", B=B, T=T)
        same_segments = segments_BS is segments_BT
        segments_BT = as_int32(segments_BT, "segments_BT")
        segments_BS = segments_BT if same_segments else segments_BS
        if segments_BS is None and start_B is None:
            segments_BS = segments_BT
        elif segments_BS is None:
            segments_BT, segments_BS = jnp.minimum(segments_BT, 1), jnp.ones_like(segments_BT, shape=(B, S))
    if segments_BS is not None:
        if segments_BT is None:
            raise ValueError("segments_BS was given without segments_BT; give both")
        check(segments_BS, "BS", "segments_BS", B=B, S=S)
        segments_BS = segments_BT if segments_BS is segments_BT else as_int32(segments_BS, "segments_BS")
    arrays = q_BHTK, k_BGSK, v_BGSV
    if scales:
        check_floats(q_BHTK=q_BHTK)
        for name, x in zip(("k_scale_BGS", "v_scale_BGS"), scales):
            check(x, "BGS", name, B=B, G=G, S=S)
    else:
        check_floats(q_BHTK=q_BHTK, k_BGSK=k_BGSK, v_BGSV=v_BGSV)
    whole_sequence = start_B is None and T == S and segments_BS is segments_BT and not scales and not window
    if impl or (whole_sequence and T >= KERNEL_MIN_TOKENS):
        refusal = lambda impl: _refusal(impl, *arrays, whole_sequence)
        impl = platform.choose("softmax attention", impl, tuple(MODULES), refusal, q_BHTK)
    else:
        impl = "xla"        # No kernel supports this case, so no warning is issued.
    if scales:
        o_BHTV, lse_BHT = xla.forward(*arrays, segments_BT, segments_BS, start_B, *xla.block_sizes(T, S), window, scales)[0]
    elif impl == "xla":
        o_BHTV, lse_BHT = xla.attention(*arrays, segments_BT, segments_BS, start_B, *xla.block_sizes(T, S), window)
    else:
        o_BHTV, lse_BHT = (_kernel_with_lse if return_lse else _kernel)(*arrays, segments_BT, impl)
    return (o_BHTV, lse_BHT) if return_lse else o_BHTV


def _refusal(impl, q_BHTK, k_BGSK, v_BGSV, whole_sequence) -> str:
    """Returns why the implementation cannot run here or on these arrays; empty if it can."""
    if impl == "xla":
        return ""
    if reason := platform.device_refusal(impl, q_BHTK):
        return reason
    if not whole_sequence:
        return (f"T={q_BHTK.shape[2]} queries with S={k_BGSK.shape[2]} keys of a cache, of other segments or in a window; "
                "the kernels support whole sequences only")
    return MODULES[impl].array_refusal(q_BHTK, k_BGSK, v_BGSV)


def _kernel(q_BHTK, k_BGSK, v_BGSV, segments_BT, impl, with_lse=False):
    """Runs a library's kernel, and masks the results of padding, which the libraries treat as a document."""
    o_BHTV, lse_BHT = MODULES[impl].attention(q_BHTK, k_BGSK, v_BGSV, segments_BT, with_lse)
    if segments_BT is not None:
        real_B1T = (segments_BT > 0)[:, None]
        o_BHTV = jnp.where(real_B1T[..., None], o_BHTV, 0)
        lse_BHT = jnp.where(real_B1T, lse_BHT, -jnp.inf) if with_lse else None
    return o_BHTV, lse_BHT


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _kernel_with_lse(q_BHTK, k_BGSK, v_BGSV, segments_BT, impl):
    """Runs a library's kernel with lse. The libraries do not differentiate lse, so XLA's backward pass is used."""
    return _kernel(q_BHTK, k_BGSK, v_BGSV, segments_BT, impl, with_lse=True)


def _kernel_forward(q_BHTK, k_BGSK, v_BGSV, segments_BT, impl):
    out = _kernel_with_lse(q_BHTK, k_BGSK, v_BGSV, segments_BT, impl)
    return out, (q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BT, None, *out)


def _kernel_backward(impl, residuals, cotangents):
    T = residuals[0].shape[2]
    return xla.backward(*xla.block_sizes(T, T), 0, residuals, cotangents)[:4]


_kernel_with_lse.defvjp(_kernel_forward, _kernel_backward)
