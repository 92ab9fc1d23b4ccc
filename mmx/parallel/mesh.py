"""Device meshes whose axes mirror the paper's groups (paper section 3.1): world = edp x ep x etp x seq."""
import dataclasses
import math
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mmx.config import ConfigError, Experiment


def make(e: Experiment) -> Mesh:
    """The mesh of this machine's devices that the experiment names; -1 takes what the other axes leave.

    On CPU devices are simulated: as many as the mesh names, or for -1 as many as there are cores and the model fits.
    """
    sizes = dataclasses.asdict(e.mesh)
    free = next((axis for axis, n in sizes.items() if n == -1), None)
    named = math.prod(n for n in sizes.values() if n != -1)
    # the axes are checked before devices are made, so that a mistake costs no start-up; the free one fits by choice
    _check(e, sizes | {free: 1} if free else sizes)
    counts = range((os.cpu_count() or 1) // named, 1, -1) if free else ()
    fitting = next((n for n in counts if not _misfit(e, sizes | {free: n})), 1)
    try:
        jax.config.update("jax_num_cpu_devices", fitting * named)
    except RuntimeError:        # the devices are in use already: take them as they are
        pass
    devices = jax.devices()
    told = ", ".join(f"mesh.{axis}={n}" for axis, n in sizes.items() if n != 1)
    if free:
        sizes[free] = len(devices) // named
        if sizes[free] * named != len(devices):
            raise ConfigError(f"{told}: the other axes' product {named} does not divide the {len(devices)} devices here")
    _check(e, sizes)
    world = math.prod(sizes.values())
    if world > len(devices):
        raise ConfigError(f"{told or 'the mesh'} needs {world} devices, but {len(devices)} devices are here; -1 on one "
                          "axis takes what is there")
    whole = sizes["etp"] * sizes["seq"]
    if jax.process_count() > 1 and jax.local_device_count() % whole:
        raise ConfigError(f"{told}: a process reads whole rows, so its {jax.local_device_count()} devices must be a multiple "
                          f"of mesh.etp x mesh.seq = {whole}")
    return _placed(devices[:world], sizes)


def described(e: Experiment, devices) -> Mesh:
    """The experiment's mesh over all devices of a pod that is not here; -1 takes what the other axes leave."""
    sizes = dataclasses.asdict(e.mesh)
    named = math.prod(n for n in sizes.values() if n != -1)
    told = ", ".join(f"mesh.{axis}={n}" for axis, n in sizes.items() if n != 1)
    sizes = {axis: n if n != -1 else len(devices) // named for axis, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"{told} does not multiply to the {len(devices)} devices of the pod; -1 on one axis takes "
                          "what is left")
    _check(e, sizes)
    return _placed(devices, sizes)


def _placed(devices, sizes) -> Mesh:
    """In the devices' order, in which each process reads the next rows; the innermost axes, which talk most, are neighbours."""
    return Mesh(np.array(devices).reshape(*sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _check(e, sizes):
    if misfit := _misfit(e, sizes):
        raise ConfigError(misfit)


def _misfit(e: Experiment, sizes) -> str | None:
    """What of the experiment does not split over the mesh axes."""
    parts = [("train.batch", e.train.batch, ("edp", "ep")), ("train.length", e.train.length, ("seq", "etp")),
             ("model.experts", e.model.experts, ("ep",)), ("model.expert_dim", e.model.expert_dim, ("etp",)),
             ("model.heads", e.model.heads, ("etp",))]
    for name, extent, axes in parts:
        devices = math.prod(sizes[axis] for axis in axes)
        if extent % devices:
            over = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
            return f"{name}={extent} does not split over {over} devices"
    return None
