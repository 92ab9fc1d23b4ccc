"""Device meshes with the paper's groups as axes (paper section 3.1): all devices = slice x edp x ep x etp x seq.

    axis    name                        what it shards
    slice   slices of a multislice pod  rows; a slow network connects the slices
    edp     expert data parallel        rows; weights and optimizer state (FSDP)
    ep      expert parallel             rows; experts
    etp     expert tensor parallel      inside a layer: heads, experts' hidden units, vocabulary; between layers: time (tokens)
    seq     sequence parallel           time (tokens)
"""
import dataclasses
import math
import os
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mmx import config
from mmx.config import ConfigError, Experiment
from mmx.layers.kinds import kind_of
from mmx.parallel import sharding


def parse(text: str) -> config.Mesh:
    """Returns the mesh of a `--mesh` flag: AXIS=SIZE, joined by commas. Axes that are not named have size 1."""
    sizes = dict.fromkeys((f.name for f in dataclasses.fields(config.Mesh)), 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise ConfigError(f"--mesh {text!r}: {part!r} is not of the form AXIS=SIZE; axes are {', '.join(sizes)}")
        sizes[axis] = int(size)
    mesh = config.Mesh(**sizes)
    mesh.validate()
    return mesh


def inference_mesh(c: config.Model, text: str):
    """Returns a context (jax.set_mesh) with the mesh of a `--mesh` flag, for inference.

    The mesh must divide the experts, their hidden units and the heads. Any batch works: a batch that the mesh does not divide
    is replicated.
    """
    return jax.set_mesh(make(Experiment(c.portable(), train=None, mesh=parse(text))))


def make(e: Experiment, processes: int = 1) -> Mesh:
    """Returns the experiment's mesh over the devices of all processes. An axis of size -1 gets all remaining devices.

    CPU devices are simulated, as many as the mesh needs. If an axis has size -1, the number of CPU devices is chosen so that
    the mesh divides the experiment's batch, sequence length, experts and heads (`mesh_error`):
      - one process simulates as many devices as possible, but at most one per core;
      - several processes simulate as few devices as possible, the same number in each process. The number of cores is not used,
        because the processes' machines may differ in it.
    """
    sizes, free, fixed, text = _axes(e)
    # Check the fixed axes before JAX starts its devices, so that a mistake is reported at once.
    _check(e, sizes | {free: 1} if free else sizes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = range(cores // fixed, 1, -1) if processes == 1 else range(1, processes + 1)
    fitting = next((n for n in counts if free and n * fixed % processes == 0 and not mesh_error(e, sizes | {free: n})), 1)
    try:
        jax.config.update("jax_num_cpu_devices", max(fitting * fixed // processes, 1))
    except RuntimeError:        # JAX has started its devices already: use them as they are
        pass
    devices = jax.devices()
    if e.model.ragged and devices[0].platform == "cpu":
        raise ConfigError("model.ragged=True needs TPUs or GPUs: CPUs have no ragged all-to-all. Use model.ragged=False")
    if free:
        # One process on CPU may leave devices unused: an earlier experiment in this process may have started more of them.
        most, unused_allowed = len(devices) // fixed, devices[0].platform == "cpu" and processes == 1
        if not most or (most * fixed != len(devices) and not unused_allowed):
            raise ConfigError(f"{text}: the product of the other axes, {fixed}, must divide the number of devices, "
                              f"{len(devices)}")
        sizes[free] = most
        if unused_allowed:
            sizes[free] = next((n for n in range(most, 1, -1) if not mesh_error(e, sizes | {free: n})), 1)
    _check(e, sizes)
    world = math.prod(sizes.values())
    if world > len(devices):
        raise ConfigError(f"{text or 'the mesh'} needs {world} devices, but there are {len(devices)}. "
                          "Set one axis to -1 to use all devices")
    if world < len(devices) and jax.process_count() > 1:
        raise ConfigError(f"{text or 'the mesh'} uses {world} of the {len(devices)} devices of {jax.process_count()} "
                          "processes, but it must use all of them. Set one axis to -1 to use all devices")
    return _mesh(devices[:world], sizes)


def data_host(mesh: Mesh) -> tuple[int, int]:
    """Returns (host, hosts) of this process, for `data.pipeline.stream`.

    A batch's rows are divided into `hosts` equal blocks of consecutive rows, and this process reads block `host`. Processes
    whose devices need the same rows get the same `host`, so `hosts` can be smaller than the number of processes.
    """
    devices_BT = mesh.devices.reshape(sharding.size(mesh, sharding.ROWS), -1)
    rows = {}
    for row, devices_T in enumerate(devices_BT):
        for device in devices_T:
            rows.setdefault(device.process_index, {})[row] = None
    blocks = sorted({tuple(block) for block in rows.values()})
    if sum(blocks, ()) != tuple(range(len(devices_BT))) or len({len(block) for block in blocks}) > 1:
        raise ConfigError(f"the number of devices of a process, {jax.local_device_count()}, must be a multiple or a divisor of "
                          f"mesh.etp x mesh.seq = {devices_BT.shape[1]}: otherwise the rows of two processes overlap in part")
    return blocks.index(tuple(rows[jax.process_index()])), len(blocks)


def for_topology(e: Experiment, devices) -> Mesh:
    """Returns the experiment's mesh over all devices of a compile-only topology. An axis of size -1 gets the remaining ones."""
    sizes, _, fixed, text = _axes(e)
    sizes = {axis: n if n != -1 else len(devices) // fixed for axis, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"{text} must multiply to the {len(devices)} devices of the pod. "
                          "Set one axis to -1 to use all devices")
    _check(e, sizes)
    return _mesh(devices, sizes)


def _axes(e: Experiment) -> tuple[dict, str | None, int, str]:
    """Returns the axes' sizes, the free axis (size -1) if any, the product of the other sizes, and a text for messages."""
    sizes = dataclasses.asdict(e.mesh)
    fixed = math.prod(n for n in sizes.values() if n != -1)
    text = ", ".join(f"mesh.{axis}={n}" for axis, n in sizes.items() if n != 1)
    return sizes, next((axis for axis, n in sizes.items() if n == -1), None), fixed, text


def _mesh(devices, sizes) -> Mesh:
    """Returns the mesh with the devices in their given order, and the axes from slice (outermost) to seq (innermost).

    The devices of a process are consecutive in that order, so a process has consecutive rows. Neighbouring devices differ in
    the innermost axes, etp and seq, which communicate the most.
    """
    return Mesh(np.array(devices).reshape(*sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _check(e, sizes):
    if reason := mesh_error(e, sizes):
        raise ConfigError(reason)


def mesh_error(e: Experiment, sizes) -> str | None:
    """Returns why a mesh of these sizes cannot shard the experiment; None if it can."""
    kinds = {letter: kind_of(letter) for letter in e.model.pattern}
    whole = [f"{letter} ({kind.name})" for letter, kind in kinds.items() if not kind.splits_time]
    if whole and sizes["seq"] > 1:
        return f"model.pattern={e.model.pattern!r}: layers of kind {', '.join(whole)} need mesh.seq=1, not {sizes['seq']}"
    parts = [("model.experts", e.model.experts, ("ep",)), ("model.expert_dim", e.model.expert_dim, ("etp",)),
             ("model.heads", e.model.heads, ("etp",))]
    if e.train:
        parts = [("train.batch", e.train.batch, sharding.ROWS), ("train.length", e.train.length, sharding.TIME), *parts]
    for name, extent, axes in parts:
        devices = math.prod(sizes[axis] for axis in axes)
        if extent % devices:
            product = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
            return f"{name}={extent} must be divisible by {product}"
    return None
