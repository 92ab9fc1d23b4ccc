"""Lightning attention on TPU: one Pallas kernel, run once forward in time and, for the gradients, once in each direction.

The kernel computes o and S of docs/kernels.md, "Chunks", chunk by chunk. dv and dk need the same state, so one scan computes
both: the kernel has optional second queries q2, with v as keys and k as values, and a second output

    o2_i = a_i q2_i S^T + sum_j D_ij (q2_i . v_j) k_j

Each pass gives the kernel other arrays, following the table in docs/kernels.md, "Backward":

    pass          time       q, q2    k, v     initial S                        outputs    last S
    forward       forward    q        k, v     initial state                    o          last state
    gradient 1    forward    do       v, k     initial state, transposed        dq         not used
    gradient 2    reverse    k, v     q, do    gradient of the last state       dv, dk     gradient of the initial state

The grid is (B, H / heads, N). A step processes one chunk of `heads` heads; chunks are innermost and in order.

    VMEM    blocks of the inputs and outputs, each twice for the pipeline
            S of each head, float32: the output block of the last state
            D of each head, float32, computed at the first chunk
            a of each head, float32, computed at the first chunk and again when it changes (see `_kernel`)
    SMEM    g, the bounds of the rows, and the documents of the states between chunks

b needs no array in memory: the kernel computes it as a row of Q lanes, by which it multiplies k^T (K x Q). The last chunk may
extend past T; the kernel then sets k and v of the extra tokens to zero.

The matrix unit executes its products in program order. A head has two groups of products: `start` computes the scores and the
products with the state, and `finish` computes the outputs from scores * D. The kernel orders them start(0), start(1),
finish(0), start(2), finish(1), ...: the vector unit multiplies the scores of a head by D while the matrix unit computes
`start` of the next head, so that `finish` does not wait.

                  FLOPs per token and head      arrays that are read or written once
    forward       2 Q (K + V) + 4 K V           q, k, v, o
    gradient 1    2 Q (K + V) + 4 K V           k, v, do, dq
    gradient 2    4 Q (K + V) + 6 K V           q, k, v, do, dk, dv

Axis p is the tokens of a chunk as keys, where Q is the same tokens as queries; axis w is the width of an output, K or V.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels.lightning.documents import real_bounds, state_documents
from mmx.kernels.products import dot

# {chip: (tokens of a chunk, heads of a step)}
# Chunk: 256 tokens fill the 256-wide matrix unit of v6e, 128 tokens the 128-wide units of v5e and v5p.
# Heads: nothing overlaps with the first `start` and the last `finish` of a step. More heads in a step reduce this loss but need
# more VMEM and code. 16 heads are used where each pass then takes an estimated 95 % of its HBM time or less, and otherwise 32.
# Chosen on 2026-11-23 by static schedule estimates of the TPU compiler (libtpu 0.0.42.1; cycles without memory stalls; never
# run on a TPU) at B=1 H=64 T=8192 K=V=128 bf16. The values for v4 (limited by its 16 MiB of VMEM) and tpu7x are copied from
# similar chips; they compile but are not tuned.
BLOCKS = {
    pltpu.ChipVersion.TPU_V4: (128, 16),
    pltpu.ChipVersion.TPU_V5E: (128, 16),
    pltpu.ChipVersion.TPU_V5P: (128, 32),
    pltpu.ChipVersion.TPU_V6E: (256, 16),
    pltpu.ChipVersion.TPU_7X: (256, 16),
}
DEFAULT_BLOCKS = 128, 16        # for a chip that is not in the table, or if the chip is not known
INTERPRETED_BLOCKS = 128, 2     # few heads, so that small tests take several steps
LANES, MIB = 128, 1 << 20
PIPELINE_COPIES = 2     # copies of a block in VMEM: the pipeline copies the next block while the kernel uses this one
FLOAT32_BYTES = 4


def array_refusal(q_BHTK, v_BHTV, chunk) -> str:
    """Returns why the kernel does not support these arrays; empty if it does. Every chunk is supported."""
    dtypes = q_BHTK.dtype.name, v_BHTV.dtype.name
    return "" if dtypes in (("bfloat16",) * 2, ("float32",) * 2) else (
        f"q is {dtypes[0]} and v {dtypes[1]}: the TPU kernel supports bfloat16 or float32 for both")


def forward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, chunk=None, interpret=False):
    """Returns o_BHTV and the state after the last real token."""
    (o_BHTV,), state_BHKV = _scan((q_BHTK,), k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, chunk, False, interpret)
    return o_BHTV, state_BHKV


def backward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, do_BHTV, dstate_BHKV, chunk=None,
             interpret=False):
    """Returns the gradients of q, k, v and the initial state, given the gradients of the results of `forward`."""
    shared = log_decay_H, segments_BT
    state_BHVK = jnp.einsum("BHKV->BHVK", state_BHKV)
    (dq_BHTK,), _ = _scan((do_BHTV,), v_BHTV, k_BHTK, *shared, state_BHVK, chunk, False, interpret)
    (dv_BHTV, dk_BHTK), dstate_BHKV = _scan((k_BHTK, v_BHTV), q_BHTK, do_BHTV, *shared, dstate_BHKV, chunk, True, interpret)
    return dq_BHTK, dk_BHTK, dv_BHTV, dstate_BHKV


def _scan(queries, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, chunk, reverse, interpret):
    """Returns the outputs for one or two arrays of queries, and the last state. If `reverse`, time runs backwards."""
    B, H, T, K = k_BHTK.shape
    V = v_BHTV.shape[3]
    Q, heads, vmem = _blocks(chunk, B, H, T, K, V, len(queries), v_BHTV.dtype.itemsize, interpret)
    N = pl.cdiv(T, Q)
    segmented = segments_BT is not None

    def tokens(width):
        return pl.BlockSpec((1, heads, Q, width), lambda b, h, n, *_: (b, h, N - 1 - n if reverse else n, 0))

    states = pl.BlockSpec((1, heads, K, V), lambda b, h, n, *_: (b, h, 0, 0))
    widths = (V, K)[:len(queries)]
    scalars, segments, segments_spec = (log_decay_H.astype(jnp.float32),), (), ()
    if segmented:
        scalars += real_bounds(segments_BT), state_documents(segments_BT, Q)
        segments = (segments_BT[:, None],)
        segments_spec = (pl.BlockSpec((1, 1, Q), lambda b, h, n, *_: (b, 0, N - 1 - n if reverse else n)),)
    arrays = *queries, k_BHTK, v_BHTV, state_BHKV
    *outputs, state_BHKV = pl.pallas_call(
        functools.partial(_kernel, query_count=len(queries), T=T, reverse=reverse, segmented=segmented),
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
        name="lightning_reverse_scan" if reverse else "lightning_scan",
    )(*scalars, *segments, *arrays)
    return outputs, state_BHKV


def _kernel(*refs, query_count, T, reverse, segmented):
    """Processes one chunk of the heads of one step.

    `refs` are, in this order: g; with segments also the bounds, the states' documents and the segments; one or two queries; k;
    v; the initial state; one or two outputs; the last state (`state_ref`); D (`decay_ref`); a (`a_ref`).
    """
    refs = list(refs)
    take_refs = lambda count: [refs.pop(0) for _ in range(count)]
    log_decay_H, *document_refs = take_refs(3 if segmented else 1)
    segments_ref = take_refs(1)[0] if segmented else None
    query_refs = take_refs(query_count)
    k_ref, v_ref, initial_ref = take_refs(3)
    output_refs = take_refs(query_count)
    state_ref, decay_ref, a_ref = refs
    heads, Q, V = v_ref.shape[1:]
    b, head_block, step, N = *map(pl.program_id, range(3)), pl.num_programs(2)
    n = N - 1 - step if reverse else step

    def decaying_tokens(n):
        """Returns begin and end of the tokens of chunk n at which the state decays, numbered from 0 in the chunk."""
        row_begin, row_end = (document_refs[0][b, 0], document_refs[0][b, 1]) if segmented else (0, T)
        return jnp.clip(row_begin - n * Q, 0, Q), jnp.clip(row_end - n * Q, 0, Q)

    begin, end = decaying_tokens(n)
    first = step == 0
    previous_begin, previous_end = decaying_tokens(n + 1 if reverse else n - 1)     # of the chunk of the previous step
    # a depends on begin, or in reverse time on end.
    a_is_stale = first | (end != previous_end if reverse else begin != previous_begin)

    @pl.when(first)
    def _():
        state_ref[...] = initial_ref[...]
        i_Qp, j_Qp = (jax.lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))
        distance_Qp = j_Qp - i_Qp if reverse else i_Qp - j_Qp
        for h in range(heads):
            g = log_decay_H[head_block * heads + h]
            decay_ref[h] = jnp.where(distance_Qp >= 0, jnp.exp(g * jnp.maximum(distance_Qp, 0).astype(jnp.float32)), 0)

    @pl.when(a_is_stale)
    def _():
        i_Qw = jax.lax.broadcasted_iota(jnp.int32, a_ref.shape[1:], 0)
        elapsed_Qw = jnp.maximum(end - 1 - i_Qw if reverse else i_Qw + 1 - begin, 0).astype(jnp.float32)
        for h in range(heads):
            a_ref[h] = jnp.exp(log_decay_H[head_block * heads + h] * elapsed_Qw)

    j_1p = jax.lax.broadcasted_iota(jnp.int32, (1, Q), 1)
    elapsed_1p = jnp.maximum(j_1p + 1 - begin if reverse else end - 1 - j_1p, 0).astype(jnp.float32)
    elapsed_1V = jnp.full((1, V), end - begin, jnp.int32).astype(jnp.float32)
    if segmented:
        document_before, document_after = document_refs[1][b, n], document_refs[1][b, n + 1]
        first_document, last_document = (document_after, document_before) if reverse else (document_before, document_after)
        segments_1p = segments_ref[0]
        segments_Qp = jnp.broadcast_to(segments_1p, (Q, Q)).T
        same_Qp = (segments_Qp == jnp.where(segments_1p > 0, segments_1p, -1)).astype(jnp.float32)
        to_state_1p = segments_1p == last_document
        from_state_Qw = (jnp.broadcast_to(segments_1p, (a_ref.shape[2], Q)).T == first_document).astype(jnp.float32)

    def keys_and_values(h):
        """Returns k and v of the head, with zeros after token T - 1."""
        arrays = k_ref[0, h], v_ref[0, h]
        if T % Q == 0:
            return arrays
        return [jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < T - n * Q, x, 0) for x in arrays]

    def start(h):
        """Advances the state of the head. Returns the scores and the product with the previous state, for each query array."""
        g = log_decay_H[head_block * heads + h]
        k_pK, v_pV = keys_and_values(h)
        b_1p, r_1V = jnp.exp(g * elapsed_1p), jnp.exp(g * elapsed_1V)
        if segmented:
            b_1p, r_1V = jnp.where(to_state_1p, b_1p, 0), jnp.where(document_before == document_after, r_1V, 0)
        state_KV = state_ref[0, h]
        narrow_KV = state_KV.astype(k_pK.dtype)
        k_Kp = (k_pK.T.astype(jnp.float32) * b_1p).astype(k_pK.dtype)
        # q k^T and q S; with second queries also q2 v^T and q2 S^T
        products = [(dot(ref[0, h], keys, 1, 1), dot(ref[0, h], narrow_KV, 1, state_axis))
                    for ref, keys, state_axis in zip(query_refs, (k_pK, v_pV), (0, 1))]
        state_ref[0, h] = r_1V * state_KV + dot(k_Kp, v_pV, 1, 0)
        return products

    def finish(h, products):
        """Writes the outputs of the head."""
        decay_Qp, a_Qw = decay_ref[h], a_ref[h]
        if segmented:
            decay_Qp, a_Qw = decay_Qp * same_Qp, a_Qw * from_state_Qw
        for ref, (scores_Qp, o_Qw), values in zip(output_refs, products, reversed(keys_and_values(h))):
            o_Qw = a_Qw[:, :o_Qw.shape[1]] * o_Qw + dot((scores_Qp * decay_Qp).astype(values.dtype), values, 1, 0)
            ref[0, h] = o_Qw.astype(ref.dtype)

    products = start(0)
    for h in range(1, heads):
        next_products = start(h)
        finish(h - 1, products)
        products = next_products
    finish(heads - 1, products)


def _blocks(chunk, B, H, T, K, V, query_count, itemsize, interpret):
    """Returns the tokens of a chunk, the heads of a step, and the bytes of VMEM that the kernel may use."""
    cores, vmem = 1, 16 * MIB
    if interpret:
        default_chunk, max_heads = INTERPRETED_BLOCKS
        Q = min(chunk or default_chunk, T)
    else:
        default_chunk, max_heads = DEFAULT_BLOCKS
        if pltpu.is_tpu_device():
            chip = pltpu.get_tpu_info()
            default_chunk, max_heads = BLOCKS.get(chip.chip_version, DEFAULT_BLOCKS)
            cores, vmem = chip.num_cores, chip.vmem_capacity_bytes
        # A multiple of the lanes, and at most 256: with more tokens, the Q x Q matrices cost more than they save.
        Q = LANES * min(pl.cdiv(chunk or default_chunk, LANES), pl.cdiv(T, LANES), 2)
    wide = [pl.cdiv(x, LANES) * LANES for x in (K, V)]
    tokens = (1 + query_count) * Q * sum(wide) * itemsize               # k and v; each query array and its output
    states = 2 * K * wide[1] * FLOAT32_BYTES                            # the initial and the last state
    decays = (Q * Q + Q * max(wide)) * FLOAT32_BYTES                    # D and a
    bytes_per_head = PIPELINE_COPIES * (tokens + states) + decays
    # A quarter of VMEM stays free for the compiler's spills. Every core needs a part of the heads.
    max_heads = min(max_heads, vmem * 3 // 4 // bytes_per_head, B * H // cores)
    return Q, max((d for d in range(1, max_heads + 1) if H % d == 0), default=1), vmem
