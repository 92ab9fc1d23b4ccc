"""Resources of the kernels of a jitted function on an NVIDIA GPU, from the real compilers; only the CUDA plugin is needed.

XLA compiles for a described GPU (mmx/compilers/*.txtpb) and writes the PTX of each kernel and the launch plan. `ptxas`
assembles the PTX and reports registers and spills; the launch plan has shared memory and grids. jax-triton compiles its
kernels itself, and `read_dump` reads the files it writes. All figures are resources, not times.
"""
import functools
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mmx.chips import CHIPS
from mmx.startup import interrupts

# Compiling does not need CUDA's libraries, but without this the plugin does not load if they are missing.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# From JAX 0.11 on, XLA writes PTX only if this option names its emitters.
DUMP = {"xla_dump_emitter_re": ".*"} if jax.version.__version_info__ >= (0, 11) else {}


class Kernel(NamedTuple):
    """Resources of one kernel; a CTA is a thread block."""
    registers: int          # per thread
    spills: int             # bytes per thread that spills store and load
    shared: int             # bytes of shared memory per CTA
    ctas: int | None        # in the grid; None: not known
    threads: int            # per CTA
    tensor: int             # tensor-core instructions in the PTX (wgmma, mma.sync)
    tf32: bool              # whether an instruction rounds its operands to tf32


def missing() -> str:
    """The reason why `resources` cannot run on this machine; empty if it can."""
    find = importlib.util.find_spec
    if not (find("jax_plugins") and (find("jax_plugins.xla_cuda12") or find("jax_plugins.xla_cuda13"))):
        return "the CUDA plugin is not installed: pip install jax-cuda12-plugin jax-cuda12-pjrt"
    return "" if _ptxas() else "ptxas is not installed: pip install nvidia-cuda-nvcc"


def resources(function, *args, chip: str) -> dict[str, Kernel]:
    """Compiles `function` for `chip`, for args with these shapes and dtypes; returns its kernels by name."""
    return program(function, *args, chip=chip)[0]


def program(function, *args, chip: str) -> tuple[dict[str, Kernel], str]:
    """The same as `resources`, and the optimised HLO text."""
    mesh = _mesh(chip)
    jax.config.update("jax_enable_compilation_cache", False)        # it cannot read programs for devices that are not attached
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), args)
    with tempfile.TemporaryDirectory() as dump, interrupts.removing(dump):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            function = function if hasattr(function, "trace") else jax.jit(function)
            lowered = function.trace(*args).lower(lowering_platforms=("cuda",))
            compiled = lowered.compile(compiler_options=DUMP | {"xla_dump_to": dump, "xla_gpu_autotune_level": 0,
                                                                "xla_backend_optimization_level": 3})
        plan = "".join(Path(p).read_text() for p in glob.glob(f"{dump}/*thunk_sequence.txt"))
        sizes = r"\[(\d+), (\d+), (\d+)\]"
        launches = re.findall(rf"(\S+) grid: {sizes} threads: {sizes}\s+shared_memory: (\d+)", plan)
        assembled = {}
        for path in glob.glob(f"{dump}/*.ptx"):
            assembled |= _assemble(path, CHIPS[chip].gpu.architecture)
    kernels = {}
    for name, *numbers in launches:
        x, y, z, tx, ty, tz, shared = map(int, numbers)
        registers, spills, tensor, tf32 = assembled[name]
        kernels[name] = Kernel(registers, spills, shared, x * y * z, tx * ty * tz, tensor, tf32)
    return kernels, compiled.as_text()


def read_dump(folder, chip: str) -> dict[str, Kernel]:
    """Reads the kernels that jax-triton compiled for `chip` and wrote to `folder` (JAX_TRITON_DUMP_DIR).

    The keys are the kernel's name and its subfolder, separated by a space.
    """
    kernels = {}
    for path in sorted(Path(folder).glob("*/*.ptx")):
        (name, (registers, spills, tensor, tf32)), = _assemble(path, CHIPS[chip].gpu.architecture).items()
        shared = re.search(r"shared_mem_bytes: (\d+)", path.with_suffix(".compile_info").read_text())
        threads = re.search(r"\.(?:max|req)ntid (\d+)", path.read_text())
        kernels[f"{name} {path.parent.name}"] = Kernel(
            registers, spills, int(shared[1]), None, int(threads[1]), tensor, tf32)
    return kernels


def faults(kernels: dict[str, Kernel], chip: str) -> list[str]:
    """One line for each reason why a kernel would be slow, inaccurate or refused at launch."""
    lines = []
    available = limit(chip, "shared_memory_per_block_optin")
    for name, kernel in kernels.items():
        if kernel.spills:
            lines.append(f"{name} spills {kernel.spills} bytes per thread; try a smaller tile or more warps")
        if kernel.shared > available:
            lines.append(f"{name} needs {kernel.shared} bytes of shared memory, and a CTA on {chip} has {available}")
        if kernel.tf32:
            lines.append(f"{name} rounds its operands to tf32; use precision HIGHEST")
    return lines


def limit(chip: str, field: str) -> int:
    """A number from the GPU's description, such as core_count."""
    return int(re.search(rf"\b{field}: (\d+)", target(chip))[1])


def target(chip) -> str:
    """XLA's description of the GPU."""
    return (Path(__file__).parent / f"{CHIPS[chip].gpu.description}.txtpb").read_text()


@functools.cache
def _mesh(chip):
    from jax.experimental.topologies import get_topology_desc
    topology = get_topology_desc(platform="cuda", topology_name=chip, target_config=target(chip), topology="1x1x1")
    return jax.sharding.Mesh(np.array(topology.devices), ("gpu",))


def _ptxas():
    """Path of the newest ptxas of the CUDA wheels, else of the system's ptxas, which may be too old; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [p for root in spec.submodule_search_locations for p in glob.glob(f"{root}/*/bin/ptxas")] if spec else []
    return max(wheels, default=shutil.which("ptxas"))


def _assemble(path, arch):
    """Assembles a PTX file; returns (registers, spill bytes, tensor-core instructions, tf32) of each kernel by name."""
    ptx = Path(path).read_text()
    if ".entry" not in ptx:
        return {}
    output = subprocess.run([_ptxas(), "-v", f"-arch={arch}", path, "-o", "/dev/null"], capture_output=True,
                            text=True, check=True).stderr
    kernels = {}
    for name, body in re.findall(r"\.entry (\w+)(.*?)(?=\.entry|\Z)", ptx, re.DOTALL):
        log = output[output.index(f"Compiling entry function '{name}'"):]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        kernels[name] = (int(re.search(r"Used (\d+) registers", log)[1]), sum(map(int, spills.groups())),
                         len(re.findall(r"wgmma\.mma_async|mma\.sync", body)), "tf32" in body)
    return kernels
