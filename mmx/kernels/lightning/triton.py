"""Lightning attention on NVIDIA GPUs, the two passes over spans of `gpu.py` written in Triton: needs jax-triton.

The maths, the plan, the bytes and the FLOPs are those of `gpu.py`, whose marks and pass 2 are used as they are; only who
compiles the kernels differs. One kernel computes what every span brings to the state (pass 1), one the outputs from the
states before the spans (pass 3); with other arguments in other places they also give dq, dk and dv.

A program belongs to one head, one span and `values` columns of the state. In registers, float32: the state in pieces of
64 keys, the decays of a chunk's pairs. Through shared memory, as they were given: tiles of q, k, v of one chunk. Scores,
and copies of the state and of b v, are rounded to the inputs' dtype where they enter a product; sums are float32, and
products of float32 inputs are IEEE float32, never tf32.

jax-triton compiles a kernel that spills, or that no SM has the shared memory for, without a word:
`mmx.compilers.ptx.dumped` reads both from what it compiled. `interpret` needs TRITON_INTERPRET=1 before the import of triton,
and a stand-in for `triton_call` as in tests/kernels/lightning_triton_on_cpu.py: jax-triton itself runs nothing on a CPU.
"""
import functools

import jax
import jax.numpy as jnp

from mmx.kernels import platform
from mmx.kernels.lightning import gpu

try:
    import jax_triton
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"lightning attention in Triton needs jax-triton ({error}): pip install jax-triton") from None

# As `gpu.TILES`, for another compiler: chosen on 2026-11-23 among a few that compile without a spill with segments and a
# ragged T, by Triton 3.9; no time was measured. Nothing tried fits float32 at 256 on H100: at best 16 bytes a thread spill.
TILES = {
    "h100": {("bfloat16", 128): gpu.Tile(64, 64, 4, 2), ("bfloat16", 256): gpu.Tile(64, 64, 8, 2),
             ("float32", 128): gpu.Tile(16, 16, 8, 1)},
    "a100": {("bfloat16", 128): gpu.Tile(32, 64, 8, 2), ("bfloat16", 256): gpu.Tile(32, 64, 8, 1),
             ("float32", 128): gpu.Tile(16, 16, 8, 1)},
}


def refusal(q_BHTK, v_BHTV, chunk, interpret=False) -> str:
    """Why the kernels do not take these arrays; empty where they do."""
    K, V = q_BHTK.shape[3], v_BHTV.shape[3]
    if q_BHTK.dtype == jnp.float32 and max(K, V) > 128:
        return f"K={K}, V={V} in float32: the Triton kernels take up to 128, impl='gpu' up to 256"
    return gpu.refusal(q_BHTK, v_BHTV, chunk, interpret, TILES)


def _contributions(k_BHTK, v_BHTV, log_decay_H, marks, plan, reverse):
    """Pass 1: U_n, in float32."""
    B, H, T, K = k_BHTK.shape
    own_NBHKV = jax.ShapeDtypeStruct((triton.cdiv(T, plan.span), B, H, K, v_BHTV.shape[3]), jnp.float32)
    return _launch(_contribution_kernel, (k_BHTK, v_BHTV), own_NBHKV, log_decay_H, marks, plan, REVERSE=reverse)


def _outputs(q_BHTK, k_BHTK, v_BHTV, state_NBHKV, log_decay_H, marks, plan, reverse, transposed):
    """Pass 3; `transposed` says that the state comes as V x K."""
    o_BHTV = jax.ShapeDtypeStruct(v_BHTV.shape, v_BHTV.dtype)
    return _launch(_output_kernel, (q_BHTK, k_BHTK, v_BHTV, state_NBHKV), o_BHTV, log_decay_H, marks, plan, REVERSE=reverse,
                   TRANSPOSED=transposed, PIECE=min(gpu.PIECE, k_BHTK.shape[3]))


def _launch(kernel, arrays, out_shape, log_decay_H, marks, plan, **static):
    *_, k_BHTK, v_BHTV = arrays[:3]
    B, H, T, K = k_BHTK.shape
    V = v_BHTV.shape[3]
    values = min(V, plan.tile.values)
    unread = (log_decay_H,) * 3     # the kernels have a place for marks, where there are none too
    return jax_triton.triton_call(
        log_decay_H, *(marks or unread), *arrays, kernel=kernel, out_shape=out_shape,
        grid=(B * H * (V // values), triton.cdiv(T, plan.span)), num_warps=plan.tile.warps, num_stages=plan.tile.stages,
        compute_capability=platform.GPUS[plan.chip].capability, H=H, T=T, K=K, V=V, CHUNK=plan.tile.chunk, SPAN=plan.span,
        VALUES=values, SEGMENTED=marks is not None, **static)


@triton.jit
def _contribution_kernel(log_decay_H, segments_BT, bounds_B2, documents_BN, k_BHTK, v_BHTV, own_NBHKV,
                         H: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
                         SPAN: tl.constexpr, VALUES: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr):
    head, span, columns_V = _place(V, VALUES, SPAN)
    k_BHTK += head * T * K
    v_BHTV += head * T * V
    log_decay = tl.load(log_decay_H + head % H)
    keys_K = tl.arange(0, K)
    own_KV = tl.zeros((K, VALUES), tl.float32)
    for c in range(_chunks(span, T, CHUNK, SPAN)):
        t_Q = span + c * CHUNK + tl.arange(0, CHUNK)
        a_Q, b_Q, _ = _decays(log_decay, segments_BT, bounds_B2, documents_BN, head // H, t_Q, span, span + SPAN,
                              T, CHUNK, SPAN, SEGMENTED)
        decay_Q = a_Q if REVERSE else b_Q
        v_QV = _rows(v_BHTV, t_Q, columns_V, V, T, CHUNK)
        w_QV = (v_QV.to(tl.float32) * decay_Q[:, None]).to(v_QV.dtype)
        k_QK = _rows(k_BHTK, t_Q, keys_K, K, T, CHUNK)
        own_KV = tl.dot(tl.trans(k_QK), w_QV, own_KV, input_precision="ieee")
    own_NBHKV += (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // (V // VALUES)) + head) * K * V
    tl.store(own_NBHKV + keys_K[:, None] * V + columns_V[None, :], own_KV)


@triton.jit
def _output_kernel(log_decay_H, segments_BT, bounds_B2, documents_BN, q_BHTK, k_BHTK, v_BHTV, state_NBHKV, o_BHTV,
                   H: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
                   SPAN: tl.constexpr, VALUES: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr,
                   TRANSPOSED: tl.constexpr, PIECE: tl.constexpr):
    head, span, columns_V = _place(V, VALUES, SPAN)
    q_BHTK += head * T * K
    k_BHTK += head * T * K
    v_BHTV += head * T * V
    o_BHTV += head * T * V
    state_NBHKV += (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // (V // VALUES)) + head) * K * V
    key_stride: tl.constexpr = 1 if TRANSPOSED else V
    value_stride: tl.constexpr = K if TRANSPOSED else 1
    states_KV = ()
    for piece in tl.static_range(0, K, PIECE):
        keys_K = piece + tl.arange(0, PIECE)
        states_KV += (tl.load(state_NBHKV + keys_K[:, None] * key_stride + columns_V[None, :] * value_stride),)

    log_decay = tl.load(log_decay_H + head % H)
    i_Q = tl.arange(0, CHUNK)
    distance_QQ = i_Q[None, :] - i_Q[:, None] if REVERSE else i_Q[:, None] - i_Q[None, :]
    decay_QQ = tl.where(distance_QQ >= 0, tl.exp(log_decay * tl.maximum(distance_QQ, 0).to(tl.float32)), 0.0)

    chunks = _chunks(span, T, CHUNK, SPAN)
    for i in range(chunks):
        start = span + (chunks - 1 - i if REVERSE else i) * CHUNK
        t_Q = start + i_Q
        a_Q, b_Q, r = _decays(log_decay, segments_BT, bounds_B2, documents_BN, head // H, t_Q, start, start + CHUNK,
                              T, CHUNK, SPAN, SEGMENTED)
        from_Q, to_Q = (b_Q, a_Q) if REVERSE else (a_Q, b_Q)
        v_QV = _rows(v_BHTV, t_Q, columns_V, V, T, CHUNK)
        w_QV = (v_QV.to(tl.float32) * to_Q[:, None]).to(v_QV.dtype)
        scores_QQ = tl.zeros((CHUNK, CHUNK), tl.float32)
        o_QV = tl.zeros((CHUNK, VALUES), tl.float32)
        after_KV = ()
        for piece in tl.static_range(0, K, PIECE):
            keys_K = piece + tl.arange(0, PIECE)
            q_QK = _rows(q_BHTK, t_Q, keys_K, K, T, CHUNK)
            k_QK = _rows(k_BHTK, t_Q, keys_K, K, T, CHUNK)
            state_KV = states_KV[piece // PIECE]
            scores_QQ = tl.dot(q_QK, tl.trans(k_QK), scores_QQ, input_precision="ieee")
            o_QV = tl.dot(q_QK, state_KV.to(q_QK.dtype), o_QV, input_precision="ieee")
            after_KV += (tl.dot(tl.trans(k_QK), w_QV, r * state_KV, input_precision="ieee"),)
        states_KV = after_KV
        scores_QQ *= decay_QQ
        if SEGMENTED:
            segments_Q = _segments(segments_BT, head // H, t_Q, T, CHUNK)
            same_QQ = (segments_Q[:, None] == segments_Q[None, :]) & (segments_Q > 0)[None, :]
            scores_QQ = tl.where(same_QQ, scores_QQ, 0.0)
        o_QV = tl.dot(scores_QQ.to(v_QV.dtype), v_QV, from_Q[:, None] * o_QV, input_precision="ieee")
        at_QV = o_BHTV + t_Q[:, None] * V + columns_V[None, :]
        if T % CHUNK == 0:
            tl.store(at_QV, o_QV.to(v_QV.dtype))
        else:
            tl.store(at_QV, o_QV.to(v_QV.dtype), mask=(t_Q < T)[:, None])


@triton.jit
def _place(V: tl.constexpr, VALUES: tl.constexpr, SPAN: tl.constexpr):
    """The program's head of all B H, the first token of its span, its columns: these run fastest, so that they share L2."""
    x = tl.program_id(0)
    head = (x // (V // VALUES)).to(tl.int64)        # offsets from it pass 2^31 elements
    return head, tl.program_id(1) * SPAN, x % (V // VALUES) * VALUES + tl.arange(0, VALUES)


@triton.jit
def _chunks(span, T: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr):
    """Chunks that hold tokens in the span from token `span`."""
    return (tl.minimum(SPAN, T - span) + CHUNK - 1) // CHUNK


@triton.jit
def _decays(log_decay, segments_BT, bounds_B2, documents_BN, b, t_Q, first, last,
            T: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, SEGMENTED: tl.constexpr):
    """a and b of a chunk's tokens, and r, all measured from token `first` up to `last`."""
    if SEGMENTED:
        begin, end = tl.load(bounds_B2 + b * 2), tl.load(bounds_B2 + b * 2 + 1)
    else:
        begin, end = 0, T
    time_Q = tl.minimum(tl.maximum(t_Q + 1, begin), end)
    time_first = tl.minimum(tl.maximum(first, begin), end)
    time_last = tl.minimum(tl.maximum(last, begin), end)
    a_Q = tl.exp(log_decay * (time_Q - time_first).to(tl.float32))
    b_Q = tl.exp(log_decay * (time_last - time_Q).to(tl.float32))
    r = tl.exp(log_decay * (time_last - time_first).to(tl.float32))
    if SEGMENTED:
        segments_Q = _segments(segments_BT, b, t_Q, T, CHUNK)
        documents_BN += b * ((T + SPAN - 1) // SPAN * (SPAN // CHUNK) + 1)
        before, after = tl.load(documents_BN + first // CHUNK), tl.load(documents_BN + last // CHUNK)
        a_Q = tl.where(segments_Q == before, a_Q, 0.0)
        b_Q = tl.where(segments_Q == after, b_Q, 0.0)
        r = tl.where(before == after, r, 0.0)
    return a_Q, b_Q, r


@triton.jit
def _segments(segments_BT, b, t_Q, T: tl.constexpr, CHUNK: tl.constexpr):
    """The segments of a chunk's tokens, 0 after the last token."""
    if T % CHUNK == 0:
        segments_Q = tl.load(segments_BT + b * T + t_Q)
    else:
        segments_Q = tl.load(segments_BT + b * T + t_Q, mask=t_Q < T, other=0)
    return segments_Q


@triton.jit
def _rows(x_TK, t_Q, columns_K, WIDTH: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk's tokens of an array of T x WIDTH, zeros after the last token."""
    at_QK = x_TK + t_Q[:, None] * WIDTH + columns_K[None, :]
    if T % CHUNK == 0:
        x_QK = tl.load(at_QK)
    else:
        x_QK = tl.load(at_QK, mask=(t_Q < T)[:, None], other=0.0)
    return x_QK


KERNELS = gpu.Kernels(_contributions, _outputs, refusal, TILES)
forward, backward = (functools.partial(function, kernels=KERNELS) for function in (gpu.forward, gpu.backward))
