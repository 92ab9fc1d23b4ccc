"""Device meshes whose axes mirror the paper's groups (paper section 3.1): world = edp x ep x etp x seq."""
import dataclasses
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmx import config


def make(sizes: config.Mesh, batch: int) -> Mesh:
    """The mesh of this machine's devices; mesh.edp=-1 takes all of them.

    On CPU devices are simulated: as many as the mesh names, or for -1 as many as there are cores to divide `batch`.
    """
    axes = dataclasses.asdict(sizes)
    for axis in ("ep", "etp", "seq"):
        if axes[axis] != 1:
            raise config.ConfigError(f"mesh.{axis}={axes[axis]}: only edp (data parallel) splits work so far; use 1")
    cores = os.cpu_count() or 1
    fitting = max(n for n in range(1, cores + 1) if batch % n == 0)
    try:
        jax.config.update("jax_num_cpu_devices", fitting if sizes.edp == -1 else sizes.edp)
    except RuntimeError:        # the devices are in use already: take them as they are
        pass
    devices = jax.devices()
    axes["edp"] = len(devices) if sizes.edp == -1 else sizes.edp
    if axes["edp"] > len(devices):
        raise config.ConfigError(f"mesh.edp={axes['edp']}, but {len(devices)} devices are here; -1 takes what is there")
    if batch % axes["edp"]:
        raise config.ConfigError(f"train.batch={batch} does not split over mesh.edp={axes['edp']} devices")
    grid = np.array(devices[:axes["edp"]]).reshape(tuple(axes.values()))
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def rows(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """A batch axis over the data-parallel devices, behind `leading` whole axes."""
    return NamedSharding(mesh, P(*[None] * leading, "edp"))
