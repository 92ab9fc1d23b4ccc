"""Lightning attention on TPU: one Pallas kernel, run once forward in time and, for the gradients, once in each direction.

The kernel uses the chunked form of `xla.py`, with chunks of Q tokens and the decays a, b, r and D defined there. It scans the
chunks for queries x, a memory of pairs (k, v) and a state S of shape (K, V):

    y_i = a_i x_i S + sum_j D_ij (x_i . k_j) v_j        S <- r S + sum_j b_j k_j^T v_j

dv and dk need the same state (dS), so one scan computes both. For this, the kernel has an optional second output z, for queries
w that use v as keys and k as values:

    z_i = a_i w_i S^T + sum_j D_ij (w_i . v_j) k_j

Every pass is such a scan. The table gives the arrays that replace x, w, k, v and S, from the gradients in `xla.py`. The
backward pass keeps no results of the forward pass: the states are recomputed in VMEM and never written to HBM.

    pass          time       x, w    (k, v)     initial S                        outputs           last S
    forward       forward    q       (k, v)     initial state                    y = o             last state
    gradient 1    forward    do      (v, k)     initial state, transposed        y = dq            not used
    gradient 2    reverse    k, v    (q, do)    gradient of the last state       y = dv, z = dk    gradient of the initial state

In reverse time a and b are exchanged and D is transposed (see the gradients in `xla.py`). The state decays only at the tokens
begin to end - 1 of a row: from the first to the last real token, or all tokens if there are no segments. Number the tokens of a
chunk from 0, and let s to e - 1 be those at which the state decays. For example, Q = 128, begin = 3 and end = 200 give s = 3
and e = 128 in the first chunk, and s = 0 and e = 72 in the second. Then a, b and r are as follows, or 0 where two documents
differ, as in `xla.py`:

    a_i = exp(g (i + 1 - s))    b_j = exp(g (e - 1 - j))    r = exp(g (e - s))

The grid is (B, H / heads, N). A step processes one chunk of `heads` heads; chunks are innermost and in order.

    VMEM    blocks of the inputs and outputs, each twice for the pipeline
            S of each head, float32: the output block of the last state
            D of each head, float32, computed at the first chunk
            a of each head, float32, computed at the first chunk and again when s (in reverse time: e) changes
    SMEM    g, begin and end, and the documents of the states between chunks

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

The FLOPs include the pairs (i, j) of a chunk for which D is 0. Axis p is the tokens of a chunk as keys, where Q is the same
tokens as queries; axis w is the width of an output, K or V.
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
# Heads: 16 if, with 16 heads, the estimated time of every pass is at most 0.95 of the time that HBM needs for the bytes of the
# pass; otherwise 32. The reason: nothing overlaps with the first `start` and the last `finish` of a step. With more heads in a
# step, these two take a smaller part of its time, but the step needs more VMEM and code.
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


def refusal(q_BHTK, v_BHTV, chunk) -> str:
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
        functools.partial(_kernel, queries=len(queries), T=T, reverse=reverse, segmented=segmented),
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


def _kernel(*refs, queries, T, reverse, segmented):
    """Processes one chunk of the heads of one step.

    `refs` are, in this order: g; with segments also the bounds, the states' documents and the segments; one or two queries (x,
    w); k; v; the initial state; one or two outputs (y, z); the last state (`state_ref`); D (`pair_ref`); a (`a_ref`).
    """
    refs = list(refs)
    take_refs = lambda count: [refs.pop(0) for _ in range(count)]
    log_decay_H, *document_refs = take_refs(3 if segmented else 1)
    segments_ref = take_refs(1)[0] if segmented else None
    query_refs = take_refs(queries)
    k_ref, v_ref, initial_ref = take_refs(3)
    output_refs = take_refs(queries)
    state_ref, pair_ref, a_ref = refs
    heads, Q, V = v_ref.shape[1:]
    b, head_block, step, N = *map(pl.program_id, range(3)), pl.num_programs(2)
    n = N - 1 - step if reverse else step

    def decaying_tokens(n):
        """Returns the range of tokens of chunk n for which the state decays."""
        begin, end = (document_refs[0][b, 0], document_refs[0][b, 1]) if segmented else (0, T)
        return jnp.clip(begin - n * Q, 0, Q), jnp.clip(end - n * Q, 0, Q)

    s, e = decaying_tokens(n)
    first = step == 0
    s_before, e_before = decaying_tokens(n + 1 if reverse else n - 1)
    # a depends on s, or in reverse time on e. It is computed again if this differs from the chunk of the previous step.
    a_is_stale = first | (e != e_before if reverse else s != s_before)

    @pl.when(first)
    def _():
        state_ref[...] = initial_ref[...]
        i_Qp, j_Qp = (jax.lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))
        age_Qp = j_Qp - i_Qp if reverse else i_Qp - j_Qp
        for h in range(heads):
            g = log_decay_H[head_block * heads + h]
            pair_ref[h] = jnp.where(age_Qp >= 0, jnp.exp(g * jnp.maximum(age_Qp, 0).astype(jnp.float32)), 0)

    @pl.when(a_is_stale)
    def _():
        i_Qw = jax.lax.broadcasted_iota(jnp.int32, a_ref.shape[1:], 0)
        age_Qw = jnp.maximum(e - 1 - i_Qw if reverse else i_Qw + 1 - s, 0).astype(jnp.float32)
        for h in range(heads):
            a_ref[h] = jnp.exp(log_decay_H[head_block * heads + h] * age_Qw)

    j_1p = jax.lax.broadcasted_iota(jnp.int32, (1, Q), 1)
    age_1p = jnp.maximum(j_1p + 1 - s if reverse else e - 1 - j_1p, 0).astype(jnp.float32)
    age_1V = jnp.full((1, V), e - s, jnp.int32).astype(jnp.float32)
    if segmented:
        before, after = document_refs[1][b, n], document_refs[1][b, n + 1]
        first_document, last_document = (after, before) if reverse else (before, after)
        segments_1p = segments_ref[0]
        segments_Qp = jnp.broadcast_to(segments_1p, (Q, Q)).T
        same_Qp = (segments_Qp == jnp.where(segments_1p > 0, segments_1p, -1)).astype(jnp.float32)
        to_state_1p = segments_1p == last_document
        from_state_Qw = (jnp.broadcast_to(segments_1p, (a_ref.shape[2], Q)).T == first_document).astype(jnp.float32)

    def memory(h):
        """Returns k and v of the head, with zeros after token T - 1."""
        keys_values = k_ref[0, h], v_ref[0, h]
        if T % Q == 0:
            return keys_values
        return [jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < T - n * Q, x, 0) for x in keys_values]

    def start(h):
        """Advances the state of the head. Returns the scores and the product with the previous state, for each query array."""
        g = log_decay_H[head_block * heads + h]
        k_pK, v_pV = memory(h)
        b_1p, r_1V = jnp.exp(g * age_1p), jnp.exp(g * age_1V)
        if segmented:
            b_1p, r_1V = jnp.where(to_state_1p, b_1p, 0), jnp.where(before == after, r_1V, 0)
        state_KV = state_ref[0, h]
        narrow_KV = state_KV.astype(k_pK.dtype)
        k_Kp = (k_pK.T.astype(jnp.float32) * b_1p).astype(k_pK.dtype)
        # x k^T and x S; with second queries also w v^T and w S^T
        products = [(dot(ref[0, h], keys, 1, 1), dot(ref[0, h], narrow_KV, 1, state_axis))
                    for ref, keys, state_axis in zip(query_refs, (k_pK, v_pV), (0, 1))]
        state_ref[0, h] = r_1V * state_KV + dot(k_Kp, v_pV, 1, 0)
        return products

    def finish(h, products):
        """Writes the outputs of the head."""
        pair_Qp, a_Qw = pair_ref[h], a_ref[h]
        if segmented:
            pair_Qp, a_Qw = pair_Qp * same_Qp, a_Qw * from_state_Qw
        for ref, (scores_Qp, y_Qw), values in zip(output_refs, products, reversed(memory(h))):
            y_Qw = a_Qw[:, :y_Qw.shape[1]] * y_Qw + dot((scores_Qp * pair_Qp).astype(values.dtype), values, 1, 0)
            ref[0, h] = y_Qw.astype(ref.dtype)

    products = start(0)
    for h in range(1, heads):
        next_products = start(h)
        finish(h - 1, products)
        products = next_products
    finish(heads - 1, products)


def _blocks(chunk, B, H, T, K, V, queries, itemsize, interpret):
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
        # Multiples of the lanes. Above 256 tokens the squares of scores cost more than they save.
        Q = LANES * min(pl.cdiv(chunk or default_chunk, LANES), pl.cdiv(T, LANES), 2)
    wide = [pl.cdiv(x, LANES) * LANES for x in (K, V)]
    tokens = (1 + queries) * Q * sum(wide) * itemsize                   # k and v; each query array and its output
    states = 2 * K * wide[1] * FLOAT32_BYTES                            # the initial and the last state
    decays = (Q * Q + Q * max(wide)) * FLOAT32_BYTES                    # D and a
    bytes_per_head = PIPELINE_COPIES * (tokens + states) + decays
    # A quarter of VMEM stays free for the compiler's spills. Every core needs a part of the heads.
    max_heads = min(max_heads, vmem * 3 // 4 // bytes_per_head, B * H // cores)
    return Q, max((d for d in range(1, max_heads + 1) if H % d == 0), default=1), vmem
