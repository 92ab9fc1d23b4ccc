"""Products of rows with the matrix of their expert on NVIDIA GPUs (Pallas-Triton). Rows are sorted as `grouped.plan` describes.

    y_r = x_r W_e        dx_r = dy_r W_e^T        dW_e = sum_r x_r^T dy_r,   r the rows of expert e

XLA does not have such a product for GPUs: its `ragged_dot` multiplies every row by all E matrices, with zeros for the rows of
other experts, which is E times the work. Here, for y and dx, a program takes one block of rows, all of one expert, and some
columns of the expert's matrix. For dW, a program takes one tile of one expert's matrix and sums over the expert's blocks.
Sums are float32. Products of float32 operands are IEEE float32.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmx.kernels import platform, products

GRANULE = 16            # blocks and both sides of a matrix are multiples of it: Triton's products are not smaller


class Tile(NamedTuple):
    columns: int        # largest number of columns of a tile
    depth: int          # largest number of terms that one product sums
    warps: int
    stages: int         # of the software pipeline


# These do not spill on H100 and A100. The tile for bfloat16 is the fastest of those timed on an H100 on 2026-11-27.
TILES = {"bfloat16": Tile(128, 64, 8, 3), "float32": Tile(32, 16, 8, 1)}


def refusal(x_ri, w_Eio, block: int) -> str:
    """Returns why the kernels cannot run here or on these arrays; empty if they can."""
    inputs, outputs = w_Eio.shape[1:]
    if inputs % GRANULE or outputs % GRANULE or block % GRANULE:
        return f"matrices of {inputs} x {outputs}, blocks of {block} rows: the GPU kernel supports multiples of {GRANULE}"
    if x_ri.dtype.name not in TILES or w_Eio.dtype != x_ri.dtype:
        return f"rows are {x_ri.dtype}, matrices {w_Eio.dtype}: the GPU kernel supports bfloat16 or float32 for both"
    return platform.device_refusal("gpu", x_ri)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dot(x_ri, w_Eio, blocks_E, block: int, interpret=False):
    """Returns y_ro, the product of each row with the matrix of its expert.

    Expert e owns `blocks_E[e]` consecutive blocks of `block` rows, in the order of the experts. Rows after the last of these
    blocks give zero.
    """
    return _rows(x_ri, w_Eio, blocks_E, block, False, interpret)


def _forward(x_ri, w_Eio, blocks_E, block, interpret):
    return _rows(x_ri, w_Eio, blocks_E, block, False, interpret), (x_ri, w_Eio, blocks_E)


def _backward(block, interpret, residuals, dy_ro):
    x_ri, w_Eio, blocks_E = residuals
    return (_rows(dy_ro, w_Eio, blocks_E, block, True, interpret),
            _matrices(x_ri, dy_ro, blocks_E, block, w_Eio.dtype, interpret), None)


dot.defvjp(_forward, _backward)


def _rows(x_ri, w_Eio, blocks_E, block, transposed, interpret):
    """Returns x W_e for each row or, if `transposed`, x W_e^T; w is then w_Eoi."""
    rows, inputs = x_ri.shape
    outputs = w_Eio.shape[1 if transposed else 2]
    tile = TILES[x_ri.dtype.name]
    columns, depth = _divisor(outputs, tile.columns), _divisor(inputs, tile.depth)

    def kernel(ends_ref, x_ref, w_ref, y_ref):
        n, output_columns = pl.program_id(1), pl.ds(pl.program_id(0) * columns, columns)
        ends_E = plgpu.load(ends_ref, mask=jnp.arange(ends_ref.shape[0], dtype=jnp.int32) < E, other=0)
        expert = jnp.sum((ends_E <= n) & (jnp.arange(ends_ref.shape[0], dtype=jnp.int32) < E), dtype=jnp.int32)

        @pl.when(expert < E)
        def _():
            def step(i, y_Qo):
                terms = pl.ds(i * depth, depth)
                w = plgpu.load(w_ref.at[(expert, output_columns, terms) if transposed else (expert, terms, output_columns)])
                return y_Qo + products.dot(plgpu.load(x_ref.at[:, terms]), w, 1, 1 if transposed else 0)
            y_Qo = jax.lax.fori_loop(0, inputs // depth, step, jnp.zeros(y_ref.shape, jnp.float32))
            y_ref[...] = y_Qo.astype(y_ref.dtype)

        @pl.when(expert >= E)
        def _():
            y_ref[...] = jnp.zeros_like(y_ref)
    E = w_Eio.shape[0]
    whole = lambda shape: pl.BlockSpec(shape, lambda c, n: (0,) * len(shape))
    return pl.pallas_call(
        kernel, grid=(outputs // columns, rows // block),
        in_specs=[whole((pl.next_power_of_2(E),)), pl.BlockSpec((block, inputs), lambda c, n: (n, 0)), whole(w_Eio.shape)],
        out_specs=pl.BlockSpec((block, columns), lambda c, n: (n, c)), out_shape=_shape_like(x_ri, (rows, outputs), x_ri.dtype),
        compiler_params=_compiler_params(x_ri), interpret=interpret, name="grouped_rows")(jnp.cumsum(blocks_E), x_ri, w_Eio)


def _matrices(x_ri, dy_ro, blocks_E, block, dtype, interpret):
    """Returns dw_Eio."""
    (rows, inputs), outputs, E = x_ri.shape, dy_ro.shape[1], len(blocks_E)
    tile = TILES[x_ri.dtype.name]
    tile_i, tile_o, depth = _divisor(inputs, tile.columns), _divisor(outputs, tile.columns), _divisor(block, tile.depth)

    def kernel(ends_ref, blocks_ref, x_ref, dy_ref, dw_ref):
        last = ends_ref[...] * (block // depth)

        def step(n, dw_io):
            terms = pl.ds(n * depth, depth)
            return dw_io + products.dot(plgpu.load(x_ref.at[terms, :]), plgpu.load(dy_ref.at[terms, :]), 0, 0)
        first = last - blocks_ref[...] * (block // depth)
        dw_io = jax.lax.fori_loop(first, last, step, jnp.zeros(dw_ref.shape, jnp.float32))
        dw_ref[...] = dw_io.astype(dw_ref.dtype)
    scalar = pl.BlockSpec((None,), lambda a, o, e: (e,))
    return pl.pallas_call(
        kernel, grid=(inputs // tile_i, outputs // tile_o, E),
        in_specs=[scalar, scalar, pl.BlockSpec((rows, tile_i), lambda a, o, e: (0, a)),
                  pl.BlockSpec((rows, tile_o), lambda a, o, e: (0, o))],
        out_specs=pl.BlockSpec((None, tile_i, tile_o), lambda a, o, e: (e, a, o)),
        out_shape=_shape_like(x_ri, (E, inputs, outputs), dtype), compiler_params=_compiler_params(x_ri), interpret=interpret,
        name="grouped_matrices")(jnp.cumsum(blocks_E), blocks_E, x_ri, dy_ro)


def _divisor(side, largest):
    """Returns the largest power of two up to `largest` that divides `side`."""
    return min(largest, side & -side)


def _shape_like(x, shape, dtype):
    """Returns the shape and dtype of an output that, inside shard_map, varies over the same mesh axes as x."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _compiler_params(x):
    tile = TILES[x.dtype.name]
    return plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
