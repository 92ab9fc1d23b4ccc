"""What a jitted function costs on an NVIDIA GPU, asked of the real compiler: no GPU is needed, only the CUDA plugin.

XLA compiles for a described GPU and writes each kernel's PTX; ptxas assembles it and counts registers and spills; the
launch plan has shared memory and grids. jax-triton compiles its kernels itself and writes the same. These are compiled
resources, not times.
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

# Else the plugin does not load where CUDA's libraries are missing, though compiling takes none of them.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


class Kernel(NamedTuple):
    registers: int          # a thread
    spills: int             # bytes stored and loaded, of a thread
    shared: int             # bytes a CTA
    ctas: int | None        # None: not known
    threads: int            # a CTA
    tensor: int             # wgmma or mma.sync instructions in the PTX
    tf32: bool


def missing() -> str:
    """Why `resources` cannot run here; empty where it can."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        return "the CUDA plugin is not installed: pip install jax-cuda12-plugin jax-cuda12-pjrt"
    return "" if _ptxas() else "ptxas is not installed: pip install nvidia-cuda-nvcc"


def resources(function, *args, chip: str) -> dict[str, Kernel]:
    """Compiles `function` for `chip`, on args that have a shape and a dtype; its kernels by name."""
    return program(function, *args, chip=chip)[0]


def program(function, *args, chip: str) -> tuple[dict[str, Kernel], str]:
    """Its kernels, and its HLO."""
    mesh = _mesh(chip)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), args)
    with tempfile.TemporaryDirectory() as dump:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            function = function if hasattr(function, "trace") else jax.jit(function)       # one that donates is jitted
            lowered = function.trace(*args).lower(lowering_platforms=("cuda",))
            compiled = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_gpu_autotune_level": 0,
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


def dumped(folder, chip: str) -> dict[str, Kernel]:
    """The kernels that jax-triton compiled for `chip` and wrote to `folder` (JAX_TRITON_DUMP_DIR), by name and place."""
    kernels = {}
    for path in sorted(Path(folder).glob("*/*.ptx")):
        (name, (registers, spills, tensor, tf32)), = _assemble(path, CHIPS[chip].gpu.architecture).items()
        shared = re.search(r"shared_mem_bytes: (\d+)", path.with_suffix(".compile_info").read_text())
        threads = re.search(r"\.(?:max|req)ntid (\d+)", path.read_text())
        kernels[f"{name} {path.parent.name}"] = Kernel(
            registers, spills, int(shared[1]), None, int(threads[1]), tensor, tf32)
    return kernels


def faults(kernels: dict[str, Kernel], chip: str) -> list[str]:
    """What would make these kernels slow or unfit to launch, one line each."""
    said = []
    most = limit(chip, "shared_memory_per_block_optin")
    for name, kernel in kernels.items():
        if kernel.spills:
            said.append(f"{name} spills {kernel.spills} bytes a thread; a smaller tile or more warps would not")
        if kernel.shared > most:
            said.append(f"{name} needs {kernel.shared} bytes of shared memory, a CTA on {chip} has {most}")
        if kernel.tf32:
            said.append(f"{name} rounds its operands to tf32; precision HIGHEST would not")
    return said


def limit(chip: str, field: str) -> int:
    """A number of the GPU's description, such as core_count."""
    return int(re.search(rf"\b{field}: (\d+)", target(chip))[1])


def target(chip):
    return (Path(__file__).parent / f"{CHIPS[chip].gpu.description}.txtpb").read_text()


@functools.cache
def _mesh(chip):
    from jax.experimental.topologies import get_topology_desc
    topology = get_topology_desc(platform="cuda", topology_name=chip, target_config=target(chip), topology="1x1x1")
    return jax.sharding.Mesh(np.array(topology.devices), ("gpu",))


def _ptxas():
    """The newest there is: a CUDA wheel's, else the system's, which may be older than the PTX."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [p for root in spec.submodule_search_locations for p in glob.glob(f"{root}/*/bin/ptxas")] if spec else []
    return max(wheels, default=shutil.which("ptxas"))


def _assemble(path, arch):
    """(registers, spill bytes, tensor-core instructions, tf32) of each kernel of a PTX file."""
    ptx = Path(path).read_text()
    if ".entry" not in ptx:
        return {}
    said = subprocess.run([_ptxas(), "-v", f"-arch={arch}", path, "-o", "/dev/null"], capture_output=True, text=True,
                          check=True).stderr
    kernels = {}
    for name, body in re.findall(r"\.entry (\w+)(.*?)(?=\.entry|\Z)", ptx, re.DOTALL):
        log = said[said.index(f"Compiling entry function '{name}'"):]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        kernels[name] = (int(re.search(r"Used (\d+) registers", log)[1]), sum(map(int, spills.groups())),
                         len(re.findall(r"wgmma\.mma_async|mma\.sync", body)), "tf32" in body)
    return kernels
