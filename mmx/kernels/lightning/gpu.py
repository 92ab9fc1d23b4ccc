"""Lightning attention on NVIDIA GPUs, two passes over spans of the sequence (Pallas-Triton), forward and backward.

The state runs through the whole sequence, so one program a head would leave most of a GPU idle. A span is a stretch of
256 to 1,024 tokens; n counts spans, r_n is the decay over one, S_n the state before it (model.md section 3):

    1. U_n = sum_j b_j k_j^T v_j           every span by itself, from a state of zero
    2. S_{n+1} = r_n S_n + U_n             over spans: the given state enters here, documents cut here
    3. o_i = a_i q_i S + sum_{j <= i} D_ij (q_i . k_j) v_j,  S <- r S + sum_j b_j k_j^T v_j       chunk by chunk from S_n

a, b, r and D are those of `xla.py`, of a chunk in 3 and of a span in 1; no exponent is positive. The gradients are the
same three steps under other names, so there is one kernel for 1 and one for 3:

    dq = attention(do, v, k)               with S^T
    dv = attention(k, q, do)               in reverse time (a and b swap, D is transposed, U_n = sum_i a_i q_i^T do_i) with dS
    dk = attention(v, do, q)               in reverse time with dS^T

A program of 3 belongs to one head, one span and `values` columns of the state. The state (K x values) and the decays of
a chunk's pairs are float32 in registers; tiles of q, k, v pass through shared memory; the scores, and copies of the state
and of b v, are rounded to the inputs' dtype where they enter a product. Sums are float32; products of float32 inputs are
IEEE float32. Step 2 is a kernel of one multiply-add an element: XLA fuses the same recurrence so that every S_n re-reads
all U before it, N^2 / 2 states in place of 2 N.

FLOPs a token and head, Q tokens a chunk: 2 K V in 1; in 3 4 K V + 2 Q V, and 2 Q K for the scores in each of the V / values
programs. HBM bytes a token and head, z bytes an element, L tokens a span; programs of one span's columns run side by side,
so that what they share comes from L2 but once:
    forward    z (3 K + 3 V) + 16 K V / L,   of which  z (2 K + 2 V)  is compulsory:  1.75 x at K = V = 128, L = 1,024, bf16
    backward   z (8 K + 8 V) + 36 K V / L,   of which  z (4 K + 3 V)  is compulsory:  2.61 x
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmx.kernels import platform
from mmx.kernels.lightning import documents
from mmx.kernels.products import dot


class Tile(NamedTuple):
    chunk: int      # tokens a program takes at a time
    values: int     # columns of the state that a program of pass 3 keeps
    warps: int
    stages: int     # of the loop over chunks


# By the larger head dim. Chosen on 2026-11-23 among a few that compile without a spill in the hardest case, segments and a
# ragged T. Of 41 timed on an H100 on 2026-11-27 (bfloat16, 128, 8,192 tokens) its own takes 0.424 ms, the fastest 0.411; with
# gradients 1.271 and 1.270. A100's were never timed.
TILES = {
    "h100": {("bfloat16", 128): Tile(64, 64, 4, 2), ("bfloat16", 256): Tile(64, 64, 8, 2),
             ("float32", 256): Tile(16, 16, 8, 1)},
    "a100": {("bfloat16", 128): Tile(32, 64, 4, 3), ("bfloat16", 256): Tile(32, 64, 8, 2),
             ("float32", 256): Tile(16, 16, 8, 1)},
}
PIECE = 64      # keys a product takes: whole rows of 128 or 256 spill
SPANS = 1024, 512, 256
CHUNKS = 16, 32, 64, 128


class Plan(NamedTuple):
    """What is static: it makes the two kernels."""
    T: int
    span: int
    tile: Tile
    interpret: bool
    chip: str       # a key of TILES and platform.GPUS


class Kernels(NamedTuple):
    """Passes 1 and 3, and what they take: this file's, or another compiler's."""
    contributions: Callable
    outputs: Callable
    refusal: Callable
    tiles: dict


def forward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, chunk, interpret=False, kernels=None):
    """See `api.lightning_attention`; `segments_BT` may be None, `state_BHKV` is given."""
    contribute, carry, attend = _passes(q_BHTK, v_BHTV, log_decay_H, segments_BT, chunk, interpret, kernels)
    state_NBHKV, state_BHKV = carry(contribute(k_BHTK, v_BHTV, reverse=False), state_BHKV, reverse=False)
    return attend(q_BHTK, k_BHTK, v_BHTV, state_NBHKV, reverse=False, transposed=False), state_BHKV


def backward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, do_BHTV, dstate_BHKV, chunk, interpret=False,
             kernels=None):
    """The gradients of q, k, v and the initial state, from the inputs of `forward` alone."""
    contribute, carry, attend = _passes(q_BHTK, v_BHTV, log_decay_H, segments_BT, chunk, interpret, kernels)
    do_BHTV = do_BHTV.astype(v_BHTV.dtype)
    state_NBHKV, _ = carry(contribute(k_BHTK, v_BHTV, reverse=False), state_BHKV, reverse=False)
    dstate_NBHKV, dstate_BHKV = carry(contribute(q_BHTK, do_BHTV, reverse=True), dstate_BHKV, reverse=True)
    dq_BHTK = attend(do_BHTV, v_BHTV, k_BHTK, state_NBHKV, reverse=False, transposed=True)
    dk_BHTK = attend(v_BHTV, do_BHTV, q_BHTK, dstate_NBHKV, reverse=True, transposed=True)
    dv_BHTV = attend(k_BHTK, q_BHTK, do_BHTV, dstate_NBHKV, reverse=True, transposed=False)
    return dq_BHTK, dk_BHTK, dv_BHTV, dstate_BHKV


def refusal(q_BHTK, v_BHTV, chunk, interpret=False, tiles=None) -> str:
    """Why the kernels do not take these arrays; empty where they do."""
    tiles = tiles or TILES
    K, V = q_BHTK.shape[3], v_BHTV.shape[3]
    dtypes = q_BHTK.dtype.name, v_BHTV.dtype.name
    for letter, size in (("K", K), ("V", V)):
        if size not in (16, 32, 64, 128, 256):
            return f"{letter}={size}: the GPU kernels take head dims 16, 32, 64, 128 and 256; impl='xla' takes any"
    if dtypes not in (("bfloat16",) * 2, ("float32",) * 2):
        return f"q is {dtypes[0]} and v {dtypes[1]}: the GPU kernels take bfloat16 or float32 for both"
    most = CHUNKS[-1] if interpret else _tile(q_BHTK, v_BHTV, tiles).chunk
    if chunk is not None and (chunk not in CHUNKS or chunk > most):
        return (f"chunk={chunk}: with {dtypes[0]} heads of {max(K, V)} on {platform.gpu_model()} the GPU kernels take a chunk "
                f"of {', '.join(str(c) for c in CHUNKS if c <= most)} tokens, or None, which picks")
    return ""


def nearest_chunk(q_BHTK, v_BHTV, chunk):
    """The largest chunk that the kernels take, of those up to `chunk`, else the least; None stays None."""
    most = chunk and min(chunk, _tile(q_BHTK, v_BHTV, TILES).chunk)
    return chunk and max((c for c in CHUNKS if c <= most), default=CHUNKS[0])


def _tile(q_BHTK, v_BHTV, tiles):
    """What the table has for these arrays on the chip. Its chunk is the largest that neither spills nor lacks shared memory."""
    width = max(q_BHTK.shape[3], v_BHTV.shape[3])
    return next(t for (name, most), t in tiles[platform.gpu_model()].items() if name == q_BHTK.dtype.name and width <= most)


def _passes(q_BHTK, v_BHTV, log_decay_H, segments_BT, chunk, interpret, kernels):
    """The three passes, for these shapes, decays and documents."""
    kernels = kernels or Kernels(_contributions, _outputs, refusal, TILES)
    if reason := kernels.refusal(q_BHTK, v_BHTV, chunk, interpret):
        raise NotImplementedError(reason)
    plan = _plan(q_BHTK, v_BHTV, chunk, interpret, kernels.tiles)
    marks = _marks(segments_BT, plan)
    return (functools.partial(step, log_decay_H=log_decay_H, marks=marks, plan=plan)
            for step in (kernels.contributions, _carry, kernels.outputs))


def _plan(q_BHTK, v_BHTV, chunk, interpret, tiles):
    B, H, T, K = q_BHTK.shape
    V, chip = v_BHTV.shape[3], platform.gpu_model()
    tile = _tile(q_BHTK, v_BHTV, tiles)
    tile = tile._replace(chunk=chunk or tile.chunk)
    programs = lambda span: B * H * pl.cdiv(T, span) * max(1, min(K, V) // tile.values)
    span = next((s for s in SPANS if programs(s) >= platform.GPUS[chip].cores), SPANS[-1])
    return Plan(T, span, tile, interpret, chip)


class Marks(NamedTuple):
    """What the kernels know of documents: absent where there are no segments."""
    segments_BT: jax.Array
    bounds_B2: jax.Array        # the first real token, and one past the last: time stands still outside
    documents_BN: jax.Array     # the state's document before every chunk, and after the last


def _marks(segments_BT, plan):
    if segments_BT is None:
        return None
    spans_BT = jnp.pad(segments_BT, ((0, 0), (0, -plan.T % plan.span)))     # the last span's chunks all have a place
    return Marks(segments_BT, documents.bounds(segments_BT), documents.between(spans_BT, plan.tile.chunk))


def _carry(own_NBHKV, start_BHKV, log_decay_H, marks, plan, reverse):
    """Pass 2: the states before every span (after it in reverse time), and the one at the end."""
    edges_N = jnp.arange(len(own_NBHKV) + 1, dtype=jnp.int32) * plan.span
    if marks is None:
        time_NB, same_NB = jnp.diff(jnp.minimum(edges_N, plan.T))[:, None], True
    else:
        documents_NB = marks.documents_BN[:, ::plan.span // plan.tile.chunk].T
        time_NB = jnp.diff(jnp.clip(edges_N[:, None], *marks.bounds_B2.T), axis=0)
        same_NB = documents_NB[:-1] == documents_NB[1:]
    r_NBH = jnp.where(jnp.asarray(same_NB)[..., None], jnp.exp(log_decay_H * time_NB[..., None]), 0)

    r_NBH = jnp.broadcast_to(r_NBH, own_NBHKV.shape[:3])
    _, B, H, K, V = own_NBHKV.shape
    rows = max(1, min(K, 256 // V))
    tiles = K // rows
    place, _ = _specs(H, tiles, plan)
    states = place((len(edges_N) - 1, None, None, rows, V), lambda b, h, n, tile: (0, b, h, tile, 0))
    state = place((None, None, rows, V), lambda b, h, n, tile: (b, h, tile, 0))
    return pl.pallas_call(
        functools.partial(_carry_kernel, reverse=reverse), grid=(B * H * tiles, 1),
        in_specs=[place((len(edges_N) - 1, None, None), lambda b, h, n, tile: (0, b, h)), states, state],
        out_specs=(states, state), out_shape=(own_NBHKV, start_BHKV), interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=2, num_stages=1), name="carry")(r_NBH, own_NBHKV, start_BHKV)


def _contributions(k_BHTK, v_BHTV, log_decay_H, marks, plan, reverse):
    """Pass 1: U_n, in float32."""
    B, H, _, K = k_BHTK.shape
    V = v_BHTV.shape[3]
    values = min(V, plan.tile.values)
    N = pl.cdiv(plan.T, plan.span)
    place, tokens = _specs(H, V // values, plan)
    return _launch(
        _contribution_kernel, plan, marks, place, (B * H * (V // values), N), (log_decay_H, k_BHTK, v_BHTV),
        (tokens(K), tokens(values, tiled=True)),
        place((None, None, None, K, values), lambda b, h, n, tile: (n, b, h, 0, tile)),
        jax.ShapeDtypeStruct((N, B, H, K, V), jnp.float32), reverse=reverse)


def _outputs(q_BHTK, k_BHTK, v_BHTV, state_NBHKV, log_decay_H, marks, plan, reverse, transposed):
    """Pass 3; `transposed` says that the state comes as V x K."""
    B, H, _, K = q_BHTK.shape
    V = v_BHTV.shape[3]
    values = min(V, plan.tile.values)
    place, tokens = _specs(H, V // values, plan)
    if transposed:
        state = place((None, None, None, values, K), lambda b, h, n, tile: (n, b, h, tile, 0))
    else:
        state = place((None, None, None, K, values), lambda b, h, n, tile: (n, b, h, 0, tile))
    return _launch(
        _output_kernel, plan, marks, place, (B * H * (V // values), len(state_NBHKV)),
        (log_decay_H, state_NBHKV, q_BHTK, k_BHTK, v_BHTV), (state, tokens(K), tokens(K), tokens(values, tiled=True)),
        tokens(values, tiled=True), jax.ShapeDtypeStruct(v_BHTV.shape, v_BHTV.dtype), reverse=reverse,
        transposed=transposed)


def _specs(H, tiles, plan):
    """Two makers of block specs, for any place and for a span's tokens. Columns run fastest, so that they share L2."""
    def place(shape, index):
        return pl.BlockSpec(shape, lambda x, n: index(x // (H * tiles), x // tiles % H, n, x % tiles))

    def tokens(width, tiled=False):
        return place((None, None, plan.span, width), lambda b, h, n, tile: (b, h, n, tile if tiled else 0))
    return place, tokens


def _launch(kernel, plan, marks, place, grid, arrays, specs, out_spec, out_shape, **static):
    mark_specs = () if marks is None else (
        place((None, plan.span), lambda b, h, n, tile: (b, n)),
        place((None, 2), lambda b, h, n, tile: (b, 0)),
        place((None, marks.documents_BN.shape[1]), lambda b, h, n, tile: (b, 0)))
    return pl.pallas_call(
        functools.partial(kernel, plan=plan, **static),
        grid=grid, in_specs=[place((None,), lambda b, h, n, tile: (h,)), *specs, *mark_specs], out_specs=out_spec,
        out_shape=out_shape, interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=plan.tile.warps, num_stages=plan.tile.stages),
        name=kernel.__name__.strip("_"))(*arrays, *(marks or ()))


def _carry_kernel(r_ref, own_ref, start_ref, states_ref, end_ref, *, reverse):
    N = states_ref.shape[0]

    def step(i, state_KV):
        n = N - 1 - i if reverse else i
        states_ref[n] = state_KV
        return r_ref[n] * state_KV + own_ref[n]
    end_ref[...] = jax.lax.fori_loop(0, N, step, start_ref[...])


def _contribution_kernel(log_decay_ref, k_ref, v_ref, *refs, plan, reverse):
    *mark_refs, own_ref = refs
    span = pl.program_id(1) * plan.span
    decays = _decays(log_decay_ref[...], mark_refs, plan, span)

    def step(c, own_KV):
        a_Q, b_Q, _ = decays(c, span, span + plan.span)
        v_QV = _load(v_ref, c, plan, span)
        v_QV = (v_QV * (a_Q if reverse else b_Q)[:, None]).astype(v_QV.dtype)
        return own_KV + dot(_load(k_ref, c, plan, span), v_QV, 0, 0)
    own_ref[...] = jax.lax.fori_loop(0, _chunks(plan, span), step, jnp.zeros(own_ref.shape, jnp.float32))


def _output_kernel(log_decay_ref, state_ref, q_ref, k_ref, v_ref, *refs, plan, reverse, transposed):
    *mark_refs, o_ref = refs
    span = pl.program_id(1) * plan.span
    chunk, chunks = plan.tile.chunk, _chunks(plan, span)
    log_decay = log_decay_ref[...]
    decays = _decays(log_decay, mark_refs, plan, span)
    distance_QQ = jnp.arange(chunk, dtype=jnp.int32)[:, None] - jnp.arange(chunk, dtype=jnp.int32)[None, :]
    distance_QQ = -distance_QQ if reverse else distance_QQ
    decay_QQ = jnp.where(distance_QQ >= 0, jnp.exp(log_decay * jnp.maximum(distance_QQ, 0).astype(jnp.float32)), 0.0)

    width = min(PIECE, q_ref.shape[1])
    pieces = [pl.ds(at, width) for at in range(0, q_ref.shape[1], width)]

    def step(i, states_KV):
        c = chunks - 1 - i if reverse else i
        start = span + c * chunk
        a_Q, b_Q, r = decays(c, start, start + chunk)
        a_Q, b_Q = (b_Q, a_Q) if reverse else (a_Q, b_Q)
        v_QV = _load(v_ref, c, plan, span)
        w_QV = (v_QV * b_Q[:, None]).astype(v_QV.dtype)
        scores_QQ, o_QV, after_KV = 0.0, 0.0, []
        for piece, state_KV in zip(pieces, states_KV):
            q_QK, k_QK = (_load(ref, c, plan, span, piece) for ref in (q_ref, k_ref))
            scores_QQ += dot(q_QK, k_QK, 1, 1)
            o_QV += dot(q_QK, state_KV.astype(q_QK.dtype), 1, 0)
            after_KV.append(r * state_KV + dot(k_QK, w_QV, 0, 0))
        scores_QQ *= decay_QQ
        if mark_refs:
            segments_Q = _load(mark_refs[0], c, plan, span)
            same_QQ = (segments_Q[:, None] == segments_Q[None, :]) & (segments_Q > 0)[None, :]
            scores_QQ = jnp.where(same_QQ, scores_QQ, 0.0)
        o_QV = a_Q[:, None] * o_QV + dot(scores_QQ.astype(v_QV.dtype), v_QV, 1, 0)
        at, mask = _rows(o_ref, c, plan, span)
        plgpu.store(at, o_QV.astype(o_ref.dtype), mask=mask)
        return tuple(after_KV)
    states_KV = [state_ref[:, piece].T if transposed else state_ref[piece, :] for piece in pieces]
    jax.lax.fori_loop(0, chunks, step, tuple(states_KV))


def _decays(log_decay, mark_refs, plan, span):
    """A function to a and b of chunk c, and r, all measured from token `first` up to `last`."""
    chunk = plan.tile.chunk
    begin, end = (mark_refs[1][0], mark_refs[1][1]) if mark_refs else (0, plan.T)
    time = lambda tokens: jnp.clip(tokens, begin, end)
    decay = lambda elapsed: jnp.exp(log_decay * elapsed.astype(jnp.float32))

    def decays(c, first, last):
        time_Q = time(span + c * chunk + 1 + jnp.arange(chunk, dtype=jnp.int32))
        a_Q, b_Q, r = decay(time_Q - time(first)), decay(time(last) - time_Q), decay(time(last) - time(first))
        if not mark_refs:
            return a_Q, b_Q, r
        segments_ref, _, documents_ref = mark_refs
        segments_Q = _load(segments_ref, c, plan, span)
        before, after = documents_ref[first // chunk], documents_ref[last // chunk]
        return (jnp.where(segments_Q == before, a_Q, 0.0), jnp.where(segments_Q == after, b_Q, 0.0),
                jnp.where(before == after, r, 0.0))
    return decays


def _chunks(plan, span):
    """Chunks that hold tokens in the span from token `span`."""
    if plan.T % plan.span == 0:
        return plan.span // plan.tile.chunk
    return pl.cdiv(jnp.minimum(plan.span, plan.T - span), plan.tile.chunk)


def _rows(ref, c, plan, span, columns=...):
    """Chunk c of a span's tokens, and which of them there are (None: all)."""
    chunk = plan.tile.chunk
    rows = ref.at[pl.ds(c * chunk, chunk), columns]
    if plan.T % chunk == 0:
        return rows, None
    there_Q = span + c * chunk + jnp.arange(chunk, dtype=jnp.int32) < plan.T
    return rows, jnp.broadcast_to(there_Q.reshape(-1, *(1,) * (len(rows.shape) - 1)), rows.shape)


def _load(ref, c, plan, span, columns=...):
    """Chunk c of a span's tokens, zeros after the last token."""
    rows, mask = _rows(ref, c, plan, span, columns)
    return plgpu.load(rows, mask=mask, other=None if mask is None else 0)
