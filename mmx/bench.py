"""`mmx bench kernels`: every kernel compiled for every chip here, by the real compilers, beside plain XLA.

For TPUs a static schedule estimate and the time in which HBM moves what has to be moved; for GPUs the resources of the
compiled kernels. Nothing is run, so nothing here is a measured time. One sequence, 64 heads of 128, bfloat16.
"""
import json

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mmx.compilers import ptx, schedule
from mmx.config import ConfigError
from mmx.kernels.lightning import api

H, D = 64, 128
CASES = {               # name: the function below, tokens, documents, arrays of [T, H, D] that have to move
    "forward 8,192": ("forward", 8_192, 0, 4),
    "forward 32,768": ("forward", 32_768, 0, 4),
    "forward 8,192, documents": ("forward", 8_192, 1, 4),
    "forward and backward 8,192": ("both", 8_192, 0, 11),
}
GPUS = {"h100": "h100", "h20": "h100", "a100": "a100"}       # H20 has H100's SMs, fewer of them
CHIPS = [*schedule.CHIPS, *GPUS]


def forward(impl, T, documents):
    """A forward pass, and the shapes of its arguments."""
    def run(q, k, v, log_decay_H, segments_BT, state):
        return api.IMPLS[impl].forward(q, k, v, log_decay_H, segments_BT, state, None)
    return run, _shapes(int(T), int(documents))


def both(impl, T, documents):
    """A forward and a backward pass."""
    def run(q, k, v, log_decay_H, segments_BT, state, do, dstate):
        shared = q, k, v, log_decay_H, segments_BT, state
        return api.IMPLS[impl].forward(*shared, None), api.IMPLS[impl].backward(*shared, do, dstate, None)
    shapes = _shapes(int(T), int(documents))
    return run, (*shapes, shapes[2], shapes[5])


def _shapes(T, documents):
    array = jax.ShapeDtypeStruct
    x, state = array((1, H, T, D), jnp.bfloat16), array((1, H, D, D), jnp.float32)
    return x, x, x, array((H,), jnp.float32), array((1, T), jnp.int32) if documents else None, state


def kernels(chips, as_json: bool):
    """Compiles for `chips` (None: those whose compiler is here) and prints tables, or JSON: a list of rows."""
    reasons = {chip: (ptx if chip in GPUS else schedule).missing() for chip in CHIPS}
    chips = chips or [chip for chip in CHIPS if not reasons[chip]] or CHIPS
    for chip in chips:
        if chip not in CHIPS:
            raise ConfigError(f"--chip {chip}: known are {', '.join(CHIPS)}")
        if reasons[chip]:
            raise ConfigError(f"--chip {chip}: {reasons[chip]}")
    work = [(chip, name) for chip in chips for name in CASES]
    rows = [row for chip, name in tqdm(work, "compiling", disable=None)
            for row in (_gpu if chip in GPUS else _tpu)(chip, name)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    _show([row for row in rows if row["chip"] not in GPUS], "static schedule estimate by the TPU compiler")
    _show([row for row in rows if row["chip"] in GPUS], "compiled resources of the GPU kernels")


def _tpu(chip, name):
    function, T, documents, arrays = CASES[name]
    floor = (arrays * T * H * D * 2) / schedule.CHIPS[chip].bandwidth * 1e6
    for impl in ("tpu", "xla"):
        cost = schedule.cost(f"mmx.bench:{function}:{impl}:{T}:{documents}", chip)
        yield {"chip": chip, "case": name, "impl": impl, "static us": round(cost.us), "HBM floor us": round(floor),
               "static / floor": round(cost.us / floor, 2), "MXU busy": f"{cost.mxu:.0%}",
               "VMEM MiB": round(cost.vmem / 2 ** 20, 1), "spills": cost.spills, "HBM temporaries MiB": cost.temporaries >> 20}


def _gpu(chip, name):
    function, T, documents, _ = CASES[name]
    run, shapes = globals()[function]("gpu", T, documents)
    compiled = ptx.resources(run, *shapes, chip=GPUS[chip])
    for kernel, cost in compiled.items():
        if cost.tensor or "carry" in kernel:
            yield {"chip": chip, "case": name, "kernel": kernel, "registers": cost.registers, "spills": cost.spills,
                   "shared B": cost.shared, "CTAs": cost.ctas, "tensor-core instructions": cost.tensor, "tf32": cost.tf32}


def _show(rows, title):
    if rows:
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(f"{x:,}" if isinstance(x, int) and not isinstance(x, bool) else str(x) for x in row.values()))
        Console().print(table)
