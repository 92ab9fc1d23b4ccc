"""`mmx aot --search`: ranks all meshes of a pod by an analytic cost model and compiles the best ones.

The cost model estimates the peak memory of a device from the sharding tables, as a sum of:

- state: weights and two moments in float32. For inference: weights in the dtype that the model computes in, and a cache.
- gradients.
- saved: what the layers save for the backward pass, which is each layer's input if layers are recomputed (model.remat).
- vocabulary: embedding and head, gathered.
- work: the larger of two: the logits of one chunk; or one layer's gathered weights and activations, with gradients of the same
  size in training, plus the inputs and outputs of experts. In training with recomputation, the inputs and outputs of the
  experts of all layers of the pattern count, because the compiler computes the gradients of the experts' weights last.

It estimates the seconds of a step as max(compute, overlapped exchanges) + exposed exchanges:

- Compute takes the time of the matrix FLOPs at peak, or the time to read weights and cache from memory, if that is longer.
  The FLOPs include recomputation and the padding of the experts' rows.
- Overlapped exchanges run at the same time as compute, exposed ones do not. As in the programs that the compilers produce
  today, ring attention's keys and all but one of the token groups' all-to-alls are overlapped.
- An exchange takes its bytes divided by the bandwidth of all links of a chip. An all-to-all over n devices on a torus with d
  dimensions takes d n^(1/d) / 4 hops.

The estimates rank meshes; they are not measurements.
"""
import collections
import dataclasses
import functools
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmx import mesh as meshes
from mmx.analysis.counts import flops_forward
from mmx.chips import CHIPS
from mmx.compilers import aot
from mmx.config import ConfigError, Experiment
from mmx.dims import axes_of
from mmx.layers.kinds import kind_of
from mmx.model import abstract_params, empty_cache
from mmx.parallel import exchange, expert, lightning, routing, sharding

TABLE_ROWS = 20
# A TPU computes the products of several experts as one ragged product. For each expert after the first on a device, the FLOPs
# that the compiler counts grow by this share.
RAGGED_OVERHEAD = 0.25


def run(e: Experiment, topology: str, mode: str = "train", slices: int = 1, best: int = 3, out: str = ".") -> dict:
    """Ranks all meshes, compiles the best ones that fit, and writes a plot. Returns the report that `show` prints.

    Args:
      topology, mode, slices: as for `aot.run`.
      best: number of meshes to compile.
      out: directory of the plot, search.png.

    Raises:
      ConfigError: the compiler does not support the topology, or no mesh can shard the experiment.
    """
    if best < 1:
        raise ConfigError(f"--best {best} must be at least 1")
    pod = aot.describe_pod(topology, slices)
    rows = [{"mesh": sizes, "model": estimate(e, sizes, pod.chip, pod.shape, mode)}
            for sizes in candidates(e, len(pod.devices), slices)]
    report = pod.report(mode) | {"meshes": rows}
    rows.sort(key=lambda row: (row["model"]["peak"] > report["memory"], row["model"]["seconds"]))
    with Progress(console=Console(stderr=True)) as progress:
        chosen = _fitting(report)[:best]
        task = progress.add_task("", total=len(chosen))
        for row in chosen:
            progress.update(task, description=f"compiling {format_mesh(row['mesh'])}")
            row["compiled"] = _compile(e, pod, row["mesh"], mode)
            progress.advance(task)
    Path(out).mkdir(parents=True, exist_ok=True)
    return report | {"plot": str(_plot(report, Path(out, "search.png")))}


def candidates(e: Experiment, devices: int, slices: int) -> list[dict[str, int]]:
    """Returns the sizes by axis of all meshes that can shard the experiment. Raises ConfigError if there is none.

    Args:
      devices: number of devices of all slices together.
    """
    def factorizations(n, axes):
        if axes == 1:
            return [(n,)]
        return [(first, *others) for first in range(1, n + 1) if n % first == 0
                for others in factorizations(n // first, axes - 1)]
    axes = dataclasses.asdict(e.mesh)
    all_sizes = [dict(zip(axes, (slices, *sizes))) for sizes in factorizations(devices // slices, len(axes) - 1)]
    valid = [sizes for sizes in all_sizes if not meshes.mesh_error(e, sizes)]
    if not valid:
        example = min(all_sizes, key=lambda sizes: sizes["ep"] * sizes["etp"] * sizes["seq"])
        raise ConfigError(f"no mesh of {slices} x {devices // slices} devices can shard the experiment. For example "
                          f"{format_mesh(example)}: {meshes.mesh_error(e, example)}")
    return valid


def format_mesh(sizes: dict[str, int]) -> str:
    """Returns a mesh in the form of the flag --mesh, for example edp=16,ep=32."""
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "edp=1"


def estimate(e: Experiment, sizes: dict[str, int], chip: str, shape: list[int], mode: str) -> dict:
    """Estimates the memory and time of one run on a mesh.

    Args:
      sizes: the mesh, all axes in order.
      chip: a name in mmx.chips.CHIPS.
      shape: of one slice, for example [8, 8, 8].
      mode: train, prefill or decode, as for `aot.run`.

    Returns:
      A device's peak memory in bytes and its parts; a run's seconds and their parts; a row for each exchange.
    """
    hardware, load = CHIPS[chip], _load(e, sizes, mode)
    memory = _memory(e, load, mode)
    overlapped_share = {"all-to-all": 1 - 1 / aot.model_config(e, mode).token_groups, "ring": 1.0}
    exchanges, overlapped = [], 0.0
    for (kind, axes), size in _exchanges(e, load, mode).most_common():
        if size:
            seconds, share = exchange_seconds(kind, axes, size, sizes, chip, shape), overlapped_share.get(kind, 0.0)
            exchanges.append({"kind": kind, "axes": axes, "bytes": size, "overlapped": size * share, "seconds": seconds})
            overlapped += seconds * share
    exposed = sum(row["seconds"] for row in exchanges) - overlapped
    compute = max(_flops(e, load, mode) / hardware.peak, _bytes_read(e, load, mode) / hardware.bandwidth)
    return {"peak": sum(memory.values()), "memory": memory, "seconds": max(compute, overlapped) + exposed,
            "compute_s": compute, "overlapped_s": overlapped, "exposed_s": exposed, "exchanges": exchanges}


def exchange_seconds(kind: str, axes: str, size: float, sizes: dict[str, int], chip: str, shape: list[int]) -> float:
    """Returns the seconds in which a device receives `size` bytes over mesh axes, which are joined by "+"."""
    hardware, order = CHIPS[chip], list(sizes)
    over = [axis for axis in axes.replace("slices", "slice").split("+") if axis in order]
    if not over:        # "one device"
        return 0.0
    span = math.prod(sizes[axis] for axis in order[min(map(order.index, over)):])     # consecutive devices that take part
    if "slice" in over or (chip == "h100" and span > shape[-1]):    # between slices, or between hosts of GPUs
        return size / hardware.network_bandwidth
    devices, dimensions = math.prod(sizes[axis] for axis in over), len(shape)
    torus = kind == "all-to-all" and chip != "h100"
    hops = max(1.0, dimensions * devices ** (1 / dimensions) / 4) if torus else 1.0
    return size * hops / hardware.link_bandwidth


class Weight(NamedTuple):
    """A weight of the model; of scanned layers, the weight of one layer. Sizes are numbers of elements on one device."""
    part: str               # layer_0, embed_WD, ...
    layers: int             # how many layers have such a weight
    stored: int
    gathers: list[tuple[str, int]]      # FSDP's gathers in order: mesh axis, elements received
    sum_axes: tuple         # mesh axes over which its gradient is summed

    @property
    def gathered(self) -> int:
        return self.stored + sum(received for _, received in self.gathers)


class Load(NamedTuple):
    """What one device stores and processes in one run."""
    sizes: dict             # the mesh
    weights: list[Weight]
    rows: int               # of the batch
    tokens: int             # of activations between layers
    slots: int              # slots that it sends to experts, in one layer
    expert_rows: int        # rows that its experts compute in one layer, including the padding of blocks
    counted_rows: float     # the same, with RAGGED_OVERHEAD
    cache: int              # bytes


def _load(e, sizes, mode) -> Load:
    c, T = aot.model_config(e, mode), aot.tokens_per_row(e, mode)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    row_shards, time_shards = sharding.size(mesh, sharding.ROWS), sharding.size(mesh, sharding.TIME)
    if e.train.batch % row_shards or T % time_shards:       # every device has all tokens
        row_shards, time_shards, token_axes = 1, 1, ()
    else:
        token_axes = sum(sharding.token_axes(mesh), ())
    M, ep, etp = e.train.batch * T // row_shards // time_shards, sizes["ep"], sizes["etp"]
    experts, exchanged = c.experts // ep, token_axes and ep * etp > 1
    ends = [M * n // c.token_groups for n in range(c.token_groups + 1)] if exchanged else [0, M]
    capacity = routing.expert_capacity(c.capacity, M * row_shards * time_shards * c.top_k, c.experts)
    slots = expert_rows = 0
    for tokens in (end - begin for begin, end in itertools.pairwise(ends) if end > begin):
        group_slots, senders = tokens * c.top_k, 1
        if exchanged:
            buffers, senders = 1 if c.ragged else ep, etp
            group_slots = buffers * exchange.buffer_slots(tokens, c.top_k, experts, capacity, ep, c.transport, c.ragged)
        block = expert.block_size(tokens * c.top_k * senders, experts)
        slots += group_slots
        expert_rows += -(-group_slots * senders // block) * block + experts * block
    return Load(sizes, [_weight(*weight, mesh, token_axes) for weight in _weights(c)], e.train.batch // row_shards, M, slots,
                expert_rows, expert_rows * (1 + RAGGED_OVERHEAD * (experts - 1)), 0 if mode == "train" else _cache(c, e, mesh))


@functools.lru_cache
def _weights(c) -> list[tuple]:
    """Returns (part, letters, layers, shape) of every weight."""
    weights = []
    for path, x in jax.tree_util.tree_leaves_with_path(abstract_params(c)):
        keys = [part.key for part in path]
        letters = sharding.letters_of(path)
        layer_axes = x.ndim - len(letters)
        weights.append((keys[1] if len(keys) > 1 else keys[0], letters, math.prod(x.shape[:layer_axes]), x.shape[layer_axes:]))
    return weights


def _weight(part, letters, layers, shape, mesh, token_axes) -> Weight:
    spec = sharding.weight_spec(letters, shape, mesh)
    stored = gathered = math.prod(NamedSharding(mesh, spec).shard_shape(shape))
    gathers = []
    for _, axis in sharding.fsdp_axes(letters, spec):
        gathers.append((axis, gathered * (mesh.shape[axis] - 1)))
        gathered *= mesh.shape[axis]
    return Weight(part, layers, stored, gathers, sharding.gradient_sum_axes(spec, token_axes))


def _cache(c, e, mesh) -> int:
    cache = jax.eval_shape(functools.partial(empty_cache, c, e.train.batch, e.train.length))
    shardings = sharding.cache_shardings(cache, mesh)
    return sum(math.prod(placed.shard_shape(x.shape)) * x.dtype.itemsize
               for x, placed in zip(jax.tree.leaves(cache), jax.tree.leaves(shardings)))


def _memory(e, load: Load, mode) -> dict[str, float]:
    """Returns the bytes of each part of the peak memory."""
    c, train, itemsize = e.model, mode == "train", jnp.dtype(e.model.dtype).itemsize
    D, F, etp, M = c.dim, c.expert_dim, load.sizes["etp"], load.tokens
    stored = sum(weight.layers * weight.stored for weight in load.weights)
    mixers = {letter: M * _mixer_width(c, letter, etp) for letter in set(c.pattern)}
    experts = load.expert_rows * (2 * D + 3 * F // etp)
    layers = [sum(weight.gathered for weight in load.weights if weight.part == f"layer_{i}") + mixers[letter] + 2 * M * D
              + load.slots * D for i, letter in enumerate(c.pattern)]
    work = max(layers) * (1 + train) + experts * (len(c.pattern) if train and c.remat else 1)
    logits = 3 * 4 * c.vocab * min(M, max(1, e.train.loss_chunk // math.prod(load.sizes.values()))) if train else 0
    if c.remat:
        saved = M * D + load.slots * D * c.keep_arrived
    else:
        saved = sum(mixers[letter] for letter in c.pattern) / len(c.pattern) + experts
    vocabulary = sum(weight.gathered for weight in load.weights if weight.part in ("embed_WD", "head_WD"))
    return {"state": stored * (12 if train else itemsize), "cache": load.cache, "gradients": stored * itemsize * train,
            "saved": c.layers * saved * itemsize * train, "vocabulary": itemsize * vocabulary,
            "work": max(work * itemsize, logits)}


def _mixer_width(c, letter: str, etp: int) -> int:
    """Returns how many numbers per token a mixer keeps: the outputs of its input projections, the input of its output one.

    Key-value heads are repeated until the tensor axis divides them.
    """
    extents = {"G": max(c.kv_heads, min(etp, c.heads))}
    mixer = abstract_params(dataclasses.replace(c, pattern=letter))["groups"]["layer_0"]["mixer"]
    width = 0
    for name, x in mixer.items():
        letters = axes_of(name)
        if len(letters) > 1 and "D" in (letters[0], letters[-1]):
            width += math.prod(extents.get(axis, size) for axis, size in zip(letters, x.shape[1:]) if axis != "D")
    return width


def _flops(e, load: Load, mode) -> float:
    c, tokens = e.model, e.train.batch * aot.tokens_per_row(e, mode)
    expert_flops = 6 * c.layers * c.dim * c.expert_dim      # of one row in every layer
    others = (flops_forward(c, aot.context_length(e, mode)) - c.top_k * expert_flops) * tokens / math.prod(load.sizes.values())
    return (others + load.counted_rows * expert_flops / load.sizes["etp"]) * _passes(c, mode)


def _passes(c, mode) -> int:
    """Returns the FLOPs of a run divided by those of a forward pass: the backward pass costs two, the recomputation one."""
    return 3 + c.remat if mode == "train" else 1


def _bytes_read(e, load: Load, mode) -> float:
    """Returns the bytes read from memory: every weight once a pass, and the cache."""
    weights = sum(weight.layers * weight.gathered for weight in load.weights)
    return weights * jnp.dtype(e.model.dtype).itemsize * _passes(e.model, mode) + load.cache


def _exchanges(e, load: Load, mode) -> collections.Counter:
    """Returns the bytes that a device receives in one run, by (kind of exchange, mesh axes)."""
    received = _weight_exchanges(e.model, load, mode)
    received.update(_expert_exchanges(aot.model_config(e, mode), load, mode))
    received.update(_sequence_exchanges(e.model, load, mode))
    return received


def _weight_exchanges(c, load, mode) -> collections.Counter:
    train, itemsize, received = mode == "train", jnp.dtype(c.dtype).itemsize, collections.Counter()
    for weight in load.weights:
        for axis, elements in weight.gathers:
            size = weight.layers * elements * itemsize
            received["all-gather", axis] += size * (1 + (train * c.remat) * weight.part.startswith("layer"))
            received["reduce-scatter", axis] += size * train
        for axis in weight.sum_axes if train else ():
            n = load.sizes[axis]
            received["all-reduce", axis] += 2 * (n - 1) / n * weight.layers * weight.stored * itemsize
    return received


def _expert_exchanges(c, load, mode) -> dict:
    """Tokens are sent to experts forward, recomputed and backward; outputs are sent back forward and backward."""
    train, recomputed, itemsize = mode == "train", (mode == "train") * c.remat, jnp.dtype(c.dtype).itemsize
    D, ep, etp = c.dim, load.sizes["ep"], load.sizes["etp"]
    sends = 2 + train * 2 + recomputed * (not c.keep_arrived)
    slots, tokens = (2 + 2 * train + recomputed) * load.slots, (2 + 2 * train + 2 * recomputed) * load.tokens
    return {("all-to-all", "ep"): c.layers * sends * load.slots * (ep - 1) / ep * D * itemsize,
            ("all-gather, reduce-scatter", "etp"):
                (etp - 1) * D * itemsize * (c.layers * (slots + tokens) + (2 + 3 * train) * load.tokens)}


def _sequence_exchanges(c, load, mode) -> dict:
    """Lightning layers exchange states. Layers with keys in their cache exchange keys and values, or queries and outputs."""
    n, etp, itemsize = load.sizes["seq"], load.sizes["etp"], jnp.dtype(c.dtype).itemsize
    if n == 1:
        return {}
    H, G, K = c.heads // etp, math.lcm(c.kv_heads, etp) // etp, c.head_dim
    M = load.tokens * etp       # tokens inside a layer, where etp shards heads instead of time
    has_keys = {letter: any("S" in axes_of(name) for name in kind_of(letter).cache(c, c.dtype)) for letter in set(c.pattern)}
    key_layers = sum(has_keys[letter] for letter in c.layer_kinds)
    state_layers = c.layers - key_layers
    states = lightning.bytes_per_device(load.rows, H, K, K, n, last=mode != "train")
    if mode == "train":
        ring = (2 + c.remat) * (n - 1) * itemsize + n * 4       # the gradients of keys and values are in float32
        return {("states", "seq"): state_layers * states * (2 + c.remat), ("ring", "seq"): key_layers * 2 * M * G * K * ring}
    if mode == "prefill":       # the queries, keys and values of the chunk meet every device's part of the cache
        return {("states", "seq"): state_layers * states,
                ("all-gather", "seq"): key_layers * (n - 1) * M * (H + 2 * G) * K * itemsize,
                ("reduce-scatter", "seq"): key_layers * (n - 1) * M * H * K * 4}
    return {("all-reduce", "seq"): key_layers * 2 * (n - 1) / n * load.rows * H * K * 4}


def _compile(e, pod, sizes, mode) -> dict:
    """Returns the report of `aot.run`, with total_s: the static estimate and the exchanges that are not overlapped."""
    try:
        report = aot.run(e, pod.topology, format_mesh(sizes), mode, pod.slices)
    except RuntimeError as error:       # an error of the compiler does not end the search
        return {"fits": False, "error": str(error).splitlines()[0]}
    if "static_s" in report:
        report["total_s"] = report["static_s"] + sum(
            exchange_seconds(row["kind"], row["axes"], row["bytes"] - row["overlapped"], sizes, pod.chip, pod.shape)
            for row in report["exchanges"])
    return report


def _fitting(report) -> list[dict]:
    """Returns the meshes that fit according to the cost model."""
    return [row for row in report["meshes"] if row["model"]["peak"] <= report["memory"]]


def show(report: dict):
    """Prints the report of `run`: a table of the best meshes, with the compiler's figures for those that were compiled."""
    table = Table("mesh", "cost model: GB", "s", "compute s", "exchanges s", "compiled: GB", "static s", "with exchanges s",
                  "received", title=f"{aot.title(report)}: cost model and compiler")
    for row in report["meshes"][:TABLE_ROWS]:
        model, compiled = row["model"], row.get("compiled", {})
        cells = [compiled.get("error", "")]
        if "peak" in compiled:
            cells = [f"{compiled['peak'] / 1e9:.1f}" + " does not fit" * (not compiled["fits"])]
            cells += [f"{compiled[key]:.3g}" if key in compiled else "" for key in ("static_s", "total_s")]
            cells += [aot.gigabytes(aot.received_bytes(compiled))] if "exchanges" in compiled else []
        table.add_row(format_mesh(row["mesh"]), f"{model['peak'] / 1e9:.1f}", f"{model['seconds']:.3g}",
                      f"{model['compute_s']:.3g}", f"{model['overlapped_s'] + model['exposed_s']:.3g}", *cells)
    console = Console(width=None if sys.stdout.isatty() else 200)       # wide enough for a file, where no line is wrapped
    console.print(table)
    console.print(f"{len(report['meshes'])} meshes; according to the cost model, {len(_fitting(report))} of them fit into "
                  f"{aot.gigabytes(report['memory'])}. All seconds are estimates. Plot: {report['plot']}", soft_wrap=True)


def _plot(report, path) -> Path:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    models = [row["model"] for row in report["meshes"]]
    axes.loglog([model["peak"] / 1e9 for model in models], [model["seconds"] for model in models], ".", color="0.6",
                label="cost model, all meshes")
    compiled_rows = [row for row in report["meshes"] if "peak" in row.get("compiled", {})]
    for n, row in enumerate(compiled_rows):
        model, compiled = row["model"], row["compiled"]
        points = [(model["peak"] / 1e9, model["seconds"]), (compiled["peak"] / 1e9, compiled.get("total_s", model["seconds"]))]
        axes.plot(*zip(*points), "-", color=f"C{n}", linewidth=0.8)
        axes.plot(*points[0], "o", color=f"C{n}", markersize=5)
        axes.plot(*points[1], "s", color=f"C{n}", markersize=7, label=f"{format_mesh(row['mesh'])}, compiled")
    axes.axvline(report["memory"] / 1e9, color="C3", linestyle="--", label="memory of a chip")
    axes.set(xlabel="peak memory of a chip, GB", ylabel="estimated seconds: cost model, or compiled",
             title=f"{aot.title(report)}: {len(models)} meshes")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 1)))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
