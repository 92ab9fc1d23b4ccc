"""`mmx bench kernels`: the kernels beside plain XLA and softmax attention, compiled for chips that are not here, or timed.

Compiled, by the real compilers: for TPUs a static schedule estimate and the time in which HBM moves what has to be moved;
for GPUs the resources of the compiled kernels. Nothing is run then, so none of it is a measured time. Timed, on the device
that is here: medians of several runs, over lengths. One sequence (decode: 64), 64 heads of 128, bfloat16 (timed on a CPU:
float32); the layer around them is MiniMax-Text-01's, 6,144 wide.
"""
import functools
import importlib
import importlib.util
import json
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
from mmx.kernels.attention import softmax_attention
from mmx.kernels.lightning import api, decode, lightning_attention
from mmx.layers.common import Context
from mmx.layers.lightning import Lightning
from mmx.parallel.projection import heads, join

H, D, DIM, ROWS, EPS = 64, 128, 6144, 64, 1e-6
STATES = 2 * ROWS * H * D * D * 4       # bytes of decode's states, read and written once


class Case(NamedTuple):
    function: str           # below, with (impl, tokens, documents)
    tokens: int
    documents: int
    bytes: int              # that have to move
    tpu: tuple[str, ...] = ("tpu", "xla")
    gpu: tuple[str, ...] = ("gpu", "triton", "xla")


def _tokens_bytes(T, arrays):
    return arrays * T * H * D * 2


CASES = {
    "forward 8,192": Case("forward", 8_192, 0, _tokens_bytes(8_192, 4)),
    "forward 32,768": Case("forward", 32_768, 0, _tokens_bytes(32_768, 4)),
    "forward 8,192, documents": Case("forward", 8_192, 1, _tokens_bytes(8_192, 4)),
    "forward and backward 8,192": Case("both", 8_192, 0, _tokens_bytes(8_192, 11)),
    "decode, 64 sequences": Case("decode_step", 1, 0, STATES, gpu=("gpu", "xla")),
    "softmax 8,192": Case("softmax", 8_192, 0, _tokens_bytes(8_192, 4), ("splash",), ("flash", "xla")),
    "layer 8,192": Case("layer", 8_192, 0, 0, ("fused", "apart"), ()),
}
COMPILED = TPUS + GPUS
TPU_COLUMNS = ("chip", "case", "impl", "static us", "HBM floor us", "static / floor", "MXU busy", "VMEM MiB", "spills",
               "HBM temporaries MiB", "GB moved", "moved / floor")
GPU_COLUMNS = ("chip", "case", "impl", "kernel", "registers", "spills", "shared B", "CTAs", "tensor-core instructions", "tf32",
               "GB moved", "moved / floor", "faults")
GPU = threading.Lock()      # jax-triton keeps what it has compiled, and where it writes, for the whole process
LENGTHS = "1024,2048,4096,8192,16384,32768,65536,131072"
LIMIT = 20.0            # seconds: an implementation that would take longer at the next length is not asked
RUNS = 5                # at least, behind two to compile and warm up


def forward(impl, T, documents):
    """A forward pass, and the shapes of its arguments."""
    kernel = importlib.import_module(f"mmx.kernels.lightning.{impl}")

    def run(q, k, v, log_decay_H, segments_BT, state):
        return kernel.forward(q, k, v, log_decay_H, segments_BT, state, None)
    return run, _shapes(int(T), int(documents))


def both(impl, T, documents):
    """A forward and a backward pass."""
    kernel = importlib.import_module(f"mmx.kernels.lightning.{impl}")

    def run(q, k, v, log_decay_H, segments_BT, state, do, dstate):
        shared = q, k, v, log_decay_H, segments_BT, state
        return kernel.forward(*shared, None), kernel.backward(*shared, do, dstate, None)
    shapes = _shapes(int(T), int(documents))
    return run, (*shapes, shapes[2], shapes[5])


def decode_step(impl, T=1, documents=0):
    """One token of every sequence, all live."""
    array = jax.ShapeDtypeStruct
    x, f32 = array((ROWS, H, D), jnp.bfloat16), jnp.float32
    return (jax.jit(functools.partial(decode.decode, eps=EPS, impl=impl), donate_argnums=6),
            (x, x, x, x, array((H, D), x.dtype), array((H,), f32), array((ROWS, H, D, D), f32), array((ROWS,), bool)))


def softmax(impl, T, documents=0):
    """A forward pass of softmax attention: splash, XLA in blocks, flash (Pallas-Triton), or cuDNN's."""
    return SOFTMAX[impl], _shapes(int(T), 0)[:3]


def _cudnn(q, k, v):
    by_time = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    return jnp.moveaxis(jax.nn.dot_product_attention(*by_time, is_causal=True, implementation="cudnn"), 1, 2)


SOFTMAX = {"splash": functools.partial(softmax_attention, impl="tpu"),
           "xla": functools.partial(softmax_attention, impl="xla"), "flash": functools.partial(softmax_attention, impl="gpu"),
           "cudnn": _cudnn}


def layer(form, T, documents=0):
    """A whole layer with its projections; "apart" makes SiLU, and norm and gate, passes of their own."""
    array = jax.ShapeDtypeStruct
    mixer = Lightning(config.Model(dim=DIM, heads=H, head_dim=D, pattern="L", layers=1, dtype="bfloat16"))
    context = Context(None, None, None)
    u_BTD, log_decay_H = array((1, int(T), DIM), jnp.bfloat16), array((H,), jnp.float32)
    params = jax.eval_shape(mixer.init, jax.random.key(0), u_BTD, context, None, log_decay_H)["params"]
    params = jax.tree.map(lambda x: array(x.shape, jnp.bfloat16), params)
    apart = jax.lax.optimization_barrier

    def passes(p, u_BTD, log_decay_H):
        q, k, v, gate = map(apart, heads(u_BTD, **{name: p[name] for name in ("q_DHK", "k_DHK", "v_DHV", "gate_DHV")}))
        o_BHTV, _ = lightning_attention(*(apart(decode.silu(x).astype(x.dtype)) for x in (q, k, v)), log_decay_H)
        y_BHTV = decode.norm_and_gate(apart(o_BHTV), gate, p["norm_HV"][:, None], EPS, (1, 3), H * D)
        return join(apart(y_BHTV), p["out_HVD"])

    def fused(p, u_BTD, log_decay_H):
        return mixer.apply({"params": p}, u_BTD, context, None, log_decay_H)[0]
    return {"apart": passes, "fused": fused}[form], (params, u_BTD, log_decay_H)


def _shapes(T, documents):
    array = jax.ShapeDtypeStruct
    x, state = array((1, H, T, D), jnp.bfloat16), array((1, H, D, D), jnp.float32)
    return x, x, x, array((H,), jnp.float32), array((1, T), jnp.int32) if documents else None, state


def kernels(chips, as_json: bool, live: bool = False, lengths: str | None = None, out: str | None = None) -> int:
    """Compiles for `chips` (None: those whose compiler is here), or times on the device here; prints tables, or JSON.

    Times where there is an accelerator and no chip is named, or where `live` says so, over `lengths` (None: LENGTHS);
    kernels.png goes to the folder `out` (None: here). Returns the exit status: 1 where a GPU kernel has a fault, else 0.
    """
    if live and chips:
        raise ConfigError("--chip compiles for chips that are not here, --live times the device that is: give one of them")
    if live or (chips is None and jax.default_backend() != "cpu"):
        _timed(config.lengths(LENGTHS if lengths is None else lengths), Path(out or "."), as_json)
        return 0
    for flag, given in (("--lengths", lengths), ("--out", out)):
        if given is not None:
            raise ConfigError(f"{flag} {given}: it is for times, and nothing is timed here; add --live")
    reasons = {chip: (ptx if chip in GPUS else schedule).missing() for chip in COMPILED}
    chips = chips or [chip for chip in COMPILED if not reasons[chip]] or COMPILED
    for chip in chips:
        if chip not in COMPILED:
            raise ConfigError(f"--chip {chip}: known are {', '.join(COMPILED)}")
        if reasons[chip]:
            raise ConfigError(f"--chip {chip}: {reasons[chip]}")
    forms = [(chip, name, impl) for chip in chips for name, case in CASES.items()
             for impl in (case.gpu if chip in GPUS else case.tpu)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:        # a TPU form is compiled in a process of its own
        found = pool.map(lambda form: (_gpu if form[0] in GPUS else _tpu)(*form), forms)
        rows = [row for some in tqdm(found, "compiling", len(forms), disable=None) for row in some]
    faults = [f"{row['chip']}, {row['case']}: {fault}" for row in rows for fault in row.get("faults", ())]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        _tables(rows)
    for fault in faults:
        print(f"mmx: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _tables(rows):
    _show([row for row in rows if row["chip"] not in GPUS], "static schedule estimate by the TPU compiler")
    for fused, apart in zip(*([row for row in rows if row.get("impl") == form] for form in ("fused", "apart"))):
        print(f"{fused['chip']}, {fused['case']}: with SiLU, norm and gate apart {apart['GB moved']} GB, fused in "
              f"{fused['GB moved']} GB, saved {apart['GB moved'] - fused['GB moved']:.2f} GB")
    gpus = [{name: x for name, x in row.items() if name != "faults"} for row in rows if row["chip"] in GPUS]
    _show(gpus, "compiled resources of the GPU kernels",
          "GB moved: each operation's operands and results once, of what it slices the slice. XLA's form is told as a whole: "
          "the registers of its many fusions, and of products left to a library, compare with nothing.")


def _tpu(chip, name, impl):
    case = CASES[name]
    what = f"mmx.compilers.bench:{case.function}:{impl}:{case.tokens}:{case.documents}"
    row = dict.fromkeys(TPU_COLUMNS) | {"chip": chip, "case": name, "impl": impl}
    if case.function == "layer":        # its large products' cycles come out below the matrix units' own limit: not told
        temporaries, moved = schedule.memory(what, chip)
        return [row | {"HBM temporaries MiB": temporaries >> 20, "GB moved": round(moved / 1e9, 2)}]
    floor = case.bytes / CHIPS[chip].bandwidth * 1e6
    cost = schedule.cost(what, chip)
    # What XLA's loops move is counted once a loop, so it is told of programs without one.
    straight = impl == "tpu" or case.function == "decode_step"
    return [row | {"static us": round(cost.us), "HBM floor us": round(floor), "static / floor": round(cost.us / floor, 2),
                   "MXU busy": f"{cost.mxu:.0%}", "VMEM MiB": round(cost.vmem / 2 ** 20, 1), "spills": cost.spills,
                   "HBM temporaries MiB": cost.temporaries >> 20, "GB moved": round(cost.bytes / 1e9, 2) if straight else None,
                   "moved / floor": round(cost.bytes / case.bytes, 2) if straight else None}]


def _gpu(chip, name, impl):
    """Rows of the kernels with tensor cores or a state, and one of all that runs."""
    if impl == "triton" and not importlib.util.find_spec("jax_triton"):
        return []
    target, case = CHIPS[chip].gpu.description, CASES[name]
    with GPU:
        compiled, (moved, launches) = _compiled(target, name, impl)
    rows = []
    for short, cost in sorted((kernel.partition(" ")[0], cost) for kernel, cost in compiled.items() if impl != "xla"):
        if cost.tensor or any(part in short for part in ("carry", "decode")):
            rows.append({"kernel": short, "registers": cost.registers, "spills": cost.spills, "shared B": cost.shared,
                         "CTAs": cost.ctas, "tensor-core instructions": cost.tensor, "tf32": cost.tf32,
                         "faults": ptx.faults({short: cost}, target)})
    # Softmax reads keys and values once a block of queries: how much of that the L2 cache saves, HLO does not say.
    known = case.function != "softmax"
    rows.append({"kernel": f"all, {launches} launches", "GB moved": round(moved / 1e9, 2) if known else None,
                 "moved / floor": round(moved / case.bytes, 2) if known else None})
    return [dict.fromkeys(GPU_COLUMNS) | {"chip": chip, "case": name, "impl": impl, "faults": []} | row for row in rows]


@functools.cache
def _compiled(target, name, impl):
    case = CASES[name]
    run, shapes = globals()[case.function](impl, case.tokens, case.documents)
    kernels, text = (_triton_program if impl == "triton" else ptx.program)(run, *shapes, chip=target)
    return kernels, hlo.moved(text)


def _triton_program(run, *shapes, chip):
    """jax-triton compiles its kernels itself, and writes them where it is told to; their grids only its caller knows."""
    import jax_triton
    call, grids = jax_triton.triton_call, {}

    def recorded(*args, kernel, grid, **kwargs):
        grids[kernel.fn.__name__] = math.prod(grid)
        return call(*args, kernel=kernel, grid=grid, **kwargs)
    with (tempfile.TemporaryDirectory() as folder, mock.patch.object(jax_triton, "triton_call", recorded),
          mock.patch.multiple(      # what it has compiled before it writes no more
              jax_triton.triton_lib, _JAX_TRITON_DUMP_DIR=folder, _COMPILED_KERNEL_CACHE={})):
        kernels, text = ptx.program(run, *shapes, chip=chip)
        return kernels | {name: cost._replace(ctas=grids[name.partition(" ")[0]])
                          for name, cost in ptx.dumped(folder, chip).items()}, text


def _timed(lengths, out, as_json):
    out.mkdir(parents=True, exist_ok=True)
    rows = _times(lengths)
    plot = _plot(rows, out / "kernels.png")
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    _show(rows, f"measured on {jax.devices()[0].device_kind}, medians")
    print(f"plot: {plot}")


def _times(lengths):
    """Rows of milliseconds: the state's step at decode, and every implementation of attention over the lengths."""
    here = jax.default_backend()
    dtype = jnp.float32 if here == "cpu" else jnp.bfloat16
    log_decay_H = -jnp.exp2(-8 * jnp.arange(1, H + 1) / H)
    shape_BHTD = jax.ShapeDtypeStruct((1, H, lengths[0], D), dtype)
    impls = [impl for impl in api.NAMES if not api.refusal(impl, shape_BHTD, shape_BHTD, None)]
    library = {"tpu": "splash", "gpu": "cudnn"}.get(here, "xla")
    forms = {("lightning", impl): lambda *qkv, impl=impl: lightning_attention(*qkv, log_decay_H, impl=impl)[0]
             for impl in impls} | {("softmax", library): SOFTMAX[library]}
    rows = []
    for (op, impl), run in tqdm(forms.items(), "implementations", disable=None):
        passes = {"forward": lambda do, *x: run(*x), "forward and backward": functools.partial(_with_gradients, run)}
        for case, function in passes.items():
            ms = before = 0.0
            for T in lengths:
                if ms * (T / before if before else 1) ** (2 if op == "softmax" else 1) > LIMIT * 1e3:
                    break
                x_BHTD = jnp.asarray(np.random.default_rng(T).standard_normal((1, H, T, D), np.float32), dtype)
                ms, before = median_ms(jax.jit(function), *[x_BHTD] * 4), T
                rows.append(_time_row(f"{op} {case}", impl, T, T, ms, 4 * x_BHTD.nbytes if case == "forward" else None))
    for impl in [impl for impl in impls if impl in decode.IMPLS]:
        step, shapes = decode_step(impl)
        q, k, v, gate, norm, _, state, live = (jnp.ones(s.shape, dtype if s.dtype == jnp.bfloat16 else s.dtype) for s in shapes)
        # The state goes round, as in generation: donated, and updated where it is.
        jitted = jax.jit(lambda state, *x: step(*x, log_decay_H, state, live)[1], donate_argnums=0)
        ms = median_ms(jitted, state, q, k, v, gate, norm, carried=True)
        rows.append(_time_row("decode", impl, 1, ROWS, ms, 2 * state.nbytes))
    return rows


def _with_gradients(run, do, *x):
    """The output too, which compilers would leave out where nobody asks for it."""
    o, pull = jax.vjp(run, *x)
    return o, pull(do)


def _time_row(case, impl, length, tokens, ms, moved):
    return {"case": case, "impl": impl, "length": length, "ms": round(ms, 3), "tokens/s": round(tokens / ms * 1e3),
            "GB/s of what must move": round(moved / ms / 1e6, 1) if moved else None}


def median_ms(function, *args, carried=False):
    """Of RUNS runs or more, up to half a second; `carried` feeds the result back as the first argument."""
    times = []
    while len(times) < 2 + RUNS or (sum(times[2:]) < 0.1 * RUNS and len(times) < 100):
        begin = time.perf_counter()
        done = jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
        args = (done, *args[1:]) if carried else args
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
        axes.set(title=f"{case}, {H} heads of {D}", xlabel="tokens", ylabel="ms")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _show(rows, title, note=None):
    if rows:
        table = Table(*rows[0], title=title, caption=note)
        for row in rows:
            table.add_row(*("" if x is None else f"{x:,}" if isinstance(x, int) and not isinstance(x, bool) else str(x)
                            for x in row.values()))
        Console(width=None if sys.stdout.isatty() else 200).print(table)       # a file folds nothing
