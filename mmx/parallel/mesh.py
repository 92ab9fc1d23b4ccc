"""Device meshes whose axes mirror the paper's groups (paper section 3.1): world = slice x edp x ep x etp x seq."""
import dataclasses
import math
import os
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mmx import config
from mmx.config import ConfigError, Experiment
from mmx.parallel import sharding


def parse(text: str) -> config.Mesh:
    """Axes by AXIS=SIZE with commas; those not named are 1."""
    sizes = dict.fromkeys((f.name for f in dataclasses.fields(config.Mesh)), 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise ConfigError(f"--mesh {text!r}: {part!r} is no AXIS=SIZE; axes are {', '.join(sizes)}")
        sizes[axis] = int(size)
    found = config.Mesh(**sizes)
    found.validate()
    return found


def inference_mesh(c: config.Model, text: str):
    """A context of the mesh of `parse` axes for inference, where rows and time that do not split are computed everywhere."""
    return jax.set_mesh(make(Experiment(c.anywhere(), train=None, mesh=parse(text))))


def make(e: Experiment, processes: int = 1) -> Mesh:
    """The mesh of all processes' devices that the experiment names; -1 takes what the other axes leave.

    On CPU devices are simulated: as many as the mesh names, or for -1 as many as there are cores and the model fits.
    Several processes share them, and -1 makes as few as give each its share: their machines' cores may differ.
    """
    sizes, free, named, told = _axes(e)
    # the axes are checked before devices are made, so that a mistake costs no start-up; the free one fits by choice
    _check(e, sizes | {free: 1} if free else sizes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = range(cores // named, 1, -1) if processes == 1 else range(1, processes + 1)
    fitting = next((n for n in counts if free and n * named % processes == 0 and not mesh_error(e, sizes | {free: n})), 1)
    try:
        jax.config.update("jax_num_cpu_devices", max(fitting * named // processes, 1))
    except RuntimeError:        # the devices are in use already: take them as they are
        pass
    devices = jax.devices()
    if e.model.ragged and devices[0].platform == "cpu":
        raise ConfigError("model.ragged=True needs TPUs or GPUs: CPUs have no ragged all-to-all; leave it False here")
    if free:
        most, idle = len(devices) // named, devices[0].platform == "cpu" and processes == 1
        if not most or (most * named != len(devices) and not idle):
            raise ConfigError(f"{told}: the other axes' product {named} does not divide the {len(devices)} devices here")
        sizes[free] = most
        if idle:        # some may, where they were made for another experiment
            sizes[free] = next((n for n in range(most, 1, -1) if not mesh_error(e, sizes | {free: n})), 1)
    _check(e, sizes)
    world = math.prod(sizes.values())
    if world > len(devices):
        raise ConfigError(f"{told or 'the mesh'} needs {world} devices, but {len(devices)} devices are here; -1 on one "
                          "axis takes what is there")
    if world < len(devices) and jax.process_count() > 1:
        raise ConfigError(f"{told or 'the mesh'} needs {world} of the {len(devices)} devices of {jax.process_count()} "
                          "processes, but each must have its share; -1 on one axis takes all")
    return _placed(devices[:world], sizes)


def data_host(mesh: Mesh) -> tuple[int, int]:
    """(host, hosts): which of how many equal blocks of a batch's rows this process reads.

    Processes that hold parts of the same rows read the same block.
    """
    devices_BT = mesh.devices.reshape(sharding.size(mesh, sharding.ROWS), -1)
    rows = {}
    for row, devices_T in enumerate(devices_BT):
        for device in devices_T:
            rows.setdefault(device.process_index, {})[row] = None
    blocks = sorted({tuple(held) for held in rows.values()})
    if sum(blocks, ()) != tuple(range(len(devices_BT))) or len({len(block) for block in blocks}) > 1:
        raise ConfigError(f"a process's {jax.local_device_count()} devices are neither a multiple nor a part of mesh.etp x "
                          f"mesh.seq = {devices_BT.shape[1]}: processes would share some rows, but not all")
    return blocks.index(tuple(rows[jax.process_index()])), len(blocks)


def for_topology(e: Experiment, devices) -> Mesh:
    """The experiment's mesh over all devices of a pod that is not here; -1 takes what the other axes leave."""
    sizes, _, named, told = _axes(e)
    sizes = {axis: n if n != -1 else len(devices) // named for axis, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"{told} does not multiply to the {len(devices)} devices of the pod; -1 on one axis takes "
                          "what is left")
    _check(e, sizes)
    return _placed(devices, sizes)


def _axes(e: Experiment) -> tuple[dict, str | None, int, str]:
    """The axes' sizes, the one that is free (-1), the product of the others, and what is said of them."""
    sizes = dataclasses.asdict(e.mesh)
    named = math.prod(n for n in sizes.values() if n != -1)
    told = ", ".join(f"mesh.{axis}={n}" for axis, n in sizes.items() if n != 1)
    return sizes, next((axis for axis, n in sizes.items() if n == -1), None), named, told


def _placed(devices, sizes) -> Mesh:
    """In the devices' order, in which each process reads the next rows; the innermost axes, which talk most, are neighbours."""
    return Mesh(np.array(devices).reshape(*sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _check(e, sizes):
    if reason := mesh_error(e, sizes):
        raise ConfigError(reason)


def mesh_error(e: Experiment, sizes) -> str | None:
    """What of the experiment does not split over the mesh axes."""
    if "W" in e.model.pattern and sizes["seq"] > 1:
        return f"model.pattern={e.model.pattern!r} has windows, W, which mesh.seq={sizes['seq']} would cut"
    parts = [("model.experts", e.model.experts, ("ep",)), ("model.expert_dim", e.model.expert_dim, ("etp",)),
             ("model.heads", e.model.heads, ("etp",))]
    if e.train:
        parts = [("train.batch", e.train.batch, sharding.ROWS), ("train.length", e.train.length, sharding.TIME), *parts]
    for name, extent, axes in parts:
        devices = math.prod(sizes[axis] for axis in axes)
        if extent % devices:
            over = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
            return f"{name}={extent} does not split over {over} devices"
    return None
