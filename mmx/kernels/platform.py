"""What a computation is traced for: the machine's platform, or that of a mesh of described devices; and what runs there."""
import functools
import re
import warnings

import jax
from jax.sharding import AxisType


def name() -> str:
    """"cpu", "gpu" or "tpu"."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is None:
        return jax.default_backend()
    kind = described.device_kind.lower()
    return "tpu" if "tpu" in kind else "cpu" if "cpu" in kind else "gpu"


def choose(op: str, impl: str | None, names: tuple[str, ...], refusal, array) -> str:
    """The implementation of `op` to run: `impl`, which must be able to; for None the platform's, else XLA, and why is told.

    `refusal`, of a name, says why it cannot run here or on the arrays, `array` among them; it is empty where it can.
    """
    if impl is not None:
        if impl not in names:
            raise NotImplementedError(f"impl={impl!r}: {op} has {', '.join(names)}")
        if reason := refusal(impl):
            raise NotImplementedError(f"impl={impl!r}: {reason}")
        return impl
    if name() not in names or splits_by_itself(array):
        return "xla"
    if reason := refusal(name()):
        _say_once(f"{op} runs as plain XLA: {reason}")
        return "xla"
    return name()


@functools.cache
def _say_once(message):
    warnings.warn(message, stacklevel=4)


def refusal(wanted: str, array) -> str:
    """Why a kernel for the platform `wanted` cannot run in this computation, of which `array` is; empty where it can."""
    if name() != wanted:
        return f"this computation is for {name()}; give impl='xla' or None"
    if splits_by_itself(array):
        return "XLA cannot split a kernel over devices; call it inside shard_map"
    if jax.config.jax_enable_x64:
        return "jax_enable_x64 is on, and the kernels' compilers fail on the int64 indices that it brings"
    return old_gpu() if wanted == "gpu" else ""


def splits_by_itself(array) -> bool:
    """Whether XLA splits this computation over several devices, which it cannot do to a Pallas kernel."""
    meshes = jax.sharding.get_abstract_mesh(), jax.typeof(array).sharding.mesh
    return any(size > 1 and kind != AxisType.Manual for mesh in meshes for size, kind in zip(mesh.axis_sizes, mesh.axis_types))


def old_gpu() -> str:
    """What is said of a GPU here that is older than the kernels need, or of another make; empty where there is none."""
    found = [d.compute_capability for d in jax.devices() if d.platform == "gpu"]
    old = [kind for kind in found if not re.fullmatch(r"\d+\.\d+", kind) or float(kind) < 8]       # AMD's are as gfx90a
    return f"this GPU has compute capability {old[0]}, the kernels need NVIDIA's 8.0 (A100) or newer" if old else ""


def gpu() -> str:
    """The GPU whose tiles serve what is compiled for, a described one or the first here: "h100" or "a100"."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        kind = described.device_kind
    else:
        kind = next((d.device_kind for d in jax.devices() if d.platform == "gpu"), "H100")
    return "h100" if any(name in kind for name in ("H100", "H200", "H800", "GH200")) else "a100"
