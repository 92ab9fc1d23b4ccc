"""Lightning attention on NVIDIA GPUs: passes 1 and 3 of `gpu.py` written in Triton. Needs the package jax-triton.

The algorithm, plan, rounding, bytes and FLOPs are the same as in `gpu.py`, and its pass 2 is used unchanged.

jax-triton reports no error for a kernel that spills or that needs more shared memory than a GPU has;
`mmx.compilers.ptx.read_dump` reads both from the compiled kernels. jax-triton cannot run on a CPU. To interpret the kernels,
set TRITON_INTERPRET=1 before triton is imported, and replace `triton_call` as in tests/kernels/lightning_triton_on_cpu.py.
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
if jax.version.__version_info__ >= (0, 12) and jax_triton.__version_info__ <= (0, 4, 1):
    raise ImportError(f"jax-triton {jax_triton.__version__} fails with JAX {jax.__version__}: its rule for unused results "
                      "takes two arguments, and JAX 0.12 passes three; use impl='gpu', JAX 0.11, or a newer jax-triton")

# The same table as `gpu.TILES`, for Triton 3.9. The tiles were chosen on 2026-11-23 among a few that compile without a spill
# with segments and a T that is not a multiple of the chunk; they were not timed then. On H100, all tiles that were tried for
# float32 with head dims of 256 spill; the best one spills 16 bytes per thread.
TILES = {
    "h100": {("bfloat16", 128): gpu.Tile(64, 64, 4, 2), ("bfloat16", 256): gpu.Tile(64, 64, 8, 2),
             ("float32", 128): gpu.Tile(16, 16, 8, 1)},
    "a100": {("bfloat16", 128): gpu.Tile(32, 64, 8, 2), ("bfloat16", 256): gpu.Tile(32, 64, 8, 1),
             ("float32", 128): gpu.Tile(16, 16, 8, 1)},
}


def array_refusal(q_BHTK, v_BHTV, chunk, interpret=False) -> str:
    """Returns why the kernels do not support these arrays; empty if they do."""
    K, V = q_BHTK.shape[3], v_BHTV.shape[3]
    if q_BHTK.dtype == jnp.float32 and max(K, V) > 128:
        return f"K={K}, V={V} in float32: the Triton kernels support up to 128, impl='gpu' up to 256"
    return gpu.array_refusal(q_BHTK, v_BHTV, chunk, interpret, TILES)


def _contributions(k_BHTK, v_BHTV, log_decay_H, documents, plan, reverse):
    """Pass 1: returns U_n of every span, in float32."""
    B, H, T, K = k_BHTK.shape
    added_nBHKV = jax.ShapeDtypeStruct((triton.cdiv(T, plan.span), B, H, K, v_BHTV.shape[3]), jnp.float32)
    return _launch(_contribution_kernel, (k_BHTK, v_BHTV), added_nBHKV, log_decay_H, documents, plan, REVERSE=reverse)


def _outputs(q_BHTK, k_BHTK, v_BHTV, state_nBHKV, log_decay_H, documents, plan, reverse, transposed):
    """Pass 3: returns o_BHTV. If `transposed`, the states are given as V x K."""
    o_BHTV = jax.ShapeDtypeStruct(v_BHTV.shape, v_BHTV.dtype)
    return _launch(_output_kernel, (q_BHTK, k_BHTK, v_BHTV, state_nBHKV), o_BHTV, log_decay_H, documents, plan, REVERSE=reverse,
                   TRANSPOSED=transposed, SLICE=min(gpu.KEY_SLICE, k_BHTK.shape[3]))


def _launch(kernel, arrays, out_shape, log_decay_H, documents, plan, **static):
    *_, k_BHTK, v_BHTV = arrays[:3]
    B, H, T, K = k_BHTK.shape
    V = v_BHTV.shape[3]
    columns = min(V, plan.tile.columns)
    unused = (log_decay_H,) * 3     # without segments, the kernels do not read these three arguments, but they must be arrays
    return jax_triton.triton_call(
        log_decay_H, *(documents or unused), *arrays, kernel=kernel, out_shape=out_shape,
        grid=(B * H * (V // columns), triton.cdiv(T, plan.span)), num_warps=plan.tile.warps, num_stages=plan.tile.stages,
        compute_capability=platform.GPUS[plan.chip].capability, H=H, T=T, K=K, V=V, CHUNK=plan.tile.chunk, SPAN=plan.span,
        COLUMNS=columns, SEGMENTED=documents is not None, **static)


@triton.jit
def _contribution_kernel(log_decay_H, segments_BT, bounds_B2, documents_Bc, k_BHTK, v_BHTV, added_nBHKV,
                         H: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
                         SPAN: tl.constexpr, COLUMNS: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr):
    head, span_start, columns_V = _program(V, COLUMNS, SPAN)
    k_BHTK += head * T * K
    v_BHTV += head * T * V
    log_decay = tl.load(log_decay_H + head % H)
    keys_K = tl.arange(0, K)
    added_KV = tl.zeros((K, COLUMNS), tl.float32)
    for chunk_index in range(_chunks_in_span(span_start, T, CHUNK, SPAN)):
        t_p = span_start + chunk_index * CHUNK + tl.arange(0, CHUNK)
        a_p, b_p, _ = _decays(log_decay, segments_BT, bounds_B2, documents_Bc, head // H, t_p, span_start, span_start + SPAN,
                              T, CHUNK, SPAN, SEGMENTED)
        decay_p = a_p if REVERSE else b_p
        v_pV = _load(v_BHTV, t_p, columns_V, V, T, CHUNK)
        decayed_v_pV = (v_pV.to(tl.float32) * decay_p[:, None]).to(v_pV.dtype)
        k_pK = _load(k_BHTK, t_p, keys_K, K, T, CHUNK)
        added_KV = tl.dot(tl.trans(k_pK), decayed_v_pV, added_KV, input_precision="ieee")
    BH = tl.num_programs(0) // (V // COLUMNS)        # the first axis of the grid is (B H, parts of the columns)
    added_nBHKV += (tl.program_id(1).to(tl.int64) * BH + head) * K * V
    tl.store(added_nBHKV + keys_K[:, None] * V + columns_V[None, :], added_KV)


@triton.jit
def _output_kernel(log_decay_H, segments_BT, bounds_B2, documents_Bc, q_BHTK, k_BHTK, v_BHTV, state_nBHKV, o_BHTV,
                   H: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
                   SPAN: tl.constexpr, COLUMNS: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr,
                   TRANSPOSED: tl.constexpr, SLICE: tl.constexpr):
    head, span_start, columns_V = _program(V, COLUMNS, SPAN)
    q_BHTK += head * T * K
    k_BHTK += head * T * K
    v_BHTV += head * T * V
    o_BHTV += head * T * V
    BH = tl.num_programs(0) // (V // COLUMNS)        # the first axis of the grid is (B H, parts of the columns)
    state_nBHKV += (tl.program_id(1).to(tl.int64) * BH + head) * K * V
    key_stride: tl.constexpr = 1 if TRANSPOSED else V
    value_stride: tl.constexpr = K if TRANSPOSED else 1
    states_KV = ()
    for first_key in tl.static_range(0, K, SLICE):
        keys_K = first_key + tl.arange(0, SLICE)
        states_KV += (tl.load(state_nBHKV + keys_K[:, None] * key_stride + columns_V[None, :] * value_stride),)

    log_decay = tl.load(log_decay_H + head % H)
    i_Q = tl.arange(0, CHUNK)
    distance_Qp = i_Q[None, :] - i_Q[:, None] if REVERSE else i_Q[:, None] - i_Q[None, :]
    decay_Qp = tl.where(distance_Qp >= 0, tl.exp(log_decay * tl.maximum(distance_Qp, 0).to(tl.float32)), 0.0)

    chunks = _chunks_in_span(span_start, T, CHUNK, SPAN)
    for i in range(chunks):
        chunk_start = span_start + (chunks - 1 - i if REVERSE else i) * CHUNK
        t_Q = chunk_start + i_Q
        a_Q, b_Q, r = _decays(log_decay, segments_BT, bounds_B2, documents_Bc, head // H, t_Q, chunk_start,
                              chunk_start + CHUNK, T, CHUNK, SPAN, SEGMENTED)
        from_state_Q, to_state_p = (b_Q, a_Q) if REVERSE else (a_Q, b_Q)
        v_pV = _load(v_BHTV, t_Q, columns_V, V, T, CHUNK)
        decayed_v_pV = (v_pV.to(tl.float32) * to_state_p[:, None]).to(v_pV.dtype)
        scores_Qp = tl.zeros((CHUNK, CHUNK), tl.float32)
        o_QV = tl.zeros((CHUNK, COLUMNS), tl.float32)
        next_states_KV = ()
        for first_key in tl.static_range(0, K, SLICE):
            keys_K = first_key + tl.arange(0, SLICE)
            q_QK = _load(q_BHTK, t_Q, keys_K, K, T, CHUNK)
            k_pK = _load(k_BHTK, t_Q, keys_K, K, T, CHUNK)
            state_KV = states_KV[first_key // SLICE]
            scores_Qp = tl.dot(q_QK, tl.trans(k_pK), scores_Qp, input_precision="ieee")
            o_QV = tl.dot(q_QK, state_KV.to(q_QK.dtype), o_QV, input_precision="ieee")
            next_states_KV += (tl.dot(tl.trans(k_pK), decayed_v_pV, r * state_KV, input_precision="ieee"),)
        states_KV = next_states_KV
        scores_Qp *= decay_Qp
        if SEGMENTED:
            segments_Q = _segments(segments_BT, head // H, t_Q, T, CHUNK)
            same_Qp = (segments_Q[:, None] == segments_Q[None, :]) & (segments_Q > 0)[None, :]
            scores_Qp = tl.where(same_Qp, scores_Qp, 0.0)
        o_QV = tl.dot(scores_Qp.to(v_pV.dtype), v_pV, from_state_Q[:, None] * o_QV, input_precision="ieee")
        pointers_QV = o_BHTV + t_Q[:, None] * V + columns_V[None, :]
        if T % CHUNK == 0:
            tl.store(pointers_QV, o_QV.to(v_pV.dtype))
        else:
            tl.store(pointers_QV, o_QV.to(v_pV.dtype), mask=(t_Q < T)[:, None])


@triton.jit
def _program(V: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """Returns the head of this program (among all B H heads), the first token of its span, and its columns.

    Consecutive programs have different columns of the same head, so that they read q and k from the L2 cache.
    """
    x = tl.program_id(0)
    head = (x // (V // COLUMNS)).to(tl.int64)        # int64: the offset of a head may exceed 2^31 elements
    return head, tl.program_id(1) * SPAN, x % (V // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _chunks_in_span(span_start, T: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr):
    """Returns how many chunks of the span contain tokens."""
    return (tl.minimum(SPAN, T - span_start) + CHUNK - 1) // CHUNK


@triton.jit
def _decays(log_decay, segments_BT, bounds_B2, documents_Bc, b, t_Q, first, last,
            T: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, SEGMENTED: tl.constexpr):
    """Returns a_Q and b_Q of the tokens t_Q of a chunk, and r.

    a, b and r are measured over the tokens `first` to `last` - 1: a whole span in pass 1, the chunk in pass 3.
    """
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
        chunks = (T + SPAN - 1) // SPAN * (SPAN // CHUNK)       # of a row, padded to whole spans
        documents_Bc += b * (chunks + 1)
        before, after = tl.load(documents_Bc + first // CHUNK), tl.load(documents_Bc + last // CHUNK)
        a_Q = tl.where(segments_Q == before, a_Q, 0.0)
        b_Q = tl.where(segments_Q == after, b_Q, 0.0)
        r = tl.where(before == after, r, 0.0)
    return a_Q, b_Q, r


@triton.jit
def _segments(segments_BT, b, t_Q, T: tl.constexpr, CHUNK: tl.constexpr):
    """Returns the segments of the tokens of a chunk; 0 after the last token."""
    if T % CHUNK == 0:
        segments_Q = tl.load(segments_BT + b * T + t_Q)
    else:
        segments_Q = tl.load(segments_BT + b * T + t_Q, mask=t_Q < T, other=0)
    return segments_Q


@triton.jit
def _load(x_Tw, t_Q, columns_w, WIDTH: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr):
    """Loads the tokens of a chunk from an array of T x WIDTH, with zeros after the last token."""
    pointers_Qw = x_Tw + t_Q[:, None] * WIDTH + columns_w[None, :]
    if T % CHUNK == 0:
        x_Qw = tl.load(pointers_Qw)
    else:
        x_Qw = tl.load(pointers_Qw, mask=(t_Q < T)[:, None], other=0.0)
    return x_Qw


KERNELS = gpu.Kernels(_contributions, _outputs, array_refusal, TILES)
forward, backward = (functools.partial(function, kernels=KERNELS) for function in (gpu.forward, gpu.backward))
