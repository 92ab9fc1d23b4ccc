"""Lightning attention on NVIDIA GPUs, in three passes over spans of the sequence (Pallas-Triton), forward and backward.

The state depends on all tokens before it, so with one program per head most of a GPU would be idle. The sequence is therefore
divided into spans of 256 to 1,024 tokens, which are processed in parallel. Let S_n be the state before span n, and S_{n+1} the
state after it. With a, b, r and D as in docs/kernels.md, "Chunks":

    pass 1    U_n = sum_j b_j k_j^T v_j        over the tokens of span n; b is measured over the span
    pass 2    S_{n+1} = r_n S_n + U_n          over the spans, from the initial state; r_n is the decay over span n
    pass 3    o and S, chunk by chunk          for each span, starting with S = S_n

The gradients have the same form (docs/kernels.md, "Backward"), so the same kernels compute them. With dS_n the gradient of S_n,
passes 1 and 2 in reverse time compute, once for dv and dk,

    dS_n = r_n dS_{n+1} + sum_i a_i q_i^T do_i        from the gradient of the last state; a is measured over span n

Pass 3 starts span n with S_n for dq, and with dS_{n+1} for dv and dk.

A program of pass 3 processes one head, one span and `Tile.columns` columns of the state. The state (K x columns) and D are
float32 in registers. Tiles of q, k and v pass through shared memory. The scores, and copies of the state and of b v, are
rounded to the inputs' dtype before they enter a product. Sums are float32; products of float32 inputs are IEEE float32.

Pass 2 is a kernel that reads all U and writes all S once. Plain XLA would compute all S_n in one fusion, each from all earlier
U, with a number of reads quadratic in the number of spans.

FLOPs per token and head, with Q tokens in a chunk: pass 1: 2 K V. Pass 3: 4 K V + 2 Q V, and 2 Q K for the scores in each of
the V / columns programs.

HBM bytes per token and head, for elements of z bytes and spans of s tokens (ratio at K = V = 128, s = 1,024, bf16):

                moved by these kernels           inputs and outputs once    ratio
    forward     z (3 K + 3 V) + 16 K V / s       z (2 K + 2 V)              1.75
    backward    z (8 K + 8 V) + 36 K V / s       z (4 K + 3 V)              2.61

The programs for different columns of a span run at the same time. Only one of them reads q and k from HBM; the others read them
from the L2 cache.

Axis p is the tokens of a chunk as keys, where Q is the same tokens as queries; axis n is spans.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmx.kernels import platform
from mmx.kernels.lightning.documents import real_bounds, state_documents
from mmx.kernels.products import dot


class Tile(NamedTuple):
    """Sizes of a program of passes 1 and 3."""
    chunk: int      # tokens of a chunk
    columns: int    # columns of the state
    warps: int
    stages: int     # of the software pipeline over chunks


# {GPU: {(dtype, width): tile}}. `_tile` uses the first entry that has the inputs' dtype and a width of at least max(K, V).
# The tiles were chosen on 2026-11-23 among a few that compile without a spill in the hardest case: segments and a T that is not
# a multiple of the chunk. On 2026-11-27, 41 tiles were timed on an H100 (bfloat16, head dims of 128, 8,192 tokens). Forward,
# the tile below takes 0.424 ms and the fastest one 0.411 ms; forward and backward, 1.271 ms and 1.270 ms. The tiles for A100
# were never timed.
TILES = {
    "h100": {("bfloat16", 128): Tile(64, 64, 4, 2), ("bfloat16", 256): Tile(64, 64, 8, 2),
             ("float32", 256): Tile(16, 16, 8, 1)},
    "a100": {("bfloat16", 128): Tile(32, 64, 4, 3), ("bfloat16", 256): Tile(32, 64, 8, 2),
             ("float32", 256): Tile(16, 16, 8, 1)},
}
KEY_SLICE = 64      # key dims of one product; products with whole keys of 128 or 256 dims spill
SPANS = 1024, 512, 256          # tokens of a span; the first that fills the GPU is used
CHUNKS = 16, 32, 64, 128        # tokens of a chunk; a GPU supports those up to the chunk of its tile, the interpreter all


class Plan(NamedTuple):
    """Static sizes that a kernel is specialized for."""
    T: int
    span: int
    tile: Tile
    interpret: bool
    chip: str       # a key of TILES and platform.GPUS


class Kernels(NamedTuple):
    """An implementation of passes 1 and 3: the Pallas kernels of this file or the Triton kernels of `triton.py`."""
    contributions: Callable     # pass 1
    outputs: Callable           # pass 3
    array_refusal: Callable     # why the kernels do not support some arrays
    table: dict                 # like TILES


def forward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, chunk, interpret=False, kernels=None):
    """Returns o_BHTV and the last state; see `api.lightning_attention`. `segments_BT` may be None, `state_BHKV` may not."""
    contributions, carry, outputs = _passes(q_BHTK, v_BHTV, log_decay_H, segments_BT, chunk, interpret, kernels)
    state_nBHKV, state_BHKV = carry(contributions(k_BHTK, v_BHTV, reverse=False), state_BHKV, reverse=False)
    return outputs(q_BHTK, k_BHTK, v_BHTV, state_nBHKV, reverse=False, transposed=False), state_BHKV


def backward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, do_BHTV, dstate_BHKV, chunk, interpret=False,
             kernels=None):
    """Returns the gradients of q, k, v and the initial state, given the gradients of the results of `forward`."""
    contributions, carry, outputs = _passes(q_BHTK, v_BHTV, log_decay_H, segments_BT, chunk, interpret, kernels)
    do_BHTV = do_BHTV.astype(v_BHTV.dtype)
    state_nBHKV, _ = carry(contributions(k_BHTK, v_BHTV, reverse=False), state_BHKV, reverse=False)
    dstate_nBHKV, dstate_BHKV = carry(contributions(q_BHTK, do_BHTV, reverse=True), dstate_BHKV, reverse=True)
    dq_BHTK = outputs(do_BHTV, v_BHTV, k_BHTK, state_nBHKV, reverse=False, transposed=True)
    dk_BHTK = outputs(v_BHTV, do_BHTV, q_BHTK, dstate_nBHKV, reverse=True, transposed=True)
    dv_BHTV = outputs(k_BHTK, q_BHTK, do_BHTV, dstate_nBHKV, reverse=True, transposed=False)
    return dq_BHTK, dk_BHTK, dv_BHTV, dstate_BHKV


def array_refusal(q_BHTK, v_BHTV, chunk, interpret=False, table=None) -> str:
    """Returns why the kernels do not support these arrays; empty if they do."""
    K, V = q_BHTK.shape[3], v_BHTV.shape[3]
    dtypes = q_BHTK.dtype.name, v_BHTV.dtype.name
    for letter, size in (("K", K), ("V", V)):
        if size not in (16, 32, 64, 128, 256):
            return f"{letter}={size}: the GPU kernels support head dims 16, 32, 64, 128 and 256; impl='xla' supports any"
    if dtypes not in (("bfloat16",) * 2, ("float32",) * 2):
        return f"q is {dtypes[0]} and v {dtypes[1]}: the GPU kernels support bfloat16 or float32 for both"
    largest = CHUNKS[-1] if interpret else _tile(q_BHTK, v_BHTV, table or TILES).chunk
    if chunk is not None and (chunk not in CHUNKS or chunk > largest):
        return (f"chunk={chunk}: with {dtypes[0]} heads of {max(K, V)} on {platform.gpu_model()} the GPU kernels support "
                f"chunks of {', '.join(str(c) for c in CHUNKS if c <= largest)} tokens, or None")
    return ""


def nearest_chunk(q_BHTK, v_BHTV, chunk):
    """Returns the largest supported chunk up to `chunk`, or the smallest one if all are larger. None stays None."""
    if chunk is None:
        return None
    limit = min(chunk, _tile(q_BHTK, v_BHTV, TILES).chunk)
    return max((c for c in CHUNKS if c <= limit), default=CHUNKS[0])


def _tile(q_BHTK, v_BHTV, table):
    """Returns the tile for these arrays on this GPU. Larger chunks would spill or need too much shared memory."""
    width = max(q_BHTK.shape[3], v_BHTV.shape[3])
    return next(tile for (name, max_width), tile in table[platform.gpu_model()].items()
                if name == q_BHTK.dtype.name and width <= max_width)


def _passes(q_BHTK, v_BHTV, log_decay_H, segments_BT, chunk, interpret, kernels):
    """Returns the three passes as functions, for these shapes, decays and documents."""
    kernels = kernels or Kernels(_contributions, _outputs, array_refusal, TILES)
    if reason := kernels.array_refusal(q_BHTK, v_BHTV, chunk, interpret):
        raise NotImplementedError(reason)
    plan = _plan(q_BHTK, v_BHTV, chunk, interpret, kernels.table)
    documents = _documents(segments_BT, plan)
    return (functools.partial(pass_, log_decay_H=log_decay_H, documents=documents, plan=plan)
            for pass_ in (kernels.contributions, _carry, kernels.outputs))


def _plan(q_BHTK, v_BHTV, chunk, interpret, table):
    B, H, T, K = q_BHTK.shape
    V, chip = v_BHTV.shape[3], platform.gpu_model()
    tile = _tile(q_BHTK, v_BHTV, table)
    tile = tile._replace(chunk=chunk or tile.chunk)
    programs = lambda span: B * H * pl.cdiv(T, span) * max(1, min(K, V) // tile.columns)
    span = next((s for s in SPANS if programs(s) >= platform.GPUS[chip].multiprocessors), SPANS[-1])
    return Plan(T, span, tile, interpret, chip)


class Documents(NamedTuple):
    """Where documents begin and end. The kernels get None instead if there are no segments."""
    segments_BT: jax.Array
    bounds_B2: jax.Array                # first real token, and one past the last: the state decays only between them
    state_documents_Bc: jax.Array       # document of the state before each of the chunks, and after the last one


def _documents(segments_BT, plan):
    if segments_BT is None:
        return None
    padded_BT = jnp.pad(segments_BT, ((0, 0), (0, -plan.T % plan.span)))        # every chunk of the last span needs an entry
    return Documents(segments_BT, real_bounds(segments_BT), state_documents(padded_BT, plan.tile.chunk))


def _carry(added_nBHKV, start_BHKV, log_decay_H, documents, plan, reverse):
    """Pass 2: returns the state before each span (in reverse time: after each span), and the last state."""
    edges = jnp.arange(len(added_nBHKV) + 1, dtype=jnp.int32) * plan.span        # first token of each span, and the end
    if documents is None:
        time_nB, same_nB = jnp.diff(jnp.minimum(edges, plan.T))[:, None], True
    else:
        chunks_per_span = plan.span // plan.tile.chunk
        span_documents = documents.state_documents_Bc[:, ::chunks_per_span].T       # of the states at the edges
        begin_B, end_B = documents.bounds_B2.T
        time_nB = jnp.diff(jnp.clip(edges[:, None], begin_B, end_B), axis=0)        # tokens of a span at which the state decays
        same_nB = span_documents[:-1] == span_documents[1:]
    r_nBH = jnp.where(jnp.asarray(same_nB)[..., None], jnp.exp(log_decay_H * time_nB[..., None]), 0)

    r_nBH = jnp.broadcast_to(r_nBH, added_nBHKV.shape[:3])
    _, B, H, K, V = added_nBHKV.shape
    keys = max(1, min(K, 256 // V))     # a program processes this many key dims of a head's states
    parts = K // keys
    block_spec, _ = _specs(H, parts, plan)
    states = block_spec((len(edges) - 1, None, None, keys, V), lambda b, h, n, part: (0, b, h, part, 0))
    state = block_spec((None, None, keys, V), lambda b, h, n, part: (b, h, part, 0))
    return pl.pallas_call(
        functools.partial(_carry_kernel, reverse=reverse), grid=(B * H * parts, 1),
        in_specs=[block_spec((len(edges) - 1, None, None), lambda b, h, n, part: (0, b, h)), states, state],
        out_specs=(states, state), out_shape=(added_nBHKV, start_BHKV), interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=2, num_stages=1), name="carry")(r_nBH, added_nBHKV, start_BHKV)


def _contributions(k_BHTK, v_BHTV, log_decay_H, documents, plan, reverse):
    """Pass 1: returns U_n of every span, in float32."""
    B, H, _, K = k_BHTK.shape
    V = v_BHTV.shape[3]
    columns = min(V, plan.tile.columns)
    spans = pl.cdiv(plan.T, plan.span)
    block_spec, token_spec = _specs(H, V // columns, plan)
    return _launch(
        _contribution_kernel, plan, documents, block_spec, (B * H * (V // columns), spans), (log_decay_H, k_BHTK, v_BHTV),
        (token_spec(K), token_spec(columns, split=True)),
        block_spec((None, None, None, K, columns), lambda b, h, n, part: (n, b, h, 0, part)),
        jax.ShapeDtypeStruct((spans, B, H, K, V), jnp.float32), reverse=reverse)


def _outputs(q_BHTK, k_BHTK, v_BHTV, state_nBHKV, log_decay_H, documents, plan, reverse, transposed):
    """Pass 3: returns o_BHTV. If `transposed`, the states are given as V x K."""
    B, H, _, K = q_BHTK.shape
    V = v_BHTV.shape[3]
    columns = min(V, plan.tile.columns)
    block_spec, token_spec = _specs(H, V // columns, plan)
    if transposed:
        state = block_spec((None, None, None, columns, K), lambda b, h, n, part: (n, b, h, part, 0))
    else:
        state = block_spec((None, None, None, K, columns), lambda b, h, n, part: (n, b, h, 0, part))
    return _launch(
        _output_kernel, plan, documents, block_spec, (B * H * (V // columns), len(state_nBHKV)),
        (log_decay_H, state_nBHKV, q_BHTK, k_BHTK, v_BHTV),
        (state, token_spec(K), token_spec(K), token_spec(columns, split=True)),
        token_spec(columns, split=True), jax.ShapeDtypeStruct(v_BHTV.shape, v_BHTV.dtype), reverse=reverse,
        transposed=transposed)


def _specs(H, parts, plan):
    """Returns two functions that make block specs: one for any array, and one for the tokens of a span.

    The grid's first axis is (row b, head h, part of a state) flattened, and its second axis is the span n. A part is some
    columns of the state (in pass 2, some key dims). The part changes fastest, so that consecutive programs read the same q and
    k from the L2 cache.
    """
    def block_spec(shape, index):
        return pl.BlockSpec(shape, lambda i, n: index(i // (H * parts), i // parts % H, n, i % parts))

    def token_spec(width, split=False):
        return block_spec((None, None, plan.span, width), lambda b, h, n, part: (b, h, n, part if split else 0))
    return block_spec, token_spec


def _launch(kernel, plan, documents, block_spec, grid, arrays, specs, out_spec, out_shape, **static):
    """Runs a kernel of pass 1 or 3 on the arrays and, if there are segments, the arrays of `documents`."""
    document_specs = () if documents is None else (
        block_spec((None, plan.span), lambda b, h, n, part: (b, n)),
        block_spec((None, 2), lambda b, h, n, part: (b, 0)),
        block_spec((None, documents.state_documents_Bc.shape[1]), lambda b, h, n, part: (b, 0)))
    return pl.pallas_call(
        functools.partial(kernel, plan=plan, **static),
        grid=grid, in_specs=[block_spec((None,), lambda b, h, n, part: (h,)), *specs, *document_specs], out_specs=out_spec,
        out_shape=out_shape, interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=plan.tile.warps, num_stages=plan.tile.stages),
        name=kernel.__name__.strip("_"))(*arrays, *(documents or ()))


def _carry_kernel(r_ref, added_ref, start_ref, states_ref, end_ref, *, reverse):
    """Computes some key dims of one head's states before all spans."""
    spans = states_ref.shape[0]

    def step(i, state_KV):
        n = spans - 1 - i if reverse else i
        states_ref[n] = state_KV
        return r_ref[n] * state_KV + added_ref[n]
    end_ref[...] = jax.lax.fori_loop(0, spans, step, start_ref[...])


def _contribution_kernel(log_decay_ref, k_ref, v_ref, *refs, plan, reverse):
    """Computes U_n of one head, one span and some columns."""
    *document_refs, added_ref = refs
    span_start = pl.program_id(1) * plan.span
    decays = _decays(log_decay_ref[...], document_refs, plan, span_start)

    def step(chunk_index, added_KV):
        a_p, b_p, _ = decays(chunk_index, span_start, span_start + plan.span)
        v_pV = _load(v_ref, chunk_index, plan, span_start)
        v_pV = (v_pV * (a_p if reverse else b_p)[:, None]).astype(v_pV.dtype)
        return added_KV + dot(_load(k_ref, chunk_index, plan, span_start), v_pV, 0, 0)
    added_ref[...] = jax.lax.fori_loop(0, _chunks_in_span(plan, span_start), step, jnp.zeros(added_ref.shape, jnp.float32))


def _output_kernel(log_decay_ref, state_ref, q_ref, k_ref, v_ref, *refs, plan, reverse, transposed):
    """Computes the outputs of one head, one span and some columns."""
    *document_refs, o_ref = refs
    span_start = pl.program_id(1) * plan.span
    chunk, chunks = plan.tile.chunk, _chunks_in_span(plan, span_start)
    log_decay = log_decay_ref[...]
    decays = _decays(log_decay, document_refs, plan, span_start)
    distance_Qp = jnp.arange(chunk, dtype=jnp.int32)[:, None] - jnp.arange(chunk, dtype=jnp.int32)[None, :]
    distance_Qp = -distance_Qp if reverse else distance_Qp
    decay_Qp = jnp.where(distance_Qp >= 0, jnp.exp(log_decay * jnp.maximum(distance_Qp, 0).astype(jnp.float32)), 0.0)

    width = min(KEY_SLICE, q_ref.shape[1])
    key_slices = [pl.ds(start, width) for start in range(0, q_ref.shape[1], width)]

    def step(i, states_KV):
        chunk_index = chunks - 1 - i if reverse else i
        chunk_start = span_start + chunk_index * chunk
        a_Q, b_p, r = decays(chunk_index, chunk_start, chunk_start + chunk)
        a_Q, b_p = (b_p, a_Q) if reverse else (a_Q, b_p)
        v_pV = _load(v_ref, chunk_index, plan, span_start)
        decayed_v_pV = (v_pV * b_p[:, None]).astype(v_pV.dtype)
        scores_Qp, o_QV, next_states_KV = 0.0, 0.0, []
        for key_slice, state_KV in zip(key_slices, states_KV):
            q_QK, k_pK = (_load(ref, chunk_index, plan, span_start, key_slice) for ref in (q_ref, k_ref))
            scores_Qp += dot(q_QK, k_pK, 1, 1)
            o_QV += dot(q_QK, state_KV.astype(q_QK.dtype), 1, 0)
            next_states_KV.append(r * state_KV + dot(k_pK, decayed_v_pV, 0, 0))
        scores_Qp *= decay_Qp
        if document_refs:
            segments_Q = _load(document_refs[0], chunk_index, plan, span_start)
            same_Qp = (segments_Q[:, None] == segments_Q[None, :]) & (segments_Q > 0)[None, :]
            scores_Qp = jnp.where(same_Qp, scores_Qp, 0.0)
        o_QV = a_Q[:, None] * o_QV + dot(scores_Qp.astype(v_pV.dtype), v_pV, 1, 0)
        o_chunk_ref, mask = _chunk_tokens(o_ref, chunk_index, plan, span_start)
        plgpu.store(o_chunk_ref, o_QV.astype(o_ref.dtype), mask=mask)
        return tuple(next_states_KV)
    states_KV = [state_ref[:, key_slice].T if transposed else state_ref[key_slice, :] for key_slice in key_slices]
    jax.lax.fori_loop(0, chunks, step, tuple(states_KV))


def _decays(log_decay, document_refs, plan, span_start):
    """Returns a function that computes a_Q and b_Q of the tokens of a chunk, and r.

    The function's arguments are (chunk_index, first, last). a, b and r are measured over the tokens `first` to `last` - 1: the
    whole span in pass 1, the chunk in pass 3.
    """
    chunk = plan.tile.chunk
    begin, end = (document_refs[1][0], document_refs[1][1]) if document_refs else (0, plan.T)
    clip = lambda token: jnp.clip(token, begin, end)        # counts only tokens at which the state decays
    decay = lambda elapsed: jnp.exp(log_decay * elapsed.astype(jnp.float32))

    def decays(chunk_index, first, last):
        time_Q = clip(span_start + chunk_index * chunk + 1 + jnp.arange(chunk, dtype=jnp.int32))
        a_Q, b_Q, r = decay(time_Q - clip(first)), decay(clip(last) - time_Q), decay(clip(last) - clip(first))
        if not document_refs:
            return a_Q, b_Q, r
        segments_ref, _, documents_ref = document_refs
        segments_Q = _load(segments_ref, chunk_index, plan, span_start)
        before, after = documents_ref[first // chunk], documents_ref[last // chunk]
        return (jnp.where(segments_Q == before, a_Q, 0.0), jnp.where(segments_Q == after, b_Q, 0.0),
                jnp.where(before == after, r, 0.0))
    return decays


def _chunks_in_span(plan, span_start):
    """Returns how many chunks contain tokens in the span that starts at token `span_start`."""
    if plan.T % plan.span == 0:
        return plan.span // plan.tile.chunk
    return pl.cdiv(jnp.minimum(plan.span, plan.T - span_start), plan.tile.chunk)


def _chunk_tokens(ref, chunk_index, plan, span_start, columns=...):
    """Returns a reference to a chunk of the span, and a mask that is False after token T - 1 (None: True everywhere)."""
    chunk = plan.tile.chunk
    chunk_ref = ref.at[pl.ds(chunk_index * chunk, chunk), columns]
    if plan.T % chunk == 0:
        return chunk_ref, None
    valid_Q = span_start + chunk_index * chunk + jnp.arange(chunk, dtype=jnp.int32) < plan.T
    return chunk_ref, jnp.broadcast_to(valid_Q.reshape(-1, *(1,) * (len(chunk_ref.shape) - 1)), chunk_ref.shape)


def _load(ref, chunk_index, plan, span_start, columns=...):
    """Loads a chunk of the span, with zeros after token T - 1."""
    chunk_ref, mask = _chunk_tokens(ref, chunk_index, plan, span_start, columns)
    return plgpu.load(chunk_ref, mask=mask, other=None if mask is None else 0)
