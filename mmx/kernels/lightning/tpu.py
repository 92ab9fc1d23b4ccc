"""Lightning attention on TPU: one Pallas kernel, run once forward in time and, for the gradients, once in each direction.

With the chunked form of `xla.py` (a chunk of Q tokens, S the state before it, D_ij = exp(g (i - j)) where j <= i and both
share a document), the kernel scans chunks for queries x, a memory of pairs (k, v) and a state S of shape (K, V):

    y_i = a_i x_i S + sum_j D_ij (x_i . k_j) v_j        S <- r S + sum_j b_j k_j^T v_j

and, asked for it, a second answer from the same S, to queries w that read the memory backwards (v as keys, k as values):

    z_i = a_i w_i S^T + sum_j D_ij (w_i . v_j) k_j

Every pass is that scan. Backward keeps nothing of forward: the states are made again, in VMEM, and never reach HBM.

    forward     time up     x = q          k, v = k, v     S = state       y = o           last S = state
    gradient 1  time up     x = do         k, v = v, k     S = state^T     y = dq
    gradient 2  time down   x = k, w = v   k, v = q, do    S = dstate      y = dv, z = dk  last S = d(initial state)

Going down in time swaps a with b and transposes D. Time passes for the tokens [begin, end) of a row alone: all of them, or
those from the first to the last real one. So chunk n, of which tokens s to e - 1 are in that span, has

    a_i = exp(g (i + 1 - s))    b_j = exp(g (e - 1 - j))    r = exp(g (e - s))

a_i cut to the document of the state that comes in, b_j to that of the state that goes out, r to rows where they are one.

Grid (B, H / heads, N), chunks innermost and in order. In VMEM: the blocks of the inputs and outputs, twice (the pipeline);
S for each head of the step, float32, as the block of the last state; D and a for each of these heads, float32, made at the
first chunk and again where s or e moves. In SMEM: g, the span, each chunk's documents. b_j scales k^T, along lanes, so
nothing of size (B, H, T) is made. The last chunk may overhang T: its rows of the memory are cleared in the kernel.

The matrix unit works in program order, so the kernel starts a head (its scores, its products with the state) before it
finishes the head before (scores to answers): the second product of a head then waits for nothing.

FLOPs a token and head: 2 Q (K + V) + 4 K V, gradient 1 the same, gradient 2 4 Q (K + V) + 6 K V (products of a chunk's
pairs are whole squares). Bytes: q, k, v, o once; then k, v, do, dq; then q, k, v, do, dk, dv.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels.lightning import documents
from mmx.kernels.products import dot

# Tokens a chunk and heads a step. Chosen 2026-11-23 by static schedule estimates of the TPU compiler (libtpu 0.0.42.1; cycles
# without memory stalls; never run on a TPU) at B=1 H=64 T=8192 K=V=128 bf16: the fewer of 16 and 32 heads with which every
# pass takes at most 0.95 of the time its bytes take from HBM on v5e, v5p and v6e. More heads hide more of a step's first
# and last products, and cost VMEM and code. A chunk of 256 fills the 256-wide matrix unit of v6e, 128 the 128-wide one of
# v5e and v5p. v4 (what its 16 MiB hold) and tpu7x follow the chips alike in this; they compile, and are not tuned.
BLOCKS = {
    pltpu.ChipVersion.TPU_V4: (128, 16),
    pltpu.ChipVersion.TPU_V5E: (128, 16),
    pltpu.ChipVersion.TPU_V5P: (128, 32),
    pltpu.ChipVersion.TPU_V6E: (256, 16),
    pltpu.ChipVersion.TPU_7X: (256, 16),
}
ELSEWHERE = 128, 16             # a chip that is not in the table, or compiling for a TPU without naming it
INTERPRETED = 128, 2            # few heads, so that small tests take several steps
LANES, MIB = 128, 1 << 20


def refusal(q_BHTK, v_BHTV, chunk) -> str:
    """Why the kernel does not take these arrays; empty where it does."""
    dtypes = q_BHTK.dtype.name, v_BHTV.dtype.name
    return "" if dtypes in (("bfloat16",) * 2, ("float32",) * 2) else (
        f"q is {dtypes[0]} and v {dtypes[1]}: the TPU kernel takes bfloat16 or float32 for both")


def forward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, chunk=None, interpret=False):
    """o_BHTV and the state after the last real token."""
    (o_BHTV,), state_BHKV = _scan((q_BHTK,), k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, chunk, False, interpret)
    return o_BHTV, state_BHKV


def backward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, do_BHTV, dstate_BHKV, chunk=None,
             interpret=False):
    """Gradients of q, k, v and the given state, from those of `forward`'s results."""
    shared = log_decay_H, segments_BT
    state_BHVK = jnp.einsum("BHKV->BHVK", state_BHKV)
    (dq_BHTK,), _ = _scan((do_BHTV,), v_BHTV, k_BHTK, *shared, state_BHVK, chunk, False, interpret)
    (dv_BHTV, dk_BHTK), dstate_BHKV = _scan((k_BHTK, v_BHTV), q_BHTK, do_BHTV, *shared, dstate_BHKV, chunk, True, interpret)
    return dq_BHTK, dk_BHTK, dv_BHTV, dstate_BHKV


def _scan(queries, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, chunk, down, interpret):
    """The answers to one or two queries, and the last state; `down` runs time backwards."""
    B, H, T, K = k_BHTK.shape
    V = v_BHTV.shape[3]
    Q, heads, vmem = _blocks(chunk, B, H, T, K, V, len(queries), v_BHTV.dtype.itemsize, interpret)
    N = pl.cdiv(T, Q)
    segmented = segments_BT is not None

    def tokens(width):
        return pl.BlockSpec((1, heads, Q, width), lambda b, h, n, *_: (b, h, N - 1 - n if down else n, 0))

    states = pl.BlockSpec((1, heads, K, V), lambda b, h, n, *_: (b, h, 0, 0))
    widths = (V, K)[:len(queries)]
    scalars, segments, segments_spec = (log_decay_H.astype(jnp.float32),), (), ()
    if segmented:
        scalars += documents.bounds(segments_BT), documents.between(segments_BT, Q)
        segments = (segments_BT[:, None],)
        segments_spec = (pl.BlockSpec((1, 1, Q), lambda b, h, n, *_: (b, 0, N - 1 - n if down else n)),)
    arrays = *queries, k_BHTK, v_BHTV, state_BHKV
    *answers, state_BHKV = pl.pallas_call(
        functools.partial(_kernel, queries=len(queries), T=T, down=down, segmented=segmented),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, H // heads, N),
            in_specs=[*segments_spec, *(tokens(x.shape[3]) for x in arrays[:-1]), states],
            out_specs=[*map(tokens, widths), states],
            scratch_shapes=[pltpu.VMEM((heads, Q, Q), jnp.float32), pltpu.VMEM((heads, Q, max(widths)), jnp.float32)]),
        out_shape=[*(jax.ShapeDtypeStruct((B, H, T, w), v_BHTV.dtype) for w in widths),
                   jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"),
                                             vmem_limit_bytes=vmem),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * H * T * (len(queries) * (Q * (K + V) + K * V) + K * V),
            transcendentals=B * H * N * (Q + V),
            bytes_accessed=sum(x.nbytes for x in (*queries, k_BHTK, v_BHTV, state_BHKV, state_BHKV))
            + B * H * T * sum(widths) * v_BHTV.dtype.itemsize),
        interpret=interpret,
        name="lightning_down" if down else "lightning_up",
    )(*scalars, *segments, *arrays)
    return answers, state_BHKV


def _kernel(*refs, queries, T, down, segmented):
    """One chunk of some heads. Scalars; segments; queries, k, v, state; answers, last state; D and a."""
    refs = list(refs)
    take = lambda count: [refs.pop(0) for _ in range(count)]
    log_decay_H, *marks = take(3 if segmented else 1)
    segments_ref = take(1)[0] if segmented else None
    query_refs = take(queries)
    k_ref, v_ref, initial_ref = take(3)
    answer_refs = take(queries)
    state_ref, pair_ref, a_ref = refs
    heads, Q, V = v_ref.shape[1:]
    b, hb, step, N = *map(pl.program_id, range(3)), pl.num_programs(2)
    n = N - 1 - step if down else step

    def span(n):
        """The chunk's tokens within time."""
        begin, end = (marks[0][b, 0], marks[0][b, 1]) if segmented else (0, T)
        return jnp.clip(begin - n * Q, 0, Q), jnp.clip(end - n * Q, 0, Q)

    s, e = span(n)
    first = step == 0
    s_before, e_before = span(n + 1 if down else n - 1)
    stale = first | (e != e_before if down else s != s_before)

    @pl.when(first)
    def _():
        state_ref[...] = initial_ref[...]
        i_QQ, j_QQ = (jax.lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))
        age_QQ = (j_QQ - i_QQ if down else i_QQ - j_QQ)
        for h in range(heads):
            g = log_decay_H[hb * heads + h]
            pair_ref[h] = jnp.where(age_QQ >= 0, jnp.exp(g * jnp.maximum(age_QQ, 0).astype(jnp.float32)), 0)

    @pl.when(stale)
    def _():
        i_QW = jax.lax.broadcasted_iota(jnp.int32, a_ref.shape[1:], 0)
        age_QW = jnp.maximum(e - 1 - i_QW if down else i_QW + 1 - s, 0).astype(jnp.float32)
        for h in range(heads):
            a_ref[h] = jnp.exp(log_decay_H[hb * heads + h] * age_QW)

    j_1Q = jax.lax.broadcasted_iota(jnp.int32, (1, Q), 1)
    age_1Q = jnp.maximum(j_1Q + 1 - s if down else e - 1 - j_1Q, 0).astype(jnp.float32)
    age_1V = jnp.full((1, V), e - s, jnp.int32).astype(jnp.float32)
    if segmented:
        before, after = marks[1][b, n], marks[1][b, n + 1]
        enter, leave = (after, before) if down else (before, after)
        segments_1Q = segments_ref[0]
        segments_QQ = jnp.broadcast_to(segments_1Q, (Q, Q)).T
        same_QQ = (segments_QQ == jnp.where(segments_1Q > 0, segments_1Q, -1)).astype(jnp.float32)
        leaves_1Q = segments_1Q == leave
        enters_QW = (jnp.broadcast_to(segments_1Q, (a_ref.shape[2], Q)).T == enter).astype(jnp.float32)

    def memory(h):
        keys_values = k_ref[0, h], v_ref[0, h]
        if T % Q == 0:
            return keys_values
        return [jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < T - n * Q, x, 0) for x in keys_values]

    def start(h):
        """Advances the head's state; returns, of each query, the raw scores and the product with the state before."""
        g = log_decay_H[hb * heads + h]
        k_QK, v_QV = memory(h)
        b_1Q, r_1V = jnp.exp(g * age_1Q), jnp.exp(g * age_1V)
        if segmented:
            b_1Q, r_1V = jnp.where(leaves_1Q, b_1Q, 0), jnp.where(before == after, r_1V, 0)
        state_KV = state_ref[0, h]
        low_KV = state_KV.astype(k_QK.dtype)
        k_KQ = (k_QK.T.astype(jnp.float32) * b_1Q).astype(k_QK.dtype)
        products = [(dot(ref[0, h], keys, 1, 1), dot(ref[0, h], low_KV, 1, axis))
                    for ref, keys, axis in zip(query_refs, (k_QK, v_QV), (0, 1))]
        state_ref[0, h] = r_1V * state_KV + dot(k_KQ, v_QV, 1, 0)
        return products

    def finish(h, products):
        pair_QQ, a_QW = pair_ref[h], a_ref[h]
        if segmented:
            pair_QQ, a_QW = pair_QQ * same_QQ, a_QW * enters_QW
        for ref, (scores_QQ, y_QW), values in zip(answer_refs, products, reversed(memory(h))):
            y_QW = a_QW[:, :y_QW.shape[1]] * y_QW + dot((scores_QQ * pair_QQ).astype(values.dtype), values, 1, 0)
            ref[0, h] = y_QW.astype(ref.dtype)

    products = start(0)
    for h in range(1, heads):
        ahead = start(h)
        finish(h - 1, products)
        products = ahead
    finish(heads - 1, products)


def _blocks(chunk, B, H, T, K, V, queries, itemsize, interpret):
    """Tokens a chunk, heads a step, and the VMEM that the kernel may take."""
    cores, vmem = 1, 16 * MIB
    if interpret:
        table_chunk, most = INTERPRETED
        Q = min(chunk or table_chunk, T)
    else:
        table_chunk, most = ELSEWHERE
        if pltpu.is_tpu_device():
            chip = pltpu.get_tpu_info()
            table_chunk, most = BLOCKS.get(chip.chip_version, ELSEWHERE)
            cores, vmem = chip.num_cores, chip.vmem_capacity_bytes
        # Whole lanes; past 256 the squares of scores cost more than they save.
        Q = LANES * min(pl.cdiv(chunk or table_chunk, LANES), pl.cdiv(T, LANES), 2)
    wide = [pl.cdiv(x, LANES) * LANES for x in (K, V)]
    a_head = 2 * Q * sum(wide) * itemsize * (1 + queries) + 4 * K * wide[1] * 4 + Q * (Q + max(wide)) * 4
    # A quarter stays free for what the compiler spills; every core needs a share of the heads.
    most = min(most, vmem * 3 // 4 // a_head, B * H // cores)
    return Q, max((d for d in range(1, most + 1) if H % d == 0), default=1), vmem
