"""`mmx aot`: an experiment compiled for a pod that is not here, by the real compiler, and what it says of the program.

Memory is the compiler's, per chip. Exchanges, FLOPs and cycles are those of the compiled program, times the trips of the
loops they are in (`compilers.hlo`). Nothing is run: cycles are the compiler's own static estimates of its fusions, which
run high where memory is the limit, and kernels have none, so they count at the chip's peak; never a measured time.
"""
import collections
import dataclasses
import functools
import os
import re
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

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

PODS = *TPUS, "h100"       # chips whose compiler can be asked
OPTIONS = {"tpu": {f"xla_tpu_enable_async_{kind}": "true" for kind in ("all_to_all", "ragged_all_to_all")},
           "cuda": {"xla_gpu_autotune_level": 0}}
ENVIRONMENT = {     # no TPU is asked for and none locked, and libtpu says only what is wrong
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


def run(e: Experiment, topology: str, mesh: str | None = None, mode: str = "train", slices: int = 1) -> dict:
    """Compiles, and returns what `show` prints. Raises ConfigError for what no pod or mesh can be."""
    e = e if mesh is None else dataclasses.replace(e, mesh=meshes.parse(mesh))
    chip, devices = pod(topology, slices)
    mesh = meshes.for_topology(e, devices)
    memory, peak, *_ = CHIPS[chip]
    platform = "cuda" if chip == "h100" else "tpu"
    tokens = span(e, mode)
    found = {"topology": topology, "slices": slices, "devices": len(devices), "mesh": dict(mesh.shape), "mode": mode,
             "tokens": e.train.batch * tokens, "memory": memory}
    if mode == "prefill":
        found["chunk"], found["chunks"] = tokens, e.train.length // tokens
    begin = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function, args = {"train": _train, "prefill": _prefill, "decode": _decode}[mode](e, mesh)
        lowered = function.trace(*args).lower(lowering_platforms=(platform,))
        try:
            compiled = lowered.compile(compiler_options=OPTIONS[platform])
        except jax.errors.JaxRuntimeError as error:
            needed, limit = _refused(str(error))
            return found | {"fits": False, "peak": needed, "memory": limit, "seconds": time.monotonic() - begin}
    stats, program = compiled.memory_analysis(), hlo.analyse(compiled.as_text(), dict(mesh.shape))
    used = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    model = _model_flops(e, mode, tokens) * found["tokens"] / len(devices)
    found |= {"fits": used <= memory, "peak": used, "arguments": stats.argument_size_in_bytes,
              "temporaries": stats.temp_size_in_bytes, "seconds": time.monotonic() - begin,
              "flops": program.flops, "flops_model": model, "ideal_s": model / peak, "unknown": program.unknown,
              "exchanges": _exchanges(program.collectives)}
    if program.cycles_other:        # of TPUs
        parts = [cycles / CHIPS[chip].tpu.clock for cycles in (program.cycles_matrix, program.cycles_other)]
        parts.append(program.flops_kernels / peak)
        found |= dict(zip(("matrix_s", "other_s", "kernels_s"), parts)) | {"static_s": sum(parts)}
    return found


def flops_per_token(e: Experiment, topology: str) -> float:
    """Matrix FLOPs a token of a training step as compiled, of all chips together, recomputation and padding included."""
    found = run(e, topology)
    if "flops" not in found:
        raise ConfigError(f"{topology} is too small: the step needs {found['peak'] / 1e9:.0f} GB a chip; give a larger one")
    if found["unknown"]:
        raise ConfigError(f"{topology}: what {', '.join(found['unknown'])} computes its compiler does not say; a TPU's does")
    return found["flops"] * found["devices"] / found["tokens"]


def show(found: dict):
    """Prints a table."""
    gb = lambda size: f"{size / 1e9:.2f} GB"
    spare = found["memory"] - found["peak"]
    mesh = ", ".join(f"{axis} {n}" for axis, n in found["mesh"].items())
    table = Table("", "", title=f"{found['mode']} on {found['slices']} x {found['topology']}: {mesh}", show_header=False)
    verdict = f"fits, {gb(spare)} to spare" if found["fits"] else f"does not fit: needs {gb(found['peak'])}"
    table.add_row("a chip's memory", f"{verdict} of {gb(found['memory'])}")
    if "chunks" in found:
        table.add_row("a run", f"{found['chunk']:,} tokens a row, the last of {found['chunks']:,} such chunks")
    if "exchanges" in found:
        parts = "arguments", "temporaries", "peak"
        table.add_row(", ".join(parts), ", ".join(gb(found[part]) for part in parts))
        times = found["flops"] / found["flops_model"]
        table.add_row("matrix FLOPs a chip", f"{found['flops']:.4g}, {times:.3f} times the model's"
                      + "".join(f"; without {n:,} runs of {name}" for name, n in found["unknown"].items()))
        table.add_row("the model's FLOPs at peak", f"{found['ideal_s']:.4g} s")
    if "static_s" in found:
        table.add_row("static estimate, no measured time", f"{found['static_s']:.4g} s: fusions with matrix products "
                      f"{found['matrix_s']:.4g}, others {found['other_s']:.4g}, kernels at peak {found['kernels_s']:.4g}; "
                      f"at most {found['ideal_s'] / found['static_s']:.1%} of peak")
    table.add_row("compiled in", f"{found['seconds']:.0f} s")
    console = Console()
    console.print(table)
    if not found.get("exchanges"):
        return
    table = Table("exchange", "over", "runs", "received a device", "under compute", title="a run on one device")
    for row in found["exchanges"]:
        table.add_row(row["kind"], row["axes"], f"{row['runs']:,}", gb(row["bytes"]), f"{row['under'] / row['bytes']:.0%}")
    table.add_row("all", "", "", gb(sum(row["bytes"] for row in found["exchanges"])), "")
    console.print(table)


def pod(topology, slices):
    """The chip's name and the devices of v5p:8x8x8 or h100:64x8, slice by slice."""
    from jax.experimental.topologies import get_topology_desc
    chip, _, shape = topology.partition(":")
    if chip not in PODS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ConfigError(f"--topology {topology!r} is no CHIP:SHAPE such as v5p:8x8x8 or h100:64x8; chips: {', '.join(PODS)}")
    if slices < 1:
        raise ConfigError(f"--slices {slices} is no number of slices: it must be at least 1")
    if reason := (ptx if chip == "h100" else schedule).missing():
        raise ConfigError(f"--topology {topology}: {reason}")
    os.environ |= ENVIRONMENT | os.environ
    jax.config.update("jax_platforms", "cpu")
    try:
        if chip == "h100":
            return chip, get_topology_desc(platform="cuda", topology_name=chip, target_config=ptx.target(chip),
                                           topology=f"{slices}x{shape}").devices
        return chip, get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(f"--topology {topology}: the compiler knows no such pod: {str(error).splitlines()[0]}") from None


def _train(e, mesh):
    t, v, model, optimizer = e.train, e.model.vision, Model(e.model), optim.adamw(e.train)
    rows = sharding.batch_sharding(mesh, leading=1)
    state = abstract_state(model, optimizer, t, mesh)
    batch = {name: _array((1, t.batch, t.length), kind, rows) for name, kind in (
        ("tokens", jnp.int32), ("targets", jnp.int32), ("segments", jnp.int32), ("positions", jnp.int32),
        ("weights", jnp.float32))}
    if v.layers:
        blocks, tiles = sharding.tile_sharding(mesh, leading=1), (1, *_tiles(e, mesh))
        batch |= {"places": batch["tokens"], "pixels": _array((*tiles, v.tile, v.tile, 3), jnp.float32, blocks),
                  "ends": _array(tiles, jnp.int32, blocks)}
    step = jit_train_step(model, optimizer, t, state)
    return step, (*state, batch, _array((), jnp.float32, sharding.replicated(mesh)))


def _tiles(e, mesh) -> tuple[int, int]:
    """Blocks of rows, and a block's tiles where the images' patches fill its rows."""
    blocks, share = (sharding.size(mesh, axes) for axes in (sharding.ROWS, sharding.TIME))
    tiles = e.train.batch // blocks * e.train.length // e.model.vision.side ** 2
    return blocks, share * padded_tiles(-(-tiles // share))


def _prefill(e, mesh):
    """A chunk of the prompts against the cache of all of them, as `inference.generate` reads them: each is the same program."""
    model, params, cache = _inference(e, mesh)
    tokens_BT = _array((e.train.batch, span(e, "prefill")), jnp.int32, sharding.batch_sharding(mesh))
    kept = jax.tree.map(lambda x: x.sharding, cache)
    step = jax.jit(functools.partial(engine.prefill, model), donate_argnums=3, out_shardings=kept)
    return step, (params, tokens_BT, tokens_BT, cache)


def _decode(e, mesh):
    """One token a row, the likeliest, behind train.length - 1."""
    model, params, cache = _inference(e, mesh)
    kept = jax.tree.map(lambda x: x.sharding, cache)
    token_B = _array((e.train.batch,), jnp.int32, sharding.replicated(mesh))
    step = jax.jit(functools.partial(engine.decode_step, model), donate_argnums=2, out_shardings=(None, kept))
    return step, (params, token_B, cache)


def _inference(e, mesh):
    """A model that drops no token, its parameters in the computation's dtype, a cache for the whole length."""
    c = undropped(e)
    model = Model(c)
    params = abstract_params(c)
    params = jax.tree.map(lambda x, s: _array(x.shape, c.dtype, s), params, sharding.param_shardings(params, mesh))
    cache = jax.eval_shape(lambda: empty_cache(c, e.train.batch, e.train.length))
    return model, params, jax.tree.map(_placed, cache, sharding.cache_shardings(cache, mesh))


def undropped(e):
    """The model as inference runs it."""
    return dataclasses.replace(e.model, capacity=0.0, transport=0.0, token_groups=1)


def span(e, mode) -> int:
    """Tokens of a row that one run takes."""
    if mode != "prefill":
        return {"train": e.train.length, "decode": 1}[mode]
    chunk = min(engine.PREFILL_CHUNKS[0], e.train.length)
    if e.train.length % chunk:
        raise ConfigError(f"train.length={e.train.length} is not read in whole chunks: give a multiple of {chunk}")
    return chunk


def _model_flops(e, mode, tokens) -> float:
    """A token's; prefill's and decode's are the last of a row, which see more than the mean."""
    return flops_training(e.model, tokens) if mode == "train" else flops_forward(e.model, 2 * e.train.length - tokens)


def _exchanges(collectives):
    rows = collections.defaultdict(lambda: {"runs": 0, "bytes": 0, "under": 0})
    for c in collectives:
        row = rows[c.kind, c.axes]
        row["runs"] += c.times
        row["bytes"] += c.times * c.bytes
        row["under"] += c.times * c.bytes * c.overlapped
    return [{"kind": kind, "axes": axes} | row for (kind, axes), row in
            sorted(rows.items(), key=lambda item: -item[1]["bytes"]) if row["bytes"]]


def _refused(message) -> tuple[float, float]:
    """Bytes needed and there, of a compiler that ran out of memory; any other error goes on."""
    size = r"([\d.]+)([KMGT]?)"
    sizes = re.search(rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM \({size}\)", message)
    if not sizes:
        raise RuntimeError(message)
    needed, unit, there, unit_there = filter(lambda part: part is not None, sizes.groups())
    return float(needed) * UNITS[unit], float(there) * UNITS[unit_there]


def _array(shape, dtype, sharding):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _placed(x, sharding):
    return _array(x.shape, x.dtype, sharding)
