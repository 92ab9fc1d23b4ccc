"""The platform that a computation is traced for, and the implementation that runs there.

A mesh can consist of described devices: TPUs or GPUs that are not present, for compilation only (mmx.compilers). The platform
is that of the current mesh if its devices are described, and otherwise that of this machine.
"""
import functools
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import AxisType


class Gpu(NamedTuple):
    """What the kernels need to know of a GPU model."""
    multiprocessors: int    # streaming multiprocessors
    capability: int         # compute capability, times 10


GPUS = {"h100": Gpu(132, 90), "a100": Gpu(108, 80)}       # see `gpu_model` for other models


def name() -> str:
    """Returns "cpu", "gpu" or "tpu"."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is None:
        return jax.default_backend()
    kind = described.device_kind.lower()
    return "tpu" if "tpu" in kind else "cpu" if "cpu" in kind else "gpu"


def gpu_model() -> str:
    """Returns the key of `GPUS` for the described GPU, otherwise for the first GPU present, otherwise "h100"."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        kind = described.device_kind
    else:
        kind = next((d.device_kind for d in jax.devices() if d.platform == "gpu"), "H100")
    return "h100" if any(name in kind for name in ("H100", "H200", "H800", "GH200")) else "a100"


def choose(op: str, impl: str | None, names: tuple[str, ...], refusal: Callable[[str], str], array) -> str:
    """Chooses the implementation of an operation.

    Args:
      op: the operation, for messages.
      impl: the caller's choice. None: the kernel of the platform if it supports the arrays, otherwise XLA; a warning gives
        the reason once.
      names: all implementations.
      refusal: returns why the named implementation cannot run here or on these arrays; an empty string if it can.
      array: one of the arrays. Its sharding shows whether XLA partitions the computation.
    Raises:
      NotImplementedError: the caller's choice does not exist or cannot run.
    """
    if impl is not None:
        if impl not in names:
            raise NotImplementedError(f"impl={impl!r} does not exist; {op} has {', '.join(names)}")
        if reason := refusal(impl):
            raise NotImplementedError(f"impl={impl!r}: {reason}")
        return impl
    if name() not in names or is_partitioned_by_xla(array):
        return "xla"
    if reason := refusal(name()):
        _warn_once(f"{op} runs as plain XLA: {reason}")
        return "xla"
    return name()


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=4)


def device_refusal(platform: str, array) -> str:
    """Returns why kernels for `platform` cannot run in the computation that `array` belongs to; empty if they can."""
    if name() != platform:
        return f"this computation is for {name()}; use impl='xla' or None"
    if is_partitioned_by_xla(array):
        return "XLA cannot partition a kernel over devices; call it inside shard_map"
    if jax.config.jax_enable_x64:
        return "jax_enable_x64 is on, and the kernels' compilers do not support the int64 indices that it creates"
    return gpu_refusal() if platform == "gpu" else ""


def is_partitioned_by_xla(array) -> bool:
    """Returns whether XLA partitions this computation over several devices."""
    meshes = jax.sharding.get_abstract_mesh(), jax.typeof(array).sharding.mesh
    return any(size > 1 and kind != AxisType.Manual for mesh in meshes for size, kind in zip(mesh.axis_sizes, mesh.axis_types))


def gpu_refusal() -> str:
    """Returns why a GPU of this machine cannot run the kernels; empty if all can."""
    capabilities = [d.compute_capability for d in jax.devices() if d.platform == "gpu"]
    # AMD reports a name such as gfx90a.
    unsupported = [c for c in capabilities if not re.fullmatch(r"\d+\.\d+", c) or float(c) < 8]
    return (f"this GPU has compute capability {unsupported[0]}; the kernels need an NVIDIA GPU with 8.0 (A100) or newer"
            if unsupported else "")
