"""Softmax attention's one contract, whatever computes it."""
import functools

import jax
import jax.numpy as jnp

from mmx.dims import check
from mmx.kernels import platform
from mmx.kernels.attention import gpu, tpu, xla
from mmx.kernels.dtypes import as_int32, check_floats

MODULES = {"xla": xla, "tpu": tpu, "gpu": gpu}
FEW = 128           # tokens: fewer fill no block of a kernel


def softmax_attention(q_BHTK, k_BGSK, v_BGSV, *, segments_BT=None, segments_BS=None, start_B=None, window=0,
                      scales=None, return_lse=False, impl=None):
    """Causal attention with grouped KV heads (model.md section 4): KV head g serves query heads g R .. (g + 1) R - 1.

    o_t = sum_s p_ts v_s with p_t the softmax over the keys s that t sees of q_t . k_s / sqrt(K). Query t of row b
    stands at start_b + t on the key axis, sees itself and what is before it, and of that its own segment alone.

    Args:
      q_BHTK, k_BGSK, v_BGSV: queries, keys, values, float32 or bfloat16 (float64 under x64); any T, S >= 1.
      segments_BT: the queries' documents, ints; 0 is padding, whose output is zero. None: all in one document.
      segments_BS: the keys' documents; 0 is seen by nothing. None: with a start, all keys are valid; without, keys and
        queries are the same tokens, and so are their segments.
      start_B: the key index of each row's first query, for a chunk or one token against a cache of capacity S, whose
        keys past the last query are never seen; keys before the first may lie elsewhere (then a start counts from the
        first key here, and is negative where all keys come after). None: 0.
      window: how many keys a query sees at most, itself the last of them, as they stand on the key axis; 0: all.
      scales: (k_scale_BGS, v_scale_BGS), by which int8 keys and values are multiplied; no gradients then. None: floats.
      return_lse: whether to return lse_BHT too.
      impl: "xla"; "tpu", splash attention, and "gpu", flash attention, for whole sequences; None picks by platform, dtype
        and shape. A named one runs or raises NotImplementedError with the reason.

    Returns:
      o_BHTV in q's dtype; zero for a query that sees nothing. With return_lse, (o_BHTV, lse_BHT): the log of the sum of
      exp(q_t . k_s / sqrt(K)) over the keys that t sees, float32 (float64 for float64 inputs), -inf where it sees none.
      It has gradients, and joins results over parts of the keys: o = sum_i exp(lse_i - lse) o_i, lse = logsumexp_i lse_i.
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
        start_B = as_int32(start_B, "start_B")
    if segments_BT is not None:
        check(segments_BT, "BT", "segments_BT", B=B, T=T)
        same = segments_BS is segments_BT
        segments_BT = as_int32(segments_BT, "segments_BT")
        segments_BS = segments_BT if same else segments_BS
        if segments_BS is None and start_B is None:
            segments_BS = segments_BT
        elif segments_BS is None:
            segments_BT, segments_BS = jnp.minimum(segments_BT, 1), jnp.ones_like(segments_BT, shape=(B, S))
    if segments_BS is not None:
        if segments_BT is None:
            raise ValueError("segments_BS needs segments_BT: a query sees the keys of its own segment")
        check(segments_BS, "BS", "segments_BS", B=B, S=S)
        segments_BS = segments_BT if segments_BS is segments_BT else as_int32(segments_BS, "segments_BS")
    arrays = q_BHTK, k_BGSK, v_BGSV
    if scales:
        check_floats(q_BHTK=q_BHTK)
        for name, x in zip(("k_scale_BGS", "v_scale_BGS"), scales):
            check(x, "BGS", name, B=B, G=G, S=S)
    else:
        check_floats(q_BHTK=q_BHTK, k_BGSK=k_BGSK, v_BGSV=v_BGSV)
    own = start_B is None and T == S and segments_BS is segments_BT and not scales and not window
    if impl or (own and T >= FEW):
        impl = platform.choose("softmax attention", impl, tuple(MODULES), lambda impl: _refusal(impl, *arrays, own), q_BHTK)
    else:
        impl = "xla"        # a cache, keys of others, few tokens: nothing to tell of, no kernel here takes them
    if scales:
        o_BHTV, lse_BHT = xla.forward(*arrays, segments_BT, segments_BS, start_B, *xla.block_sizes(T, S), window, scales)[0]
    elif impl == "xla":
        o_BHTV, lse_BHT = xla.attention(*arrays, segments_BT, segments_BS, start_B, *xla.block_sizes(T, S), window)
    else:
        o_BHTV, lse_BHT = (_kernel_with_lse if return_lse else _kernel)(*arrays, segments_BT, impl)
    return (o_BHTV, lse_BHT) if return_lse else o_BHTV


def _refusal(impl, q_BHTK, k_BGSK, v_BGSV, own) -> str:
    """Why the implementation cannot run here, or on these arrays; empty where it can. `own`: keys are the queries' tokens."""
    if impl == "xla":
        return ""
    if reason := platform.refusal(impl, q_BHTK):
        return reason
    if not own:
        return (f"T={q_BHTK.shape[2]} queries against S={k_BGSK.shape[2]} keys of a cache, of other segments or in a window; "
                "the kernels take whole sequences")
    return MODULES[impl].refusal(q_BHTK, k_BGSK, v_BGSV)


def _kernel(q_BHTK, k_BGSK, v_BGSV, segments_BT, impl, with_lse=False):
    """A library's kernel, and padding that sees nothing."""
    o_BHTV, lse_BHT = MODULES[impl].attention(q_BHTK, k_BGSK, v_BGSV, segments_BT, with_lse)
    if segments_BT is not None:
        real_B1T = (segments_BT > 0)[:, None]
        o_BHTV = jnp.where(real_B1T[..., None], o_BHTV, 0)
        lse_BHT = jnp.where(real_B1T, lse_BHT, -jnp.inf) if with_lse else None
    return o_BHTV, lse_BHT


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _kernel_with_lse(q_BHTK, k_BGSK, v_BGSV, segments_BT, impl):
    """The libraries' own gradients know nothing of lse: here they are XLA's, from the kernel's results."""
    return _kernel(q_BHTK, k_BGSK, v_BGSV, segments_BT, impl, with_lse=True)


def _kernel_forward(q_BHTK, k_BGSK, v_BGSV, segments_BT, impl):
    out = _kernel_with_lse(q_BHTK, k_BGSK, v_BGSV, segments_BT, impl)
    return out, (q_BHTK, k_BGSK, v_BGSV, segments_BT, segments_BT, None, *out)


def _kernel_backward(impl, residuals, cotangents):
    T = residuals[0].shape[2]
    return xla.backward(*xla.block_sizes(T, T), 0, residuals, cotangents)[:4]


_kernel_with_lse.defvjp(_kernel_forward, _kernel_backward)
