"""One decode step of a lightning layer for a batch, between its projections: one pass over the states.

For a row, every head h (model.md section 3):

    q, k, v = SiLU(q), SiLU(k), SiLU(v)        S <- exp(g_h) S + k^T v        o_h = q S
    y = sigmoid(gate) * norm * o / sqrt(mean of o^2 over all heads + eps)

All is float32 from the inputs to y, which alone is rounded. `layers/lightning.py` calls this for one token behind a cache, and
its `silu` and `norm_and_gate` around attention over more of them (which rounds q, k, v and o in between).

FLOPs a row and head: 5 K V, far below any roof. Bytes: 8 K V for the state, read and written once, and z (2 K + 3 V) for
q, k, v, gate and y of z bytes an element: 1.01 times the state's at K = V = 128 in bf16. So an implementation must read S
once, use it twice, and write it where it was: the kernels alias it, and a caller that donates the state to its jit pays no
copy. XLA's form does so as well, in one large fusion among small ones (static estimates on v5p, 64 rows of 64 heads: 125 us,
here 145, memory 194): what the kernels add is that a row that is not live (an idle slot) moves nothing of its own but
zeros of y, where XLA moves every state.

TPU. Grid (cores, rows of a core, parts of the heads), in order but for the cores. A step holds the state of its part's heads
in VMEM, in and out, twice (the pipeline); o of the row stays in VMEM until the last part, which norms and gates it. k and q
are transposed once a part, so that a head's are columns; S is then one pass of the vector unit from block to block. The
matrix unit has no use: a product of one row with S would load all of S as weights. The pipeline copies a block in or out
when its index changes. So a dead row names the block that is there: the last one of the live row before it in its core, or
before any, the first one of the live row to come, whose fetch merely begins early. In a core without live rows that block
is nobody's, and goes back as it came. (Where V is not whole lanes of 128, a state takes more of HBM, and XLA may lay it out
anew around the kernel: a copy.)

GPU. A program takes one row, one head and `VALUES` columns of S, in registers; dead ones end at once. A row's heads are then
in many programs, as they must be to fill a GPU at a small batch, so norm and gate are a second kernel of a program a row; o on
its way there, in float32, moves 8 V more bytes a row and head.
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

# Heads of a TPU step at most. Chosen 2026-11-23 by static schedule estimates of the TPU compiler (libtpu 0.0.42.1; cycles
# without memory stalls; never run on a TPU), 64 rows, 64 heads, K = V = 128, bf16: 145, 327 and 227 us on v5p,
# v5e and v6e, where the states take 194, 655 and 327 us of HBM; with 16 heads 185-218, 412-488 and 291-339.
HEADS = 32
INTERPRETED = 2, 2              # cores and heads, so that small tests take several steps
# Columns of a GPU program and its warps, warps of the one that norms. Timed on an H100, 2026-11-27, 64 rows, 64 heads,
# K = V = 128, bf16: 214 us (2.51 TB/s of states); 32 columns, which few rows take to fill it, 227, 16 333, XLA's form 213.
VALUES, WARPS, NORM_WARPS = (64, 32), 4, 16
LANES, MIB = 128, 1 << 20


def decode(q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B=None, *, eps, impl=None,
           interpret=False):
    """One token a row: SiLU, the state's step and read-out, RMSNorm over all heads, sigmoid gate.

    Args:
      q_BHK, k_BHK, v_BHV, gate_BHV: raw projections of the token, of one dtype; any B.
      norm_HV: the norm's scale.
      log_decay_H: minus the slope, never positive.
      state_BHKV: float32 (float64 for float64 inputs). Donate it to the jit around this, and it is updated in place.
      live_B: bools; a row that is not live keeps its state bit for bit and gives zero, whatever its inputs. None: all.
      eps: the norm's.
      impl: "xla", "tpu", "gpu" (which run or raise NotImplementedError), or None, which picks by platform, dtype and shape.
        XLA's form alone has gradients.
      interpret: runs a named kernel anywhere, slowly.

    Returns:
      y_BHV in the inputs' dtype, which only the output projection is left to follow, and state_BHKV.
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
            raise ValueError(f"{name} is {x.dtype} and q_BHK {q_BHK.dtype}; all four projections need one dtype")
    wide = wide_dtype(q_BHK.dtype)
    if state_BHKV.dtype != wide:
        raise ValueError(f"state_BHKV is {state_BHKV.dtype}; beside {q_BHK.dtype} it needs {wide}, to be updated in place")
    live_B = jnp.ones(B, bool) if live_B is None else live_B
    check(live_B, "B", "live_B", B=B)
    if live_B.dtype != bool:
        raise ValueError(f"live_B is {live_B.dtype}; it needs bool")

    def refusal(impl):
        if impl == "xla":
            return ""
        return (not interpret and platform.refusal(impl, state_BHKV)) or _unfit(impl, q_BHK.dtype, K, V, interpret)

    impl = platform.choose("the decode step", impl, IMPLS, refusal, state_BHKV)
    args = q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, jnp.asarray(log_decay_H, wide), state_BHKV, live_B
    return _xla(*args, eps) if impl == "xla" else _kernel(*args, eps, impl, interpret)


@functools.partial(jax.custom_jvp, nondiff_argnums=(8, 9, 10))
def _kernel(q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B, eps, impl, interpret):
    return KERNELS[impl](q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B, eps, interpret)


@_kernel.defjvp
def _refuse(eps, impl, *_):
    raise NotImplementedError(f"impl={impl!r}: the decode step's kernels have no gradients; impl='xla' has")


def _unfit(impl, dtype, K, V, interpret):
    """Why a kernel does not take these inputs; empty where it does."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"the inputs are {dtype}, the kernel takes bfloat16 and float32"
    if impl == "gpu":
        for letter, size in (("K", K), ("V", V)):
            if size not in (16, 32, 64, 128, 256):
                return f"{letter}={size}, the kernel takes head dims 16, 32, 64, 128 and 256"
    elif not _tpu_heads(1, 1, K, V, interpret)[1]:
        return f"K={K}, V={V}: the state of one head does not fit VMEM twice in and twice out"
    return ""


def silu(x):
    """x sigmoid(x), float32 at least."""
    wide = widen(x)
    return wide * jax.nn.sigmoid(wide)


def norm_and_gate(o, gate, norm, eps, axes, count):
    """sigmoid(gate) * norm * o / rms(o), the mean square over `axes`, which hold `count` values; in the gate's dtype."""
    wide = widen(o)
    rms = jax.lax.rsqrt(jnp.sum(wide ** 2, axis=axes, keepdims=True) / count + eps)
    return (jax.nn.sigmoid(widen(gate)) * (widen(norm) * (wide * rms))).astype(gate.dtype)


def _xla(q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B, eps):
    """The twin: every row's state moves, live or not."""
    q_BHK, k_BHK, v_BHV = map(silu, (q_BHK, k_BHK, v_BHV))
    decay_H11 = jnp.exp(log_decay_H)[:, None, None]
    new_BHKV = decay_H11 * state_BHKV + k_BHK[..., None] * v_BHV[:, :, None]
    o_BHV = jnp.einsum("BHK,BHKV->BHV", q_BHK, new_BHKV, precision=jax.lax.Precision.HIGHEST)
    y_BHV = norm_and_gate(o_BHV, gate_BHV, norm_HV, eps, (1, 2), norm_HV.size)
    return (jnp.where(live_B[:, None, None], y_BHV, 0),
            jnp.where(live_B[:, None, None, None], new_BHKV, state_BHKV))


def _tpu(q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B, eps, interpret):
    B, H, K, V = state_BHKV.shape
    cores, heads, vmem = _tpu_heads(B, H, K, V, interpret)
    parts, rows = H // heads, pl.cdiv(B, cores)
    live_B = jnp.pad(live_B, (0, cores * rows - B))
    place_B = _places(live_B, cores, parts)
    scalars = live_B.astype(jnp.int32), place_B, log_decay_H

    def place(core, row, part, live_B, place_B):
        b = core * rows + row
        return place_B[b] + live_B[b] * part

    def of_part(*shape):
        return pl.BlockSpec((1, heads, *shape), lambda c, r, p, live_B, place_B, _: (
            place(c, r, p, live_B, place_B), 0, *(0 for _ in shape)))

    row_shape = 1, parts, heads, V
    gates = pl.BlockSpec(row_shape, lambda c, r, p, live_B, place_B, _: (
        place(c, r, p, live_B, place_B) // parts, 0, 0, 0))
    ys = pl.BlockSpec(row_shape, lambda c, r, p, *_: (jnp.minimum(c * rows + r, B - 1), 0, 0, 0))
    norms = pl.BlockSpec(row_shape, lambda *_: (0, 0, 0, 0))
    by_part = lambda x: x.reshape(B * parts, heads, *x.shape[2:])
    by_row = lambda x: x.reshape(-1, parts, heads, V)
    arrays = by_part(q_BHK), by_part(k_BHK), by_part(v_BHV), by_row(gate_BHV), by_row(norm_HV), by_part(state_BHKV)
    y_BHV, state_BHKV = pl.pallas_call(
        functools.partial(_tpu_kernel, B=B, rows=rows, eps=eps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(cores, rows, parts),
            in_specs=[of_part(K), of_part(K), of_part(V), gates, norms, of_part(K, V)],
            out_specs=[ys, of_part(K, V)],
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
    """Cores, heads a step (0: not even one fits), and the VMEM that the kernel may take."""
    (cores, most), vmem = INTERPRETED if interpret else (1, HEADS), 16 * MIB
    if not interpret and pltpu.is_tpu_device():
        chip = pltpu.get_tpu_info()
        cores, vmem = chip.num_cores, chip.vmem_capacity_bytes
    a_head = 4 * 4 * pl.cdiv(K, 8) * 8 * pl.cdiv(V, LANES) * LANES
    most = min(most, vmem * 3 // 4 // a_head)
    cores = pl.cdiv(B, pl.cdiv(B, cores))       # each has a row
    return cores, max((d for d in range(1, most + 1) if H % d == 0), default=0), vmem


def _places(live_B, cores, parts):
    """The block of each row's first part, or of all its parts where it is dead; `live_B` is cut evenly among cores."""
    def of_core(live_B, first):
        row_B = jnp.arange(len(live_B), dtype=jnp.int32)
        last_B = jax.lax.cummax(jnp.where(live_B, row_B, -1))
        there_B = jnp.where(last_B < 0, jnp.argmax(live_B).astype(jnp.int32) * parts, last_B * parts + parts - 1)
        return first * parts + jnp.where(live_B, row_B * parts, there_B)
    rows = len(live_B) // cores
    firsts = jnp.arange(cores, dtype=jnp.int32) * rows
    return jax.vmap(of_core)(live_B.reshape(cores, rows), firsts).reshape(-1)


def _tpu_kernel(live_ref, place_ref, log_decay_ref, q_ref, k_ref, v_ref, gate_ref, norm_ref, state_ref, y_ref, new_ref,
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
        y_ref[...] = norm_and_gate(o_ref[...], gate_ref[...], norm_ref[...], eps, (1, 2, 3), parts * heads * V)

    # The last core's rows may go past the batch.
    @pl.when(~live & (part == 0) & (b < B))
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    @pl.when(~live & (part == 0) & (row == 0))
    def _():
        new_ref[...] = state_ref[...]


def _gpu(q_BHK, k_BHK, v_BHV, gate_BHV, norm_HV, log_decay_H, state_BHKV, live_B, eps, interpret):
    B, H, K, V = state_BHKV.shape
    values = min(V, next((v for v in VALUES if B * H * V // v >= 2 * platform.GPUS["h100"].cores), VALUES[-1]))
    tiles = V // values
    place = lambda shape, index: pl.BlockSpec(shape, lambda x: index(x // (H * tiles), x // tiles % H, x % tiles))
    keys = place((None, None, K), lambda b, h, tile: (b, h, 0))
    columns = place((None, None, values), lambda b, h, tile: (b, h, tile))
    states = place((None, None, K, values), lambda b, h, tile: (b, h, 0, tile))
    live_B = live_B.astype(jnp.int32)
    o_BHV, state_BHKV = pl.pallas_call(
        _gpu_kernel, grid=(B * H * tiles,),
        in_specs=[place((None,), lambda b, h, tile: (b,)), place((None,), lambda b, h, tile: (h,)), keys, keys, columns,
                  states],
        out_specs=(columns, states),
        out_shape=(jax.ShapeDtypeStruct(v_BHV.shape, jnp.float32), jax.ShapeDtypeStruct(state_BHKV.shape, jnp.float32)),
        input_output_aliases={5: 1}, interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        name="lightning_decode")(live_B, log_decay_H, q_BHK, k_BHK, v_BHV, state_BHKV)
    X = H * V
    P = pl.next_power_of_2(X)
    row = pl.BlockSpec((None, P), lambda b: (b, 0))
    y_BX = pl.pallas_call(
        functools.partial(_gpu_norm_kernel, eps=eps, count=X), grid=(B,),
        in_specs=[pl.BlockSpec((None,), lambda b: (b,)), row, row, pl.BlockSpec((P,), lambda b: (0,))], out_specs=row,
        out_shape=jax.ShapeDtypeStruct((B, X), v_BHV.dtype), interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=NORM_WARPS, num_stages=1),
        name="lightning_decode_norm")(live_B, o_BHV.reshape(B, X), gate_BHV.reshape(B, X), norm_HV.reshape(X))
    return y_BX.reshape(B, H, V), state_BHKV


def _gpu_kernel(live_ref, log_decay_ref, q_ref, k_ref, v_ref, state_ref, o_ref, new_ref):
    @pl.when(live_ref[...] > 0)
    def _():
        q_K, k_K, v_V = silu(q_ref[...]), silu(k_ref[...]), silu(v_ref[...])
        state_KV = jnp.exp(log_decay_ref[...]) * state_ref[...] + k_K[:, None] * v_V[None, :]
        new_ref[...] = state_KV
        o_ref[...] = jnp.sum(q_K[:, None] * state_KV, axis=0)


def _gpu_norm_kernel(live_ref, o_ref, gate_ref, norm_ref, y_ref, *, eps, count):
    there_P = jnp.arange(o_ref.shape[0], dtype=jnp.int32) < count
    live_P = there_P & (live_ref[...] > 0)
    o_P, gate_P, norm_P = (plgpu.load(ref, mask=live_P, other=0) for ref in (o_ref, gate_ref, norm_ref))
    y_P = norm_and_gate(o_P, gate_P, norm_P, eps, 0, count)
    plgpu.store(y_ref, jnp.where(live_P, y_P, 0), mask=there_P)


KERNELS = {"tpu": _tpu, "gpu": _gpu}
IMPLS = "xla", *KERNELS
