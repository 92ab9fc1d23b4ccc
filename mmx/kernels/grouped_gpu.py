"""Products of rows with their expert's matrix on NVIDIA GPUs (Pallas-Triton); rows are sorted as `grouped.plan` has them.

    y_i = x_i W_e        dx_i = dy_i W_e^T        dW_e = sum_i x_i^T dy_i,   i the rows of expert e

XLA has no such product for GPUs: its `ragged_dot` multiplies every row by all E matrices, zeros for those not its own, E times
the work. Here a program takes a block of rows, all of one expert, and COLUMNS columns of its matrix; or, for dW, a tile of
one expert's, summed over its blocks. Sums are float32, products of float32 operands IEEE float32.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmx.kernels import platform, products

LEAST = 16              # rows of a block, and what divides a matrix's sides: Triton's products are no smaller


class Tile(NamedTuple):
    columns: int        # of a tile, or what divides the side
    depth: int          # summed at a time
    warps: int
    stages: int


# Without spills on H100 and A100; bfloat16's is the fastest of those tried on an H100 on 2026-11-27.
TILES = {"bfloat16": Tile(128, 64, 8, 3), "float32": Tile(32, 16, 8, 1)}


def refusal(x_IA, w_EAB, block: int) -> str:
    """Why the kernels do not take these arrays; empty where they do."""
    A, B = w_EAB.shape[1:]
    if A % LEAST or B % LEAST or block % LEAST:
        return f"matrices of {A} x {B}, blocks of {block} rows: the GPU's kernel takes multiples of {LEAST}"
    if x_IA.dtype.name not in TILES or w_EAB.dtype != x_IA.dtype:
        return f"rows are {x_IA.dtype}, matrices {w_EAB.dtype}: the GPU's kernel takes bfloat16 or float32 for both"
    return platform.refusal("gpu", x_IA)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dot(x_IA, w_EAB, blocks_E, block: int, interpret=False):
    """y_IB. An expert has `blocks_E` blocks of `block` rows, experts one behind the other; behind all of them y is zero."""
    return _rows(x_IA, w_EAB, blocks_E, block, False, interpret)


def _forward(x_IA, w_EAB, blocks_E, block, interpret):
    return _rows(x_IA, w_EAB, blocks_E, block, False, interpret), (x_IA, w_EAB, blocks_E)


def _backward(block, interpret, residuals, dy_IB):
    x_IA, w_EAB, blocks_E = residuals
    return (_rows(dy_IB, w_EAB, blocks_E, block, True, interpret),
            _matrices(x_IA, dy_IB, blocks_E, block, w_EAB.dtype, interpret), None)


dot.defvjp(_forward, _backward)


def _rows(x_IA, w_EAB, blocks_E, block, transposed, interpret):
    """x W_e or, `transposed`, x W_e^T."""
    I, A = x_IA.shape
    B = w_EAB.shape[1 if transposed else 2]
    tile = TILES[x_IA.dtype.name]
    columns, depth = _divisor(B, tile.columns), _divisor(A, tile.depth)

    def kernel(ends_ref, x_ref, w_ref, y_ref):
        n, at = pl.program_id(1), pl.ds(pl.program_id(0) * columns, columns)
        ends_E = plgpu.load(ends_ref, mask=jnp.arange(ends_ref.shape[0], dtype=jnp.int32) < E, other=0)
        expert = jnp.sum((ends_E <= n) & (jnp.arange(ends_ref.shape[0], dtype=jnp.int32) < E), dtype=jnp.int32)

        @pl.when(expert < E)
        def _():
            def step(i, y_QB):
                along = pl.ds(i * depth, depth)
                w = plgpu.load(w_ref.at[(expert, at, along) if transposed else (expert, along, at)])
                return y_QB + products.dot(plgpu.load(x_ref.at[:, along]), w, 1, 1 if transposed else 0)
            y_QB = jax.lax.fori_loop(0, A // depth, step, jnp.zeros(y_ref.shape, jnp.float32))
            y_ref[...] = y_QB.astype(y_ref.dtype)

        @pl.when(expert >= E)
        def _():
            y_ref[...] = jnp.zeros_like(y_ref)
    E = w_EAB.shape[0]
    whole = lambda shape: pl.BlockSpec(shape, lambda b, n: (0,) * len(shape))
    return pl.pallas_call(
        kernel, grid=(B // columns, I // block),
        in_specs=[whole((pl.next_power_of_2(E),)), pl.BlockSpec((block, A), lambda b, n: (n, 0)), whole(w_EAB.shape)],
        out_specs=pl.BlockSpec((block, columns), lambda b, n: (n, b)), out_shape=_like(x_IA, (I, B), x_IA.dtype),
        compiler_params=_params(x_IA), interpret=interpret, name="grouped_rows")(jnp.cumsum(blocks_E), x_IA, w_EAB)


def _matrices(x_IA, dy_IB, blocks_E, block, dtype, interpret):
    """dW_EAB."""
    I, A = x_IA.shape
    B, E = dy_IB.shape[1], len(blocks_E)
    tile = TILES[x_IA.dtype.name]
    across, columns, depth = _divisor(A, tile.columns), _divisor(B, tile.columns), _divisor(block, tile.depth)

    def kernel(ends_ref, blocks_ref, x_ref, dy_ref, dw_ref):
        last = ends_ref[...] * (block // depth)

        def step(n, dw_AB):
            rows = pl.ds(n * depth, depth)
            return dw_AB + products.dot(plgpu.load(x_ref.at[rows, :]), plgpu.load(dy_ref.at[rows, :]), 0, 0)
        first = last - blocks_ref[...] * (block // depth)
        dw_AB = jax.lax.fori_loop(first, last, step, jnp.zeros(dw_ref.shape, jnp.float32))
        dw_ref[...] = dw_AB.astype(dw_ref.dtype)
    number = pl.BlockSpec((None,), lambda a, b, e: (e,))
    return pl.pallas_call(
        kernel, grid=(A // across, B // columns, E),
        in_specs=[number, number, pl.BlockSpec((I, across), lambda a, b, e: (0, a)),
                  pl.BlockSpec((I, columns), lambda a, b, e: (0, b))],
        out_specs=pl.BlockSpec((None, across, columns), lambda a, b, e: (e, a, b)), out_shape=_like(x_IA, (E, A, B), dtype),
        compiler_params=_params(x_IA), interpret=interpret,
        name="grouped_matrices")(jnp.cumsum(blocks_E), blocks_E, x_IA, dy_IB)


def _divisor(side, most):
    """The largest power of two that divides `side`, `most` at most."""
    return min(most, side & -side)


def _like(x, shape, dtype):
    """Inside shard_map, what varies over the mesh as x does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _params(x):
    tile = TILES[x.dtype.name]
    return plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
