"""`mmx bench kernels`: compares the kernels with plain XLA and with softmax attention, compiled or timed.

Compiled for a described chip, with no need for the hardware: for TPUs a static schedule estimate, and the time that HBM needs
for the bytes that must be moved (the floor); for GPUs the resources of the compiled kernels. Nothing runs, so none of these
figures is a measured time. Timed on this machine's device: the median of several runs, for each length.

The inputs are one sequence (64 sequences for decode) with 64 heads of dimension 128, in bfloat16 (float32 when timed on a CPU).
The case "layer" adds the projections of MiniMax-Text-01, whose model dimension is 6,144.
"""
import functools
import importlib
import importlib.util
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mmx import config
from mmx.chips import CHIPS, GPUS, TPUS
from mmx.compilers import hlo, ptx, schedule
from mmx.config import ConfigError
from mmx.files import json_text
from mmx.kernels import LIGHTNING_IMPLS
from mmx.kernels.attention import softmax_attention
from mmx.kernels.lightning import api, decode, lightning_attention
from mmx.layers.common import Context
from mmx.layers.lightning import Lightning
from mmx.parallel.projection import from_heads, to_heads
from mmx.startup import interrupts

HEADS, HEAD_DIM, DIM, SEQUENCES, EPS = 64, 128, 6144, 64, 1e-6
STATE_BYTES = 2 * SEQUENCES * HEADS * HEAD_DIM * HEAD_DIM * 4       # decode reads and writes every state once


class Case(NamedTuple):
    function: str           # name of a function of this module with arguments (impl, tokens, documents)
    tokens: int
    documents: int          # 1: with segment ids
    bytes: int              # that must be moved through HBM; 0: not counted
    tpu: tuple[str, ...] = ("tpu", "xla")               # implementations to compile for TPUs
    gpu: tuple[str, ...] = ("gpu", "triton", "xla")     # and for GPUs


def _token_bytes(T, arrays):
    """Bytes of so many bfloat16 arrays of T tokens."""
    return arrays * T * HEADS * HEAD_DIM * 2


CASES = {
    "forward 8,192": Case("forward", 8_192, 0, _token_bytes(8_192, 4)),
    "forward 32,768": Case("forward", 32_768, 0, _token_bytes(32_768, 4)),
    "forward 8,192, documents": Case("forward", 8_192, 1, _token_bytes(8_192, 4)),
    "forward and backward 8,192": Case("forward_and_backward", 8_192, 0, _token_bytes(8_192, 11)),
    "decode, 64 sequences": Case("decode_step", 1, 0, STATE_BYTES, gpu=("gpu", "xla")),
    "softmax 8,192": Case("softmax", 8_192, 0, _token_bytes(8_192, 4), ("splash",), ("flash", "xla")),
    "layer 8,192": Case("layer", 8_192, 0, 0, ("fused", "separate"), ()),
}
COMPILED = TPUS + GPUS
TPU_COLUMNS = ("chip", "case", "impl", "static us", "HBM floor us", "static / floor", "MXU busy", "VMEM MiB", "spills",
               "HBM temporaries MiB", "GB moved", "moved / floor")
GPU_COLUMNS = ("chip", "case", "impl", "kernel", "registers", "spills", "shared B", "CTAs", "tensor-core instructions", "tf32",
               "GB moved", "moved / floor", "faults")
GPU_LOCK = threading.Lock()     # jax-triton has one cache of compiled kernels and one dump folder for the whole process
LENGTHS = "1024,2048,4096,8192,16384,32768,65536,131072"
LIMIT = 20.0            # seconds: lengths at which an implementation is expected to take longer are skipped
RUNS = 5                # least number of timed runs, after two runs to compile and warm up


def forward(impl, T, documents):
    """A forward pass of lightning attention, and the shapes of its arguments."""
    kernel = importlib.import_module(f"mmx.kernels.lightning.{impl}")

    def run(q, k, v, log_decay_H, segments_BT, state):
        return kernel.forward(q, k, v, log_decay_H, segments_BT, state, None)
    return run, _shapes(int(T), int(documents))


def forward_and_backward(impl, T, documents):
    """A forward and a backward pass of lightning attention, and the shapes of their arguments."""
    kernel = importlib.import_module(f"mmx.kernels.lightning.{impl}")

    def run(q, k, v, log_decay_H, segments_BT, state, do, dstate):
        shared = q, k, v, log_decay_H, segments_BT, state
        return kernel.forward(*shared, None), kernel.backward(*shared, do, dstate, None)
    shapes = _shapes(int(T), int(documents))
    return run, (*shapes, shapes[2], shapes[5])


def decode_step(impl, T=1, documents=0):
    """One decoding step of all sequences, and the shapes of its arguments."""
    array, f32 = jax.ShapeDtypeStruct, jnp.float32
    x, norm = array((SEQUENCES, HEADS, HEAD_DIM), jnp.bfloat16), array((HEADS, HEAD_DIM), jnp.bfloat16)
    log_decay_H, state = array((HEADS,), f32), array((SEQUENCES, HEADS, HEAD_DIM, HEAD_DIM), f32)
    step = jax.jit(functools.partial(decode.decode, eps=EPS, impl=impl), donate_argnums=6)
    return step, (x, x, x, x, norm, log_decay_H, state, array((SEQUENCES,), bool))


def softmax(impl, T, documents=0):
    """A forward pass of softmax attention (an entry of SOFTMAX), and the shapes of its arguments."""
    return SOFTMAX[impl], _shapes(int(T), 0)[:3]


def _cudnn(q, k, v):
    time_first = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    return jnp.moveaxis(jax.nn.dot_product_attention(*time_first, is_causal=True, implementation="cudnn"), 1, 2)


SOFTMAX = {"splash": functools.partial(softmax_attention, impl="tpu"),
           "xla": functools.partial(softmax_attention, impl="xla"), "flash": functools.partial(softmax_attention, impl="gpu"),
           "cudnn": _cudnn}


def layer(form, T, documents=0):
    """A lightning attention layer with its projections, and the shapes of its arguments.

    Form "separate" keeps XLA from fusing SiLU, and norm and gate, with the operations next to them.
    """
    array = jax.ShapeDtypeStruct
    mixer = Lightning(config.Model(dim=DIM, heads=HEADS, head_dim=HEAD_DIM, pattern="L", layers=1, dtype="bfloat16"))
    context = Context(None, None, None)
    u_BTD, log_decay_H = array((1, int(T), DIM), jnp.bfloat16), array((HEADS,), jnp.float32)
    params = jax.eval_shape(mixer.init, jax.random.key(0), u_BTD, context, None, log_decay_H)["params"]
    params = jax.tree.map(lambda x: array(x.shape, jnp.bfloat16), params)
    barrier = jax.lax.optimization_barrier

    def separate(p, u_BTD, log_decay_H):
        q, k, v, gate = map(barrier, to_heads(u_BTD, **{name: p[name] for name in ("q_DHK", "k_DHK", "v_DHV", "gate_DHV")}))
        o_BHTV, _ = lightning_attention(*(barrier(decode.silu(x).astype(x.dtype)) for x in (q, k, v)), log_decay_H)
        y_BHTV = decode.norm_and_gate(barrier(o_BHTV), gate, p["norm_HV"][:, None], EPS, (1, 3), HEADS * HEAD_DIM)
        return from_heads(barrier(y_BHTV), p["out_HVD"])

    def fused(p, u_BTD, log_decay_H):
        return mixer.apply({"params": p}, u_BTD, context, None, log_decay_H)[0]
    return {"separate": separate, "fused": fused}[form], (params, u_BTD, log_decay_H)


def _shapes(T, documents):
    """Shapes of q, k, v, log_decay_H, segments_BT and the state."""
    array = jax.ShapeDtypeStruct
    x, state = array((1, HEADS, T, HEAD_DIM), jnp.bfloat16), array((1, HEADS, HEAD_DIM, HEAD_DIM), jnp.float32)
    return x, x, x, array((HEADS,), jnp.float32), array((1, T), jnp.int32) if documents else None, state


def kernels(chips, as_json: bool, live: bool = False, lengths: str | None = None, out: str | None = None) -> int:
    """Compiles the kernels for described chips, or times them on this machine's device; prints tables or JSON.

    Args:
      chips: names in COMPILED. None: time if this machine has an accelerator, else compile for all chips whose compiler is
        installed.
      live: time, even on a CPU.
      lengths: sequence lengths to time, separated by commas; None: LENGTHS.
      out: folder for kernels.png, the plot of the times; None: the current folder.
    Returns:
      The exit status: 1 if a GPU kernel has a fault, else 0.
    """
    if live and chips:
        raise ConfigError("--chip compiles for a described chip and --live times this machine's device: give only one of them")
    if live or (chips is None and jax.default_backend() != "cpu"):
        _time(config.parse_lengths(LENGTHS if lengths is None else lengths), Path(out or "."), as_json)
        return 0
    for flag, given in (("--lengths", lengths), ("--out", out)):
        if given is not None:
            raise ConfigError(f"{flag} {given} applies to timing only, and this command compiles: add --live to time")
    reasons = {chip: (ptx if chip in GPUS else schedule).missing() for chip in COMPILED}
    chips = chips or [chip for chip in COMPILED if not reasons[chip]] or COMPILED
    for chip in chips:
        if chip not in COMPILED:
            raise ConfigError(f"--chip {chip} is unknown; known chips: {', '.join(COMPILED)}")
        if reasons[chip]:
            raise ConfigError(f"--chip {chip}: {reasons[chip]}")
    if set(GPUS) & set(chips) and (reason := api.missing("triton")):
        print(f"mmx: no rows for triton: {reason}", file=sys.stderr)
    jobs = [(chip, name, impl) for chip in chips for name, case in CASES.items()
            for impl in (case.gpu if chip in GPUS else case.tpu)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:        # each TPU case compiles in its own process
        results = pool.map(lambda job: (_compile_for_gpu if job[0] in GPUS else _compile_for_tpu)(*job), jobs)
        rows = [row for some in tqdm(results, "compiling", len(jobs), disable=None) for row in some]
    faults = [f"{row['chip']}, {row['case']}: {fault}" for row in rows for fault in row.get("faults", ())]
    if as_json:
        print(json_text.dumps(rows, indent=1))
    else:
        _tables(rows)
    for fault in faults:
        print(f"mmx: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _tables(rows):
    _show([row for row in rows if row["chip"] not in GPUS], "static schedule estimate by the TPU compiler")
    for fused, separate in zip(*([row for row in rows if row.get("impl") == form] for form in ("fused", "separate"))):
        print(f"{fused['chip']}, {fused['case']}: {separate['GB moved']} GB with separate SiLU, norm and gate; "
              f"{fused['GB moved']} GB fused; saved {separate['GB moved'] - fused['GB moved']:.2f} GB")
    gpus = [{name: x for name, x in row.items() if name != "faults"} for row in rows if row["chip"] in GPUS]
    _show(gpus, "compiled resources of the GPU kernels",
          "GB moved: each operand and each result of an operation once; an array that is sliced counts by its slice. For plain "
          "XLA only the total is listed: its many fusions and library products have no counterpart in the other rows.")


def _compile_for_tpu(chip, name, impl):
    """The row of one case compiled for a TPU, in a list."""
    case = CASES[name]
    function = f"mmx.compilers.bench:{case.function}:{impl}:{case.tokens}:{case.documents}"
    row = dict.fromkeys(TPU_COLUMNS) | {"chip": chip, "case": name, "impl": impl}
    if case.function == "layer":        # the schedule estimate of its large products is below the matrix units' own limit
        temporaries, moved = schedule.memory(function, chip)
        return [row | {"HBM temporaries MiB": temporaries >> 20, "GB moved": round(moved / 1e9, 2)}]
    floor = case.bytes / CHIPS[chip].bandwidth * 1e6
    cost = schedule.cost(function, chip)
    # The compiler counts the bytes of a loop's body once, so bytes are listed only for programs without loops.
    no_loops = impl == "tpu" or case.function == "decode_step"
    return [row | {"static us": round(cost.us), "HBM floor us": round(floor), "static / floor": round(cost.us / floor, 2),
                   "MXU busy": f"{cost.mxu:.0%}", "VMEM MiB": round(cost.vmem / 2 ** 20, 1), "spills": cost.spills,
                   "HBM temporaries MiB": cost.temporaries >> 20, "GB moved": round(cost.bytes / 1e9, 2) if no_loops else None,
                   "moved / floor": round(cost.bytes / case.bytes, 2) if no_loops else None}]


def _compile_for_gpu(chip, name, impl):
    """Rows of the kernels that use tensor cores or keep a state, and one row for the whole program."""
    if impl == "triton" and api.missing(impl):
        return []
    target, case = CHIPS[chip].gpu.description, CASES[name]
    with GPU_LOCK:
        compiled, (moved, launches) = _compiled(target, name, impl)
    rows = []
    for short, cost in sorted((kernel.partition(" ")[0], cost) for kernel, cost in compiled.items() if impl != "xla"):
        if cost.tensor or any(part in short for part in ("carry", "decode")):
            rows.append({"kernel": short, "registers": cost.registers, "spills": cost.spills, "shared B": cost.shared,
                         "CTAs": cost.ctas, "tensor-core instructions": cost.tensor, "tf32": cost.tf32,
                         "faults": ptx.faults({short: cost}, target)})
    # Softmax reads keys and values once for each block of queries. HLO does not show how much of that the L2 cache saves.
    counted = case.function != "softmax"
    rows.append({"kernel": f"all, {launches} launches", "GB moved": round(moved / 1e9, 2) if counted else None,
                 "moved / floor": round(moved / case.bytes, 2) if counted else None})
    return [dict.fromkeys(GPU_COLUMNS) | {"chip": chip, "case": name, "impl": impl, "faults": []} | row for row in rows]


@functools.cache
def _compiled(target, name, impl):
    """The kernels of a case compiled for a GPU, and (bytes moved, operations launched)."""
    case = CASES[name]
    run, shapes = globals()[case.function](impl, case.tokens, case.documents)
    kernels, text = (_triton_program if impl == "triton" else ptx.program)(run, *shapes, chip=target)
    return kernels, hlo.bytes_moved(text)


def _triton_program(run, *shapes, chip):
    """The same as `ptx.program` for jax-triton, which dumps its kernels itself; the grids are recorded at its calls."""
    import jax_triton
    call, grids = jax_triton.triton_call, {}

    def recorded(*args, kernel, grid, **kwargs):
        grids[kernel.fn.__name__] = math.prod(grid)
        return call(*args, kernel=kernel, grid=grid, **kwargs)
    with (tempfile.TemporaryDirectory() as folder, interrupts.removing(folder),
          mock.patch.object(jax_triton, "triton_call", recorded),
          mock.patch.multiple(      # an empty cache, because jax-triton dumps a kernel only when it compiles it
              jax_triton.triton_lib, _JAX_TRITON_DUMP_DIR=folder, _COMPILED_KERNEL_CACHE={})):
        kernels, text = ptx.program(run, *shapes, chip=chip)
        return kernels | {name: cost._replace(ctas=grids[name.partition(" ")[0]])
                          for name, cost in ptx.read_dump(folder, chip).items()}, text


def _time(lengths, out, as_json):
    """Times the kernels, writes the plot and prints the rows."""
    out.mkdir(parents=True, exist_ok=True)
    rows = _measure(lengths)
    plot = _plot(rows, out / "kernels.png")
    if as_json:
        print(json_text.dumps(rows, indent=1))
        return
    _show(rows, f"measured on {jax.devices()[0].device_kind}, medians")
    print(f"plot: {plot}")


def _measure(lengths):
    """Rows of times: forward and backward of every implementation at each length, and one decoding step."""
    platform = jax.default_backend()
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    log_decay_H = -jnp.exp2(-8 * jnp.arange(1, HEADS + 1) / HEADS)
    shape_BHTK = jax.ShapeDtypeStruct((1, HEADS, lengths[0], HEAD_DIM), dtype)
    impls = [impl for impl in LIGHTNING_IMPLS if not api.refusal(impl, shape_BHTK, shape_BHTK, None)]
    library = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
    attention = {("lightning", impl): lambda *qkv, impl=impl: lightning_attention(*qkv, log_decay_H, impl=impl)[0]
                 for impl in impls} | {("softmax", library): SOFTMAX[library]}
    rows = []
    for (op, impl), run in tqdm(attention.items(), "implementations", disable=None):
        passes = {"forward": lambda do, *x: run(*x), "forward and backward": functools.partial(_with_gradients, run)}
        for case, function in passes.items():
            ms = before = 0.0
            for T in lengths:
                if ms * (T / before if before else 1) ** (2 if op == "softmax" else 1) > LIMIT * 1e3:
                    break
                x_BHTK = jnp.asarray(np.random.default_rng(T).standard_normal((1, HEADS, T, HEAD_DIM), np.float32), dtype)
                ms, before = median_ms(jax.jit(function), *[x_BHTK] * 4), T
                rows.append(_time_row(f"{op} {case}", impl, T, T, ms, 4 * x_BHTK.nbytes if case == "forward" else None))
    for impl in [impl for impl in impls if impl in decode.IMPLS]:
        step, shapes = decode_step(impl)
        q, k, v, gate, norm, _, state, live = (jnp.ones(s.shape, dtype if s.dtype == jnp.bfloat16 else s.dtype) for s in shapes)
        # As in generation, each step takes the state of the step before, donated, and updates it in place.
        jitted = jax.jit(lambda state, *x: step(*x, log_decay_H, state, live)[1], donate_argnums=0)
        ms = median_ms(jitted, state, q, k, v, gate, norm, carried=True)
        rows.append(_time_row("decode", impl, 1, SEQUENCES, ms, 2 * state.nbytes))
    return rows


def _with_gradients(run, do, *x):
    """The gradients and the output, so that the compiler cannot leave out the forward pass."""
    o, pull = jax.vjp(run, *x)
    return o, pull(do)


def _time_row(case, impl, length, tokens, ms, moved):
    return {"case": case, "impl": impl, "length": length, "ms": round(ms, 3), "tokens/s": round(tokens / ms * 1e3),
            "GB/s of required bytes": round(moved / ms / 1e6, 1) if moved else None}


def median_ms(function, *args, carried=False):
    """Median time of a call in milliseconds. Makes RUNS calls, or more (at most 100) until they take half a second together.

    carried: pass the result on as the first argument of the next call.
    """
    times = []
    while len(times) < 2 + RUNS or (sum(times[2:]) < 0.1 * RUNS and len(times) < 100):
        begin = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
        args = (result, *args[1:]) if carried else args
    return statistics.median(times[2:]) * 1e3


def _plot(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axes, case in zip(panels, ("forward", "forward and backward")):
        for name in dict.fromkeys((row["case"].split(" ")[0], row["impl"]) for row in rows if row["case"].endswith(f" {case}")):
            points = [row for row in rows if (row["case"], row["impl"]) == (f"{name[0]} {case}", name[1])]
            axes.loglog([row["length"] for row in points], [row["ms"] for row in points], "o-", label=" ".join(name))
        axes.set(title=f"{case}, {HEADS} heads of dimension {HEAD_DIM}", xlabel="sequence length (tokens)",
                 ylabel="median time (ms)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _show(rows, title, note=None):
    """Prints rows as a table."""
    if rows:
        table = Table(*rows[0], title=title, caption=note)
        for row in rows:
            table.add_row(*("" if x is None else f"{x:,}" if isinstance(x, int) and not isinstance(x, bool) else str(x)
                            for x in row.values()))
        Console(width=None if sys.stdout.isatty() else 200).print(table)       # do not fold columns in a file
