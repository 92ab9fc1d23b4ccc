"""One decode step of a lightning layer: from the projections q, k, v and gate of one token per row to the normed, gated output.

For each row and head h (docs/model.md section 3):

    q, k, v = SiLU(q), SiLU(k), SiLU(v)        S <- exp(g_h) S + k^T v        o_h = q S
    y = sigmoid(gate) * norm * o / sqrt(mean of o^2 over all heads + eps)

All values from the inputs to y are float32; only y is rounded to the inputs' dtype. `layers/lightning.py` calls `decode` for a
single token with a cache. For longer inputs it calls `silu`, attention and `norm_and_gate`, and q, k, v and o are rounded to
the inputs' dtype between these calls.

Memory limits every implementation (docs/kernels.md, "Decode"). Per row and head, 5 K V FLOPs are computed, and 8 K V bytes of
states and (2 K + 3 V) elements of q, k, v, gate and y are read or written. The kernels write the states in place if the caller
donates them to its jit. Unlike XLA, they do not move the states of rows that are not live (idle slots).

TPU. The grid is (cores, rows of a core, parts of the heads); a core executes its steps in order. The states of a step's heads
are in VMEM, as input and as output, each twice for the pipeline. o of the row stays in VMEM until the step of the last part,
which normalizes and gates it. k and q are transposed once per step, so that k and q of one head are columns; the vector unit
then makes one pass over S. The matrix unit would not help: for a product of one row with S it would load all of S as weights.
If V is not a multiple of 128 lanes, a state takes more HBM, and XLA may copy it to another layout around the kernel.

A block is the states of one part of the heads of one row. The pipeline copies a block between HBM and VMEM only when the block
index changes from one step to the next. The steps of a live row take its blocks in order. All steps of a row that is not live
take the same block, one that is copied anyway if the core has live rows:

    row that is not live             block of all its steps
    after a live row of the core     last block of the previous live row
    before the first live row        first block of the first live row
    in a core without live rows      first block of the core: it is read and written back unchanged

GPU. A program takes one row, one head and some columns of S (see COLUMNS), which stay in registers; programs of rows that are
not live end at once. A second kernel, with one program per row, normalizes and gates. The first kernel writes o in float32 and
the second reads it, which adds 8 V bytes per row and head.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from mmx.dims import check
from mmx.kernels import platform
from mmx.kernels.dtypes import check_floats, wide_dtype, widen
from mmx.kernels.lightning.api import check_log_decay

# Largest number of heads of a TPU step. Chosen on 2026-11-23 by static schedule estimates of the TPU compiler (libtpu 0.0.42.1;
# cycles without memory stalls; never run on a TPU) for 64 rows, 64 heads, K = V = 128, bf16, in us:
#                                        v5p        v5e        v6e
#     32 heads                           145        327        227
#     16 heads (range of estimates)      185-218    412-488    291-339
#     HBM needs, for the states          194        655        327
MAX_HEADS = 32
INTERPRETED_CORES, INTERPRETED_HEADS = 2, 2         # in the interpreter: few heads, so that small tests take several steps
# Columns of S that a GPU program processes. `_gpu` uses 64 if the grid then has at least two programs for each multiprocessor
# of an H100, otherwise 32.
# Timed on an H100 on 2026-11-27 for 64 rows, 64 heads, K = V = 128, bf16. 64 columns: 214 us (2.51 TB/s of states). 32 columns:
# 227 us. 16 columns: 333 us. XLA: 213 us.
COLUMNS = 64, 32
WARPS, NORM_WARPS = 4, 16       # warps of a program of the first and of the second GPU kernel
LANES, SUBLANES, MIB = 128, 8, 1 << 20


def decode(q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B=None, *, eps, impl=None,
           interpret=False):
    """Decodes one token per row: SiLU, update and read-out of the state, RMSNorm over all heads, sigmoid gate.

    Args:
      q_BHK, k_BHK, v_BHV, gate_BHV: raw projections of the token, of one dtype; any B.
      norm_HV: scale of the norm.
      log_decay_H: log of the factor by which the state decays; at most 0.
      state_BHKV: float32 (float64 for float64 inputs). It is updated in place if the caller donates it to the surrounding jit.
      live_B: bools. A row that is not live keeps its state bit for bit and gives zero, whatever its inputs. None: all are live.
      eps: epsilon of the norm.
      impl: "xla", "tpu" or "gpu". None: chosen by platform, dtype and shape. Only "xla" has gradients.
      interpret: whether to run a named kernel in Pallas' interpreter, which works anywhere but slowly.

    Returns:
      y_BHV in the inputs' dtype, the input of the output projection, and the new state_BHKV.

    Raises:
      ValueError: shapes, dtypes or values do not match this description.
      NotImplementedError: the named implementation does not exist, or cannot run here or on these arrays.
    """
    check(q_BHK, "BHK", "q_BHK")
    B, H, K = q_BHK.shape
    check(k_BHK, "BHK", "k_BHK", B=B, H=H, K=K)
    check(v_BHV, "BHV", "v_BHV", B=B, H=H)
    V = v_BHV.shape[2]
    check(gate_BHV, "BHV", "gate_BHV", B=B, H=H, V=V)
    check(norm_HV, "HV", "norm_HV", H=H, V=V)
    check_log_decay(log_decay_H, H)
    check(state_BHKV, "BHKV", "state_BHKV", B=B, H=H, K=K, V=V)
    check_floats(q_BHK=q_BHK, norm_HV=norm_HV)
    for name, x in (("k_BHK", k_BHK), ("v_BHV", v_BHV), ("gate_BHV", gate_BHV)):
        if x.dtype != q_BHK.dtype:
            raise ValueError(f"{name} is {x.dtype} and q_BHK {q_BHK.dtype}; all four projections must have one dtype")
    state_dtype = wide_dtype(q_BHK.dtype)
    if state_BHKV.dtype != state_dtype:
        raise ValueError(f"state_BHKV is {state_BHKV.dtype}; with {q_BHK.dtype} inputs it must be {state_dtype}")
    live_B = jnp.ones(B, bool) if live_B is None else live_B
    check(live_B, "B", "live_B", B=B)
    if live_B.dtype != bool:
        raise ValueError(f"live_B is {live_B.dtype}; it must be bool")

    def refusal(impl):
        if impl == "xla":
            return ""
        device_refusal = "" if interpret else platform.device_refusal(impl, state_BHKV)
        return device_refusal or _array_refusal(impl, q_BHK.dtype, K, V, interpret)

    impl = platform.choose("the decode step", impl, IMPLS, refusal, state_BHKV)
    args = q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, jnp.asarray(log_decay_H, state_dtype), state_BHKV, live_B
    return _xla(*args, eps) if impl == "xla" else _kernel(*args, eps, impl, interpret)


@functools.partial(jax.custom_jvp, nondiff_argnums=(8, 9, 10))
def _kernel(q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B, eps, impl, interpret):
    return KERNELS[impl](q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B, eps, interpret)


@_kernel.defjvp
def _refuse_gradient(eps, impl, *_):
    raise NotImplementedError(f"impl={impl!r}: the kernels of the decode step have no gradients; use impl='xla'")


def _array_refusal(impl, dtype, K, V, interpret):
    """Returns why a kernel does not support these inputs; empty if it does."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"the inputs are {dtype}; the kernel supports bfloat16 and float32"
    if impl == "gpu":
        for letter, size in (("K", K), ("V", V)):
            if size not in (16, 32, 64, 128, 256):
                return f"{letter}={size}; the kernel supports head dims 16, 32, 64, 128 and 256"
    elif not _tpu_heads(1, 1, K, V, interpret)[1]:
        return f"K={K}, V={V}: VMEM is too small for the state of one head, which the pipeline keeps four times"
    return ""


def silu(x):
    """Returns x sigmoid(x) in float32 (float64 for float64)."""
    wide = widen(x)
    return wide * jax.nn.sigmoid(wide)


def norm_and_gate(o, gate, norm, eps, axes, count):
    """Returns sigmoid(gate) * norm * o / rms(o) in the gate's dtype. rms is over `axes`, which have `count` values."""
    wide = widen(o)
    inverse_rms = jax.lax.rsqrt(jnp.sum(wide ** 2, axis=axes, keepdims=True) / count + eps)
    return (jax.nn.sigmoid(widen(gate)) * (widen(norm) * (wide * inverse_rms))).astype(gate.dtype)


def _xla(q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B, eps):
    """The XLA implementation. It reads and writes the state of every row, live or not."""
    q_BHK, k_BHK, v_BHV = map(silu, (q_BHK, k_BHK, v_BHV))
    decay_H11 = jnp.exp(log_decay_H)[:, None, None]
    new_BHKV = decay_H11 * state_BHKV + k_BHK[..., None] * v_BHV[:, :, None]
    o_BHV = jnp.einsum("BHK,BHKV->BHV", q_BHK, new_BHKV, precision=jax.lax.Precision.HIGHEST)
    y_BHV = norm_and_gate(o_BHV, gate_BHV, norm_HV, eps, axes=(1, 2), count=norm_HV.size)
    return (jnp.where(live_B[:, None, None], y_BHV, 0),
            jnp.where(live_B[:, None, None, None], new_BHKV, state_BHKV))


def _tpu(q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B, eps, interpret):
    B, H, K, V = state_BHKV.shape
    cores, heads, vmem = _tpu_heads(B, H, K, V, interpret)
    parts, rows = H // heads, pl.cdiv(B, cores)
    live_B = jnp.pad(live_B, (0, cores * rows - B))
    first_block_B = _first_blocks(live_B, cores, parts)
    scalars = live_B.astype(jnp.int32), first_block_B, log_decay_H

    def block_index(core, row, part, live_B, first_block_B):
        b = core * rows + row
        return first_block_B[b] + live_B[b] * part

    def part_spec(*shape):
        return pl.BlockSpec((1, heads, *shape), lambda c, r, p, live_B, first_block_B, _: (
            block_index(c, r, p, live_B, first_block_B), 0, *(0 for _ in shape)))

    row_shape = 1, parts, heads, V
    gate_spec = pl.BlockSpec(row_shape, lambda c, r, p, live_B, first_block_B, _: (
        block_index(c, r, p, live_B, first_block_B) // parts, 0, 0, 0))
    y_spec = pl.BlockSpec(row_shape, lambda c, r, p, *_: (jnp.minimum(c * rows + r, B - 1), 0, 0, 0))
    norm_spec = pl.BlockSpec(row_shape, lambda *_: (0, 0, 0, 0))
    by_part = lambda x: x.reshape(B * parts, heads, *x.shape[2:])
    by_row = lambda x: x.reshape(-1, parts, heads, V)
    arrays = by_part(q_BHK), by_part(k_BHK), by_part(v_BHV), by_row(gate_BHV), by_row(norm_HV), by_part(state_BHKV)
    y_BHV, state_BHKV = pl.pallas_call(
        functools.partial(_tpu_kernel, B=B, rows=rows, eps=eps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(cores, rows, parts),
            in_specs=[part_spec(K), part_spec(K), part_spec(V), gate_spec, norm_spec, part_spec(K, V)],
            out_specs=[y_spec, part_spec(K, V)],
            scratch_shapes=[pltpu.VMEM(row_shape, jnp.float32)]),
        out_shape=[jax.ShapeDtypeStruct((B, *row_shape[1:]), v_BHV.dtype),
                   jax.ShapeDtypeStruct(arrays[-1].shape, jnp.float32)],
        input_output_aliases={len(scalars) + len(arrays) - 1: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                                             vmem_limit_bytes=vmem),
        cost_estimate=pl.CostEstimate(flops=5 * B * H * K * V, transcendentals=2 * B * H * (K + 2 * V),
                                      bytes_accessed=sum(x.nbytes for x in (*arrays, state_BHKV, v_BHV))),
        interpret=interpret, name="lightning_decode")(*scalars, *arrays)
    return y_BHV.reshape(v_BHV.shape), state_BHKV.reshape(B, H, K, V)


def _tpu_heads(B, H, K, V, interpret):
    """Returns the number of cores, the heads of a step (0 if no head fits), and the bytes of VMEM that the kernel may use."""
    cores, max_heads, vmem = 1, MAX_HEADS, 16 * MIB
    if interpret:
        cores, max_heads = INTERPRETED_CORES, INTERPRETED_HEADS
    elif pltpu.is_tpu_device():
        chip = pltpu.get_tpu_info()
        cores, vmem = chip.num_cores, chip.vmem_capacity_bytes
    copies, float32_bytes = 4, 4        # the pipeline keeps two copies of each state as input and two as output
    bytes_per_head = copies * float32_bytes * pl.cdiv(K, SUBLANES) * SUBLANES * pl.cdiv(V, LANES) * LANES
    max_heads = min(max_heads, vmem * 3 // 4 // bytes_per_head)
    cores = pl.cdiv(B, pl.cdiv(B, cores))       # every core has a row
    return cores, max((d for d in range(1, max_heads + 1) if H % d == 0), default=0), vmem


def _first_blocks(live_B, cores, parts):
    """Returns the block index of the first step of each row. The rows are divided evenly among the cores.

    A live row uses this block for its part 0, the next block for its part 1, and so on. A row that is not live uses this block
    for all its parts (see the table in the module's docstring).
    """
    def of_core(live_B, first_row):
        row_B = jnp.arange(len(live_B), dtype=jnp.int32)
        last_live_B = jax.lax.cummax(jnp.where(live_B, row_B, -1))
        idle_block_B = jnp.where(last_live_B < 0, jnp.argmax(live_B).astype(jnp.int32) * parts, last_live_B * parts + parts - 1)
        return first_row * parts + jnp.where(live_B, row_B * parts, idle_block_B)
    rows = len(live_B) // cores
    first_rows = jnp.arange(cores, dtype=jnp.int32) * rows
    return jax.vmap(of_core)(live_B.reshape(cores, rows), first_rows).reshape(-1)


def _tpu_kernel(live_ref, first_block_ref, log_decay_ref, q_ref, k_ref, v_ref, gate_ref, norm_ref, state_ref, y_ref, new_ref,
                o_ref, *, B, rows, eps):
    core, row, part, parts = *map(pl.program_id, range(3)), pl.num_programs(2)
    b = core * rows + row
    _, heads, _, V = state_ref.shape
    live = live_ref[b] > 0

    @pl.when(live)
    def _():
        q_KH, k_KH, v_HV = silu(q_ref[0]).T, silu(k_ref[0]).T, silu(v_ref[0])
        for h in range(heads):
            decay_1V = jnp.exp(jnp.full((1, V), log_decay_ref[part * heads + h]))
            state_KV = decay_1V * state_ref[0, h] + k_KH[:, h:h + 1] * v_HV[h:h + 1]
            new_ref[0, h] = state_KV
            o_ref[0, part, h:h + 1] = jnp.sum(q_KH[:, h:h + 1] * state_KV, axis=0, keepdims=True)

    @pl.when(live & (part == parts - 1))
    def _():
        y_ref[...] = norm_and_gate(o_ref[...], gate_ref[...], norm_ref[...], eps, axes=(1, 2, 3), count=parts * heads * V)

    @pl.when(~live & (part == 0) & (b < B))        # the batch is padded to a multiple of the cores
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    # The core's first block is written back even if none of its rows is live. A live row, if any, overwrites this copy.
    @pl.when(~live & (part == 0) & (row == 0))
    def _():
        new_ref[...] = state_ref[...]


def _gpu(q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B, eps, interpret):
    B, H, K, V = state_BHKV.shape
    enough_programs = 2 * platform.GPUS["h100"].multiprocessors
    columns = min(V, next((n for n in COLUMNS if B * H * V // n >= enough_programs), COLUMNS[-1]))
    parts = V // columns
    block_spec = lambda shape, index: pl.BlockSpec(shape, lambda i: index(i // (H * parts), i // parts % H, i % parts))
    keys = block_spec((None, None, K), lambda b, h, part: (b, h, 0))
    column_block = block_spec((None, None, columns), lambda b, h, part: (b, h, part))
    states = block_spec((None, None, K, columns), lambda b, h, part: (b, h, 0, part))
    live_B = live_B.astype(jnp.int32)
    o_BHV, state_BHKV = pl.pallas_call(
        _gpu_kernel, grid=(B * H * parts,),
        in_specs=[block_spec((None,), lambda b, h, part: (b,)), block_spec((None,), lambda b, h, part: (h,)),
                  keys, keys, column_block, states],
        out_specs=(column_block, states),
        out_shape=(jax.ShapeDtypeStruct(v_BHV.shape, jnp.float32), jax.ShapeDtypeStruct(state_BHKV.shape, jnp.float32)),
        input_output_aliases={5: 1}, interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        name="lightning_decode")(live_B, log_decay_H, q_BHK, k_BHK, v_BHV, state_BHKV)
    width = H * V
    padded = pl.next_power_of_2(width)
    row = pl.BlockSpec((None, padded), lambda b: (b, 0))
    y = pl.pallas_call(
        functools.partial(_gpu_norm_kernel, eps=eps, width=width), grid=(B,),
        in_specs=[pl.BlockSpec((None,), lambda b: (b,)), row, row, pl.BlockSpec((padded,), lambda b: (0,))], out_specs=row,
        out_shape=jax.ShapeDtypeStruct((B, width), v_BHV.dtype), interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=NORM_WARPS, num_stages=1),
        name="lightning_decode_norm")(live_B, o_BHV.reshape(B, width), gate_BHV.reshape(B, width), norm_HV.reshape(width))
    return y.reshape(B, H, V), state_BHKV


def _gpu_kernel(live_ref, log_decay_ref, q_ref, k_ref, v_ref, state_ref, o_ref, new_ref):
    @pl.when(live_ref[...] > 0)
    def _():
        q_K, k_K, v_V = silu(q_ref[...]), silu(k_ref[...]), silu(v_ref[...])
        state_KV = jnp.exp(log_decay_ref[...]) * state_ref[...] + k_K[:, None] * v_V[None, :]
        new_ref[...] = state_KV
        o_ref[...] = jnp.sum(q_K[:, None] * state_KV, axis=0)


def _gpu_norm_kernel(live_ref, o_ref, gate_ref, norm_ref, y_ref, *, eps, width):
    """Normalizes and gates one row of `width` = H V values, which is padded to a power of two."""
    valid = jnp.arange(o_ref.shape[0], dtype=jnp.int32) < width
    live = valid & (live_ref[...] > 0)
    o, gate, norm = (plgpu.load(ref, mask=live, other=0) for ref in (o_ref, gate_ref, norm_ref))
    y = norm_and_gate(o, gate, norm, eps, axes=0, count=width)
    plgpu.store(y_ref, jnp.where(live, y, 0), mask=valid)


KERNELS = {"tpu": _tpu, "gpu": _gpu}
IMPLS = "xla", *KERNELS
