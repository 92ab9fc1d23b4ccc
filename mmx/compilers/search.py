"""`mmx aot --search`: all meshes of a pod ranked by an analytic model, the best few of them compiled.

The model counts, for one device, what the sharding tables say. Memory:

    weights and two moments (float32), or weights as computed with and a cache; gradients
    + what layers keep for their backward pass: with remat each one's input
    + embedding and head, gathered
    + the larger of a chunk of logits and the layers' work: one layer's weights and heads, gradients beside them, and what
      experts take and make in all layers of the pattern, since the compiler makes their weights' gradients last

Time: matrix FLOPs of every row that experts have, with recomputation, at peak, or what must be read from memory, whichever
is longer; under it the exchanges that run under compute in the programs as they are today (all but one of the token groups'
all-to-alls, the ring's keys); behind it the rest. An exchange takes its bytes over all of a chip's links; on a torus of n
dimensions all-to-all over X devices goes n X^(1/n) / 4 hops. Both are for ranking, no measured time.
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

ROWS = 20       # of the table
BEGIN = 0.25    # of a ragged product's rows: what each further expert adds as TPU's compiler tiles and counts them


def run(e: Experiment, topology: str, mode: str = "train", slices: int = 1, best: int = 3, out: str = ".") -> dict:
    """Ranks, compiles, plots; returns what `show` prints. Raises ConfigError for what no pod or mesh can be."""
    if best < 1:
        raise ConfigError(f"--best {best} compiles nothing: it must be at least 1")
    chip, devices = aot.pod(topology, slices)
    shape = [int(n) for n in topology.partition(":")[2].split("x")]
    rows = [{"mesh": sizes, "model": estimate(e, sizes, chip, shape, mode)} for sizes in candidates(e, len(devices), slices)]
    memory = CHIPS[chip].memory
    rows.sort(key=lambda row: (row["model"]["peak"] > memory, row["model"]["seconds"]))
    with Progress(console=Console(stderr=True)) as progress:
        fitting = [row for row in rows if row["model"]["peak"] <= memory][:best]
        task = progress.add_task("", total=len(fitting))
        for row in fitting:
            progress.update(task, description=f"compiles {name(row['mesh'])}")
            row["compiled"] = _compiled(e, topology, row["mesh"], mode, slices, chip, shape)
            progress.advance(task)
    found = {"topology": topology, "slices": slices, "devices": len(devices), "mode": mode, "memory": memory, "meshes": rows}
    Path(out).mkdir(parents=True, exist_ok=True)
    return found | {"plot": str(_plot(found, Path(out, "search.png")))}


def candidates(e: Experiment, devices: int, slices: int) -> list[dict[str, int]]:
    """Sizes by axis of all the meshes of a pod that the experiment splits over. Raises ConfigError where there is none."""
    def splits(n, axes):
        if axes == 1:
            return [(n,)]
        return [(first, *rest) for first in range(1, n + 1) if n % first == 0 for rest in splits(n // first, axes - 1)]
    axes = dataclasses.asdict(e.mesh)
    all_sizes = [dict(zip(axes, (slices, *sizes))) for sizes in splits(devices // slices, len(axes) - 1)]
    found = [sizes for sizes in all_sizes if not meshes.mesh_error(e, sizes)]
    if not found:
        likely = min(all_sizes, key=lambda sizes: sizes["ep"] * sizes["etp"] * sizes["seq"])
        raise ConfigError(f"no mesh of {slices} x {devices // slices} devices splits the experiment, say {name(likely)}: "
                          + meshes.mesh_error(e, likely))
    return found


def name(sizes: dict[str, int]) -> str:
    """edp=16,ep=32: a mesh as `mmx aot --mesh` takes it."""
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "edp=1"


def estimate(e: Experiment, sizes: dict[str, int], chip: str, shape: list[int], mode: str) -> dict:
    """A device's peak of memory in bytes with its parts, a step's seconds with theirs, and its exchanges."""
    hardware, work = CHIPS[chip], _work(e, sizes, mode)
    memory, exchanges = _memory(e, work, mode), _exchanges(e, work, mode)
    for row in exchanges:
        row["seconds"] = seconds(row["kind"], row["axes"], row["bytes"], sizes, chip, shape)
    compute = max(_flops(e, work, mode) / hardware.peak, _read(e, work, mode) / hardware.bandwidth)
    under = sum(row["seconds"] * row["under"] for row in exchanges)
    rest = sum(row["seconds"] for row in exchanges) - under
    return {"peak": sum(memory.values()), "memory": memory, "seconds": max(compute, under) + rest, "compute_s": compute,
            "under_s": under, "rest_s": rest, "exchanges": exchanges}


def seconds(kind: str, axes: str, size: float, sizes: dict[str, int], chip: str, shape: list[int]) -> float:
    """What receiving `size` bytes over `axes` (joined by +) takes."""
    hardware, order = CHIPS[chip], list(sizes)
    over = [axis for axis in axes.replace("slices", "slice").split("+") if axis in order]
    if not over:        # "one device"
        return 0.0
    inside = math.prod(sizes[axis] for axis in order[min(map(order.index, over)):])
    if "slice" in over or (chip == "h100" and inside > shape[-1]):     # GPUs of one host are near
        return size / hardware.network_bandwidth
    X, n = math.prod(sizes[axis] for axis in over), len(shape)
    hops = max(1.0, n * X ** (1 / n) / 4) if kind == "all-to-all" and chip != "h100" else 1.0
    return size * hops / hardware.link_bandwidth


class Weight(NamedTuple):
    """Of the scanned layers' weights one of each; extents in numbers a device."""
    part: str               # layer_0, embed_WD, ...
    times: int              # layers that have it
    kept: int
    steps: list             # FSDP's gathering: (axis, received)
    summed: tuple           # mesh axes over which its gradient is summed

    @property
    def whole(self) -> int:
        return self.kept + sum(received for _, received in self.steps)


class Work(NamedTuple):
    """What a device holds and handles; extents are local."""
    sizes: dict
    weights: list
    rows: int
    tokens: int             # between layers
    sent: int               # slots on the way to experts, of one layer
    computed: int           # rows of this device's experts, with the padding of their blocks
    ragged: float           # rows that are multiplied, with what BEGIN adds
    cache: int              # bytes


def _work(e, sizes, mode) -> Work:
    c, T = _model(e, mode), aot.span(e, mode)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    rows, time = sharding.size(mesh, sharding.ROWS), sharding.size(mesh, sharding.TIME)
    if e.train.batch % rows or T % time:        # all tokens are everywhere
        rows, time, axes = 1, 1, ()
    else:
        axes = sum(sharding.token_axes(mesh), ())
    B, M, J, ep, etp = e.train.batch // rows, e.train.batch * T // rows // time, c.top_k, sizes["ep"], sizes["etp"]
    here, cuts, travels = c.experts // ep, [0, M], axes and ep * etp > 1
    if travels:
        cuts = [M * n // c.token_groups for n in range(c.token_groups + 1)]
    groups = [b - a for a, b in itertools.pairwise(cuts) if b > a]
    limit = routing.expert_capacity(c.capacity, M * rows * time * J, c.experts)
    buffers = 1 if c.ragged else ep
    slots = functools.partial(exchange.buffer_slots, peers=ep, transport=c.transport, ragged=c.ragged)
    sent_N = [buffers * slots(m, J, here, limit) if travels else m * J for m in groups]
    rows_N = []
    for m, sent in zip(groups, sent_N):
        X = etp if travels else 1
        block = expert.block_size(m * J * X, here)
        rows_N.append(-(-sent * X // block) * block + here * block)
    return Work(sizes, [_weight(*w, mesh, axes) for w in _weights(c)], B, M, sum(sent_N), sum(rows_N),
                sum(rows_N) * (1 + BEGIN * (here - 1)), 0 if mode == "train" else _cache(c, e, mesh))


def _model(e, mode):
    return e.model if mode == "train" else aot.undropped(e)


@functools.lru_cache
def _weights(c):
    """(part, letters, layers, shape) of every weight."""
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(abstract_params(c)):
        keys = [part.key for part in path]
        letters = sharding.letters_of(path)
        at = x.ndim - len(letters)
        found.append((keys[1] if len(keys) > 1 else keys[0], letters, math.prod(x.shape[:at]), x.shape[at:]))
    return found


def _weight(part, letters, times, shape, mesh, axes) -> Weight:
    spec = sharding.weight_spec(letters, shape, mesh)
    kept = here = math.prod(NamedSharding(mesh, spec).shard_shape(shape))
    steps = []
    for _, axis in sharding.fsdp_axes(letters, spec):
        steps.append((axis, here * (mesh.shape[axis] - 1)))
        here *= mesh.shape[axis]
    return Weight(part, times, kept, steps, sharding.gradient_sum_axes(spec, axes))


def _cache(c, e, mesh) -> int:
    cache = jax.eval_shape(functools.partial(empty_cache, c, e.train.batch, e.train.length))
    cuts = sharding.cache_shardings(cache, mesh)
    return sum(math.prod(cut.shard_shape(x.shape)) * x.dtype.itemsize
               for x, cut in zip(jax.tree.leaves(cache), jax.tree.leaves(cuts)))


def _memory(e, w: Work, mode) -> dict[str, float]:
    """Bytes by part."""
    c, train, item = e.model, mode == "train", jnp.dtype(e.model.dtype).itemsize
    D, F, etp, M = c.dim, c.expert_dim, w.sizes["etp"], w.tokens
    numbers = sum(weight.times * weight.kept for weight in w.weights)
    heads = {letter: M * _mixer_width(c, letter, etp) for letter in set(c.pattern)}
    moe = w.computed * (2 * D + 3 * F // etp)
    layers = [sum(weight.whole for weight in w.weights if weight.part == f"layer_{i}") + heads[kind] + 2 * M * D + w.sent * D
              for i, kind in enumerate(c.pattern)]
    work = max(layers) * (1 + train) + moe * (len(c.pattern) if train and c.remat else 1)
    logits = 3 * 4 * c.vocab * min(M, max(1, e.train.loss_chunk // math.prod(w.sizes.values()))) if train else 0
    each = M * D + w.sent * D * c.keep_arrived if c.remat else sum(heads[kind] for kind in c.pattern) / len(c.pattern) + moe
    return {"state": numbers * (12 if train else item), "cache": w.cache, "gradients": numbers * item * train,
            "saved": c.layers * each * item * train,
            "vocabulary": item * sum(weight.whole for weight in w.weights if weight.part in ("embed_WD", "head_WD")),
            "work": max(work * item, logits)}


def _mixer_width(c, letter: str, etp: int) -> int:
    """Numbers that a mixer keeps of each token: the results of the products into it, and the operand of the one out of it.

    Key-value heads are repeated until the tensor axis divides them.
    """
    extents = {"G": max(c.kv_heads, min(etp, c.heads))}
    mixer = abstract_params(dataclasses.replace(c, pattern=letter))["groups"]["layer_0"]["mixer"]
    sizes = 0
    for name, x in mixer.items():
        letters = axes_of(name)
        if len(letters) > 1 and "D" in (letters[0], letters[-1]):
            sizes += math.prod(extents.get(axis, size) for axis, size in zip(letters, x.shape[1:]) if axis != "D")
    return sizes


def _flops(e, w: Work, mode) -> float:
    c, T = e.model, aot.span(e, mode)
    tokens, length = e.train.batch * T, 2 * e.train.length - T      # the last ones' context, as `aot` counts it
    experts = 6 * c.layers * c.dim * c.expert_dim
    dense = (flops_forward(c, length) - c.top_k * experts) * tokens / math.prod(w.sizes.values())
    return (dense + w.ragged * experts / w.sizes["etp"]) * _passes(c, mode)


def _passes(c, mode) -> int:
    """Forward, recomputation, and two products for each in the backward pass."""
    return 3 + c.remat if mode == "train" else 1


def _read(e, w: Work, mode) -> float:
    """Bytes of memory: every weight once a pass, and the cache."""
    return sum(x.times * x.whole for x in w.weights) * jnp.dtype(e.model.dtype).itemsize * _passes(e.model, mode) + w.cache


def _exchanges(e, w: Work, mode) -> list[dict]:
    """Kind, axes, bytes received in a step, and the share of them that compute hides."""
    c, train, item = _model(e, mode), mode == "train", jnp.dtype(e.model.dtype).itemsize
    again, found = train * c.remat, collections.Counter()
    for weight in w.weights:
        for axis, received in weight.steps:
            size = weight.times * received * item
            found["all-gather", axis] += size * (1 + again * weight.part.startswith("layer"))
            found["reduce-scatter", axis] += size * train
        for axis in weight.summed if train else ():
            X = w.sizes[axis]
            found["all-reduce", axis] += 2 * (X - 1) / X * weight.times * weight.kept * item
    D, ep, etp, seq, M = c.dim, w.sizes["ep"], w.sizes["etp"], w.sizes["seq"], w.tokens
    growing = {letter: any("S" in axes_of(name) for name in kind_of(letter).cache(c, c.dtype)) for letter in set(c.pattern)}
    keeps_keys = sum(growing[letter] for letter in c.layer_kinds)
    keeps_state = c.layers - keeps_keys
    # there forward, recomputed and backward, and back forward and backward
    found["all-to-all", "ep"] = c.layers * (2 + train * 2 + again * (not c.keep_arrived)) * w.sent * (ep - 1) / ep * D * item
    found["all-gather, reduce-scatter", "etp"] = (etp - 1) * D * item * (
        c.layers * ((2 + 2 * train + again) * w.sent + (2 + 2 * train + 2 * again) * M) + (2 + 3 * train) * M)
    X, H, G = seq, c.heads // etp, math.lcm(c.kv_heads, etp) // etp
    states = lightning.bytes_per_device(w.rows, H, c.head_dim, c.head_dim, X, last=not train) if X > 1 else 0
    if train:
        found["states", "seq"] = keeps_state * states * (2 + again)
        keys = 2 * M * etp * G * c.head_dim        # of S tokens
        found["ring", "seq"] = keeps_keys * (X > 1) * keys * ((2 + again) * (X - 1) * item + X * 4)
    elif mode == "prefill":     # behind a cache new queries, keys and values meet every part of it, and parts are summed
        found["states", "seq"] = keeps_state * states
        found["all-gather", "seq"] += keeps_keys * (X - 1) * M * etp * (H + 2 * G) * c.head_dim * item
        found["reduce-scatter", "seq"] += keeps_keys * (X - 1) * M * etp * H * c.head_dim * 4
    else:
        found["all-reduce", "seq"] += keeps_keys * 2 * (X - 1) / X * w.rows * H * c.head_dim * 4
    hidden = {"all-to-all": 1 - 1 / c.token_groups, "ring": 1.0}
    return [{"kind": kind, "axes": axes, "bytes": size, "under": hidden.get(kind, 0.0)}
            for (kind, axes), size in found.most_common() if size]


def _compiled(e, topology, sizes, mode, slices, chip, shape) -> dict:
    """What `aot.run` finds, and with the static estimate what takes exchanges that nothing runs under."""
    try:
        found = aot.run(e, topology, name(sizes), mode, slices)
    except RuntimeError as error:       # the compiler's own fault ends no search
        return {"fits": False, "error": str(error).splitlines()[0]}
    if "static_s" in found:
        found["total_s"] = found["static_s"] + sum(
            seconds(row["kind"], row["axes"], row["bytes"] - row["under"], sizes, chip, shape) for row in found["exchanges"])
    return found


def show(found: dict):
    """Prints a table of the best meshes, and of all that were compiled."""
    gb = lambda size: f"{size / 1e9:.1f}"
    table = Table("mesh", "HBM GB", "step s", "compute", "exchanges", "peak GB", "static s", "with exchanges", "received GB",
                  title=f"{found['mode']} on {found['slices']} x {found['topology']}: the model, and what the compiler says")
    for row in found["meshes"][:ROWS]:
        model, compiled = row["model"], row.get("compiled", {})
        said = [compiled.get("error", "")] if "error" in compiled else []
        if "peak" in compiled:
            said = [gb(compiled["peak"]) + " does not fit" * (not compiled["fits"])]
            said += [f"{compiled[key]:.3g}" if key in compiled else "" for key in ("static_s", "total_s")]
            said += [gb(sum(x["bytes"] for x in compiled["exchanges"]))] if "exchanges" in compiled else []
        table.add_row(name(row["mesh"]), gb(model["peak"]), f"{model['seconds']:.3g}", f"{model['compute_s']:.3g}",
                      f"{model['under_s'] + model['rest_s']:.3g}", *said)
    console = Console(width=None if sys.stdout.isatty() else 200)       # a file folds nothing
    console.print(table)
    fitting = sum(row["model"]["peak"] <= found["memory"] for row in found["meshes"])
    console.print(f"{len(found['meshes'])} meshes, {fitting} of them fit {gb(found['memory'])} GB by the model; "
                  f"no measured time. Written: {found['plot']}", soft_wrap=True)


def _plot(found, path) -> Path:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    models = [row["model"] for row in found["meshes"]]
    axes.loglog([m["peak"] / 1e9 for m in models], [m["seconds"] for m in models], ".", color="0.6", label="model, all meshes")
    done = [row for row in found["meshes"] if "peak" in row.get("compiled", {})]
    for n, row in enumerate(done):
        model, compiled = row["model"], row["compiled"]
        points = [(model["peak"] / 1e9, model["seconds"]), (compiled["peak"] / 1e9, compiled.get("total_s", model["seconds"]))]
        axes.plot(*zip(*points), "-", color=f"C{n}", linewidth=0.8)
        axes.plot(*points[0], "o", color=f"C{n}", markersize=5)
        axes.plot(*points[1], "s", color=f"C{n}", markersize=7, label=f"{name(row['mesh'])}, compiled")
    axes.axvline(found["memory"] / 1e9, color="C3", linestyle="--", label="a chip's memory")
    axes.set(xlabel="HBM a chip, GB", ylabel="seconds a step: model; static estimate and exchanges",
             title=f"{found['mode']} on {found['slices']} x {found['topology']}: {len(models)} meshes")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 1)))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
