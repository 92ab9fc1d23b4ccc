"""The experts' SwiGLU over tokens sorted by expert (docs/model.md section 5).

    y_m = sum_j weight_mj  W2_e ( SiLU(W1_e x_m) * W3_e x_m ),   e = expert_mj

Each token m is assigned to several experts: its choices j. Every assignment that is kept (not dropped) gets a row. Rows are
sorted by expert, and the rows of each expert start on a block boundary, so that all rows of a block use the weights of one
expert. Sorting and its inverse are both gathers: the plan lists the rows of each token and the token of each row.

    "blocks"  A loop over the blocks in use, which reads the weights of one expert at a time. Its own backward pass keeps the
              two products before the gate. The work is proportional to the kept tokens, not to the size of the buffer.
              For CPU, where ragged_dot is five times slower.
    "ragged"  lax.ragged_dot over the sorted rows, differentiated by JAX. Rows are multiplied by their routing weights before
              W2. After W2, the gradient of the routing weights would need the result of W2. For TPU.
    "gpu"     The same with the products of `grouped_gpu`, because XLA's ragged_dot does E times the work on GPUs.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmx.kernels import grouped_gpu, platform
from mmx.kernels.dtypes import wide_dtype

IMPLS = ("blocks", "ragged", "gpu")


class Plan(NamedTuple):
    """The order of the sorted rows."""
    row_Mj: jax.Array               # row of each assignment; past the last row for a dropped assignment
    token_r: jax.Array              # token of each row; past the last token for an empty row
    blocks_E: jax.Array             # number of blocks of each expert


def plan(expert_Mj, rank_Mj, keep_Mj, count_E, block: int) -> Plan:
    """Assigns rows to the kept assignments.

    Args:
      expert_Mj: the experts that each token is assigned to.
      rank_Mj: position of each kept assignment among all kept assignments to its expert, from 0.
      keep_Mj: whether the assignment is kept.
      count_E: number of kept assignments of each expert.
      block: rows of a block.
    """
    M, J = expert_Mj.shape
    rows = -(-M * J // block) * block + len(count_E) * block
    blocks_E = -(-count_E // block)
    first_E = jnp.cumsum(blocks_E) - blocks_E
    row_Mj = jnp.where(keep_Mj, first_E[expert_Mj] * block + rank_Mj, rows)
    tokens_Mj = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32)[:, None], (M, J))
    token_r = jnp.full(rows, M, jnp.int32).at[row_Mj].set(tokens_Mj, mode="drop", unique_indices=True)
    return Plan(row_Mj, token_r, blocks_E)


def expert_ffn(x_MD, weight_Mj, w1_EDF, w3_EDF, w2_EFD, plan: Plan, *, block: int, impl: str | None = None):
    """Returns y_MD, the weighted sum of the outputs of each token's experts; zero if all its assignments were dropped.

    Args:
      x_MD: tokens.
      weight_Mj: routing weights.
      w1_EDF, w3_EDF, w2_EFD: gate, up and down projections of the experts.
      plan: the result of `plan` for the same `block`.
      block: rows of a block.
      impl: "blocks", "ragged" or "gpu". None: chosen by platform, dtypes and shapes.
    Raises:
      NotImplementedError: the named implementation does not exist, or cannot run here or on these arrays.
    """
    refusal = grouped_gpu.refusal(x_MD, w1_EDF, block)
    impl = impl or {"cpu": "blocks", "gpu": "ragged" if refusal else "gpu"}.get(platform.name(), "ragged")
    if impl not in IMPLS:
        raise NotImplementedError(f"impl={impl!r} does not exist; expert_ffn has {', '.join(IMPLS)}")
    if impl == "gpu" and refusal:
        raise NotImplementedError(f"impl='gpu': {refusal}")
    if impl == "blocks":
        return _blocks(x_MD, weight_Mj, w1_EDF, w3_EDF, w2_EFD, plan, block)
    dot = functools.partial(jax.lax.ragged_dot, group_sizes=plan.blocks_E * block)
    if impl == "gpu":
        dot = lambda x_ri, w_Eio: grouped_gpu.dot(x_ri, w_Eio, plan.blocks_E, block)
    return _sorted_rows(x_MD, weight_Mj, w1_EDF, w3_EDF, w2_EFD, plan, dot)


def expert_ffn_unrolled(x_MD, weight_Mj, expert_Mj, w1_EDF, w3_EDF, w2_EFD):
    """Computes the same as `expert_ffn` for a few tokens, in an unrolled loop over assignments.

    Each assignment reads the weights of its expert once. Its products multiply a vector by a matrix: for a product of two
    matrices, XLA on CPU would first copy the expert's weights out of the stack.
    """
    def matvec(x_D, w_EDF, e):
        return x_D @ w_EDF[e]

    def assignment(x_D, e):
        return matvec(jax.nn.silu(matvec(x_D, w1_EDF, e)) * matvec(x_D, w3_EDF, e), w2_EFD, e)

    M, J = expert_Mj.shape
    return jnp.stack([sum(weight_Mj[m, j].astype(x_MD.dtype) * assignment(x_MD[m], expert_Mj[m, j]) for j in range(J))
                      for m in range(M)])


def take(x_MD, index):
    """Returns rows by index; zeros for an index past the last row."""
    return x_MD.at[index].get(mode="fill", fill_value=0)


def _sorted_rows(x_MD, weight_Mj, w1_EDF, w3_EDF, w2_EFD, plan, dot):
    x_rD, weight_r1 = take(x_MD, plan.token_r), _weight_of_rows(weight_Mj, plan)[:, None]
    h_rF = jax.nn.silu(dot(x_rD, w1_EDF)) * dot(x_rD, w3_EDF)
    y_rD = dot((weight_r1 * h_rF).astype(h_rF.dtype), w2_EFD)
    return take(y_rD, plan.row_Mj).sum(1)


def _weight_of_rows(weight_Mj, plan):
    empty_r = jnp.zeros(len(plan.token_r), weight_Mj.dtype)
    return empty_r.at[plan.row_Mj].set(weight_Mj, mode="drop", unique_indices=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _blocks(x_MD, weight_Mj, w1_EDF, w3_EDF, w2_EFD, plan, block):
    return _blocks_forward(x_MD, weight_Mj, w1_EDF, w3_EDF, w2_EFD, plan, block)[0]


def _blocks_forward(x_MD, weight_Mj, w1_EDF, w3_EDF, w2_EFD, plan, block):
    rows, F = len(plan.token_r), w1_EDF.shape[2]

    def body(n, carry):
        y_rD, up_rF, gate_rF = carry
        e, x_QD = expert_of_block[n], take(x_MD, _block(plan.token_r, n, block))
        gate_QF, up_QF = x_QD @ w1_EDF[e], x_QD @ w3_EDF[e]
        y_QD = (jax.nn.silu(gate_QF) * up_QF) @ w2_EFD[e]
        return _put(y_rD, y_QD, n), _put(up_rF, up_QF, n), _put(gate_rF, gate_QF, n)

    expert_of_block = _expert_of_block(plan, block)
    empty = tuple(_zeros((rows, width), x_MD.dtype, plan) for width in (x_MD.shape[1], F, F))
    y_rD, up_rF, gate_rF = jax.lax.fori_loop(0, plan.blocks_E.sum(), body, empty)
    y_MD = jnp.einsum("Mj,MjD->MD", weight_Mj.astype(y_rD.dtype), take(y_rD, plan.row_Mj))
    return y_MD, (x_MD, weight_Mj, w1_EDF, w3_EDF, w2_EFD, plan, up_rF, gate_rF)


def _blocks_backward(block, residuals, dy_MD):
    x_MD, weight_Mj, w1_EDF, w3_EDF, w2_EFD, plan, up_rF, gate_rF = residuals
    expert_of_block, rows = _expert_of_block(plan, block), len(plan.token_r)
    weight_r = _weight_of_rows(weight_Mj, plan)

    def body(n, carry):
        dx_rD, dweight_r, dw1_EDF, dw3_EDF, dw2_EFD = carry
        e, token_Q = expert_of_block[n], _block(plan.token_r, n, block)
        x_QD, dy_QD = take(x_MD, token_Q), take(dy_MD, token_Q)
        gate_QF, up_QF, weight_Q1 = (_block(a, n, block) for a in (gate_rF, up_rF, weight_r[:, None]))
        sigmoid_QF = jax.nn.sigmoid(gate_QF)
        silu_QF = gate_QF * sigmoid_QF
        h_QF = silu_QF * up_QF
        dh_QF = dy_QD @ w2_EFD[e].T
        dweight_Q = jnp.sum(h_QF * dh_QF, axis=1, dtype=weight_r.dtype)
        weight_Q1 = weight_Q1.astype(h_QF.dtype)
        dup_QF = weight_Q1 * dh_QF * silu_QF
        dgate_QF = weight_Q1 * dh_QF * up_QF * (sigmoid_QF + silu_QF * (1 - sigmoid_QF))
        dx_QD = dgate_QF @ w1_EDF[e].T + dup_QF @ w3_EDF[e].T
        dw1_EDF = dw1_EDF.at[e].add(_outer(x_QD, dgate_QF))
        dw3_EDF = dw3_EDF.at[e].add(_outer(x_QD, dup_QF))
        dw2_EFD = dw2_EFD.at[e].add(_outer(weight_Q1 * h_QF, dy_QD))
        return _put(dx_rD, dx_QD, n), _put(dweight_r, dweight_Q, n), dw1_EDF, dw3_EDF, dw2_EFD

    sums = [_zeros(w.shape, wide_dtype(w.dtype), plan) for w in (w1_EDF, w3_EDF, w2_EFD)]
    start = (_zeros((rows, x_MD.shape[1]), x_MD.dtype, plan), _zeros(rows, weight_r.dtype, plan), *sums)
    dx_rD, dweight_r, *dw = jax.lax.fori_loop(0, plan.blocks_E.sum(), body, start)
    dx_MD = take(dx_rD, plan.row_Mj).sum(1)
    return dx_MD, take(dweight_r, plan.row_Mj), *(d.astype(w1_EDF.dtype) for d in dw), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _outer(x_QD, y_QF):
    return jnp.einsum("QD,QF->DF", x_QD, y_QF, preferred_element_type=wide_dtype(x_QD.dtype))


def _expert_of_block(plan, block):
    blocks = len(plan.token_r) // block
    return jnp.searchsorted(jnp.cumsum(plan.blocks_E), jnp.arange(blocks), side="right", method="compare_all")


def _block(x, n, block):
    return jax.lax.dynamic_slice_in_dim(x, n * block, block)


def _put(x, block_value, n):
    return jax.lax.dynamic_update_slice_in_dim(x, block_value, n * len(block_value), 0)


def _zeros(shape, dtype, plan):
    """Zeros that, inside shard_map, vary over the same mesh axes as the plan.

    The initial values of a loop must have the same type as its results.
    """
    return jnp.full(shape, plan.blocks_E[0] * 0, dtype)
