"""Compiles one run of an experiment (a training step, a prefill chunk or a decode step) for a pod, and reports on the program.

The compiler is the real one, but nothing runs and no TPU or GPU is needed. Memory is the compiler's plan for one chip.
Exchanges, FLOPs and cycles are counted in the compiled program (`compilers.hlo`); docs/scale.md explains how.

Seconds are static estimates, never measured. The compiler estimates the cycles of each fusion; its estimates are too high
where memory bandwidth is the limit. It has no estimate for kernels, so these are assumed to run at the chip's peak FLOP/s.
"""
import collections
import dataclasses
import functools
import os
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from mmx import config
from mmx import mesh as meshes
from mmx.analysis.counts import flops_forward, flops_training
from mmx.chips import CHIPS, TPUS
from mmx.compilers import hlo, ptx, schedule
from mmx.config import ConfigError, Experiment
from mmx.data.images import padded_tiles
from mmx.inference import engine
from mmx.model import Model, abstract_params, empty_cache
from mmx.parallel import sharding
from mmx.training import optim
from mmx.training.step import abstract_state, jit_train_step

SUPPORTED_CHIPS = *TPUS, "h100"
OPTIONS = {"tpu": {f"xla_tpu_enable_async_{kind}": "true" for kind in ("all_to_all", "ragged_all_to_all")},
           "cuda": {"xla_gpu_autotune_level": 0}}
ENVIRONMENT = {     # libtpu neither looks for a TPU nor locks one, and logs errors only
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}     # of bytes, in the compilers' error messages


class Pod(NamedTuple):
    """A pod to compile for. Its devices are descriptions: the hardware is not attached."""
    topology: str           # CHIP:SHAPE of one slice, for example v5p:8x8x8
    slices: int             # number of such slices
    chip: str               # a name in mmx.chips.CHIPS
    shape: list[int]        # of one slice: [8, 8, 8]
    devices: list           # slice by slice

    def report(self, mode: str) -> dict:
        """Returns the entries that the reports of `aot.run` and `search.run` have in common."""
        return {"topology": self.topology, "slices": self.slices, "devices": len(self.devices), "mode": mode,
                "memory": CHIPS[self.chip].memory}


def run(e: Experiment, topology: str, mesh: str | None = None, mode: str = "train", slices: int = 1) -> dict:
    """Compiles one run of the experiment for a pod and returns the report that `show` prints.

    Args:
      topology: CHIP:SHAPE of one slice, for example v5p:8x8x8 or h100:64x8.
      mesh: as for the flag --mesh; None: the experiment's mesh.
      mode: train (one training step), prefill (the last chunk of train.batch prompts of train.length tokens) or decode (one
        token after each of these prompts).
      slices: number of such slices.

    Raises:
      ConfigError: the compiler does not support the topology, or the mesh does not fit the pod or the experiment.
    """
    e = e if mesh is None else dataclasses.replace(e, mesh=meshes.parse(mesh))
    pod = describe_pod(topology, slices)
    mesh = meshes.for_topology(e, pod.devices)
    tokens = tokens_per_row(e, mode)
    report = pod.report(mode) | {"mesh": dict(mesh.shape), "tokens": e.train.batch * tokens}
    if mode == "prefill":
        report |= {"chunk": tokens, "chunks": e.train.length // tokens}
    start = time.monotonic()
    try:
        compiled = _compile(e, mesh, mode, "cuda" if pod.chip == "h100" else "tpu")
    except jax.errors.JaxRuntimeError as error:
        needed, available = _parse_out_of_memory(str(error))
        return report | {"fits": False, "peak": needed, "memory": available, "seconds": time.monotonic() - start}
    report |= _report_memory(compiled.memory_analysis(), report["memory"])
    program = hlo.analyse(compiled.as_text(), dict(mesh.shape))
    return report | {"seconds": time.monotonic() - start, **_report_program(e, program, pod, mode)}


def flops_per_token(e: Experiment, topology: str) -> float:
    """Returns the matrix FLOPs per token of a compiled training step, summed over all chips, with recomputation and padding."""
    report = run(e, topology)
    if "flops" not in report:
        raise ConfigError(f"{topology} is too small: a training step needs {report['peak'] / 1e9:.0f} GB a chip. "
                          "Give a larger topology")
    if report["unknown"]:
        raise ConfigError(f"the FLOPs of {', '.join(report['unknown'])} are not known on {topology}. Give a TPU topology")
    return report["flops"] * report["devices"] / report["tokens"]


def show(report: dict):
    """Prints the report of `run` as tables."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    table = Table("", "", title=f"{title(report)}: {mesh}", show_header=False)
    unused = gigabytes(report["memory"] - report["peak"])
    verdict = f"fits, {unused} unused" if report["fits"] else f"does not fit: needs {gigabytes(report['peak'])}"
    table.add_row("memory of a chip", f"{verdict} of {gigabytes(report['memory'])}")
    if "chunks" in report:
        table.add_row("prefill", f"the last of {report['chunks']:,} chunks of {report['chunk']:,} tokens per row")
    if "exchanges" in report:
        parts = "arguments", "temporaries", "peak"
        table.add_row(", ".join(parts), ", ".join(gigabytes(report[part]) for part in parts))
        without = "".join(f"; without {runs:,} runs of {kernel}" for kernel, runs in report["unknown"].items())
        ratio = report["flops"] / report["flops_model"]
        table.add_row("matrix FLOPs of a chip", f"{report['flops']:.4g}, {ratio:.3f} times the model's{without}")
        table.add_row("time of the model's FLOPs at peak", f"{report['ideal_s']:.4g} s")
    if "static_s" in report:
        table.add_row("static estimate, not measured", f"{report['static_s']:.4g} s: fusions with matrix products "
                      f"{report['matrix_s']:.4g}, others {report['other_s']:.4g}, kernels at peak {report['kernels_s']:.4g}; "
                      f"MFU at most {report['ideal_s'] / report['static_s']:.1%}")
    table.add_row("compilation", f"{report['seconds']:.0f} s")
    console = Console()
    console.print(table)
    if not report.get("exchanges"):
        return
    table = Table("exchange", "mesh axes", "runs", "received", "overlapped with compute", title="exchanges of one device")
    for row in report["exchanges"]:
        table.add_row(row["kind"], row["axes"], f"{row['runs']:,}", gigabytes(row["bytes"]),
                      f"{row['overlapped'] / row['bytes']:.0%}")
    table.add_row("all", "", "", gigabytes(received_bytes(report)), "")
    console.print(table)


def title(report: dict) -> str:
    return f"{report['mode']} on {report['slices']} x {report['topology']}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def received_bytes(report: dict) -> int:
    """Returns the bytes that a device receives in all exchanges of a run."""
    return sum(row["bytes"] for row in report["exchanges"])


def describe_pod(topology: str, slices: int) -> Pod:
    """Returns the pod of CHIP:SHAPE, for example v5p:8x8x8 or h100:64x8 (64 hosts of 8), with `slices` slices.

    Raises:
      ConfigError: the compiler does not support the topology or is not installed.
    """
    from jax.experimental.topologies import get_topology_desc
    chip, _, shape = topology.partition(":")
    if chip not in SUPPORTED_CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ConfigError(f"--topology {topology!r} is not of the form CHIP:SHAPE, for example v5p:8x8x8 or h100:64x8. "
                          f"Chips are {', '.join(SUPPORTED_CHIPS)}")
    if slices < 1:
        raise ConfigError(f"--slices {slices} must be at least 1")
    if reason := (ptx if chip == "h100" else schedule).missing():
        raise ConfigError(f"--topology {topology}: {reason}")
    os.environ |= ENVIRONMENT | os.environ
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)        # it cannot read programs for devices that are not attached
    try:
        if chip == "h100":
            description = get_topology_desc(platform="cuda", topology_name=chip, target_config=ptx.target(chip),
                                            topology=f"{slices}x{shape}")
        else:
            description = get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices)
        return Pod(topology, slices, chip, [int(extent) for extent in shape.split("x")], description.devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(f"--topology {topology}: the compiler does not support this topology: "
                          f"{str(error).splitlines()[0]}") from None


def model_config(e: Experiment, mode: str) -> config.Model:
    """Returns the model's configuration for a mode: prefill and decode drop no tokens and exchange them in one group."""
    return e.model if mode == "train" else dataclasses.replace(e.model, capacity=0.0, transport=0.0, token_groups=1)


def tokens_per_row(e: Experiment, mode: str) -> int:
    """Returns how many tokens of each row one run processes."""
    if mode != "prefill":
        return {"train": e.train.length, "decode": 1}[mode]
    chunk = min(engine.PREFILL_CHUNKS[0], e.train.length)
    if e.train.length % chunk:
        raise ConfigError(f"--mode prefill needs train.length to be a multiple of the chunk of {chunk} tokens, "
                          f"got train.length={e.train.length}")
    return chunk


def context_length(e: Experiment, mode: str) -> int:
    """Returns the length of a sequence whose mean FLOPs per token equal the mean of the tokens that one run processes.

    A run processes the last T tokens of a row of length n, which attend to n - T / 2 keys on average. The tokens of a causal
    sequence of m tokens attend to m / 2 keys on average, so m = 2 n - T.
    """
    return 2 * e.train.length - tokens_per_row(e, mode)


def _compile(e, mesh, mode, platform):
    arguments_of = {"train": _train_step, "prefill": _prefill_chunk, "decode": _decode_step}[mode]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function, arguments = arguments_of(e, mesh)
        lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
        return lowered.compile(compiler_options=OPTIONS[platform])


def _train_step(e, mesh):
    """Returns the jitted training step and the shapes and shardings of its arguments."""
    t, v, model, optimizer = e.train, e.model.vision, Model(e.model), optim.adamw(e.train)
    rows = sharding.batch_sharding(mesh, leading=1)
    state = abstract_state(model, optimizer, t, mesh)
    batch = {name: _array((1, t.batch, t.length), dtype, rows) for name, dtype in (
        ("tokens", jnp.int32), ("targets", jnp.int32), ("segments", jnp.int32), ("positions", jnp.int32),
        ("weights", jnp.float32))}
    if v.layers:
        blocks, tiles = sharding.tile_sharding(mesh, leading=1), (1, *_tiles(e, mesh))
        batch |= {"patch_code": batch["tokens"], "pixels": _array((*tiles, v.tile, v.tile, 3), jnp.float32, blocks),
                  "caption_ends": _array(tiles, jnp.int32, blocks)}
    step = jit_train_step(model, optimizer, t, state)
    return step, (*state, batch, _array((), jnp.float32, sharding.replicated(mesh)))


def _tiles(e, mesh) -> tuple[int, int]:
    """Returns the number of blocks of rows, and the tiles of a block whose tokens are all from images."""
    blocks, devices = (sharding.size(mesh, axes) for axes in (sharding.ROWS, sharding.TIME))
    tiles = e.train.batch // blocks * e.train.length // e.model.vision.patches_per_side ** 2
    return blocks, devices * padded_tiles(-(-tiles // devices))


def _prefill_chunk(e, mesh):
    """Returns the jitted prefill of one chunk, and its arguments: a cache for whole prompts. All chunks use this program."""
    model, params, cache, shardings = _inference(e, mesh, "prefill")
    tokens_BT = _array((e.train.batch, tokens_per_row(e, "prefill")), jnp.int32, sharding.batch_sharding(mesh))
    step = jax.jit(functools.partial(engine.prefill, model), donate_argnums=3, out_shardings=shardings)
    return step, (params, tokens_BT, tokens_BT, cache)


def _decode_step(e, mesh):
    """Returns the jitted decoding of one token per row, and its arguments: a cache of train.length tokens."""
    model, params, cache, shardings = _inference(e, mesh, "decode")
    token_B = _array((e.train.batch,), jnp.int32, sharding.replicated(mesh))
    step = jax.jit(functools.partial(engine.decode_step, model), donate_argnums=2, out_shardings=(None, shardings))
    return step, (params, token_B, cache)


def _inference(e, mesh, mode):
    """Returns the model, its parameters in the dtype it computes in, a cache of train.length tokens, and its shardings."""
    c = model_config(e, mode)
    params, cache = abstract_params(c), jax.eval_shape(lambda: empty_cache(c, e.train.batch, e.train.length))
    params = jax.tree.map(lambda x, s: _array(x.shape, c.dtype, s), params, sharding.param_shardings(params, mesh))
    shardings = sharding.cache_shardings(cache, mesh)
    return Model(c), params, jax.tree.map(lambda x, s: _array(x.shape, x.dtype, s), cache, shardings), shardings


def _report_memory(stats, available) -> dict:
    peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {"fits": peak <= available, "peak": peak, "arguments": stats.argument_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes}


def _report_program(e, program, pod, mode) -> dict:
    chip, context = CHIPS[pod.chip], context_length(e, mode)
    per_token = flops_training(e.model, context) if mode == "train" else flops_forward(e.model, context)
    model = per_token * (e.train.batch * tokens_per_row(e, mode)) / len(pod.devices)
    report = {"flops": program.flops, "flops_model": model, "ideal_s": model / chip.peak, "unknown": program.unknown,
              "exchanges": _report_exchanges(program.collectives)}
    if program.cycles_other:        # programs for TPUs
        parts = [cycles / chip.tpu.clock for cycles in (program.cycles_matrix, program.cycles_other)]
        parts.append(program.flops_kernels / chip.peak)
        report |= dict(zip(("matrix_s", "other_s", "kernels_s"), parts)) | {"static_s": sum(parts)}
    return report


def _report_exchanges(collectives) -> list[dict]:
    """Returns a row for each kind of exchange and its mesh axes: runs, and bytes received, in total and overlapped."""
    rows = collections.defaultdict(lambda: {"runs": 0, "bytes": 0, "overlapped": 0})
    for c in collectives:
        row = rows[c.kind, c.axes]
        row["runs"] += c.times
        row["bytes"] += c.times * c.bytes
        row["overlapped"] += c.times * c.bytes * c.overlapped
    return [{"kind": kind, "axes": axes} | row for (kind, axes), row in
            sorted(rows.items(), key=lambda item: -item[1]["bytes"]) if row["bytes"]]


def _parse_out_of_memory(message) -> tuple[float, float]:
    """Returns the bytes that the program needs and those available. Raises RuntimeError if the message has another subject."""
    size = r"([\d.]+)([KMGT]?)"
    sizes = re.search(rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM \({size}\)", message)
    if not sizes:
        raise RuntimeError(message)
    needed, needed_unit, available, available_unit = filter(lambda part: part is not None, sizes.groups())
    return float(needed) * UNITS[needed_unit], float(available) * UNITS[available_unit]


def _array(shape, dtype, sharding):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
