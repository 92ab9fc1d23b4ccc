"""What a computation is traced for: the machine's platform, or that of a mesh of described devices."""
import jax
from jax.sharding import AxisType


def name() -> str:
    """"cpu", "gpu" or "tpu"."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is None:
        return jax.default_backend()
    kind = described.device_kind.lower()
    return "tpu" if "tpu" in kind else "cpu" if "cpu" in kind else "gpu"


def splits_by_itself() -> bool:
    """Whether XLA splits this computation over several devices, which it cannot do to a Pallas kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(size > 1 and kind != AxisType.Manual for size, kind in zip(mesh.axis_sizes, mesh.axis_types))


def old_gpu() -> str:
    """What is said of a GPU here that is older than the kernels need; empty where there is none."""
    old = [d.compute_capability for d in jax.devices() if d.platform == "gpu" and float(d.compute_capability) < 8]
    return f"this GPU has compute capability {old[0]}, the kernels need 8.0 (A100) or newer" if old else ""
