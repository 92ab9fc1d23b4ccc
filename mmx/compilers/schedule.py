"""Static cost of a jitted function on a TPU, from libtpu's compiler; no TPU is needed.

libtpu compiles for a described TPU and dumps, for every kernel and fusion, its schedule: a list of bundles (instruction
words). A TensorCore issues one bundle a cycle. The schedule is from the stage before the compiler inserts delays. This module
parses three of the dumped files and the optimised HLO:

    *-pre-delay-per-bundle-utilization.txt      how many slots of each functional unit every bundle uses
    *-packed-bundles-post-ra.txt                the bundles' instructions, from which loops and branches are read
    *-02-original.txt                           the kernel before scheduling, which lists its VMEM allocations

The cycles of a kernel are its bundles, each times the trip counts of the loops around it. Bundles that a branch can skip
count if they contain the kernel's work. The cycles of a program are the sum over its operations, each times the trip
counts of the while loops around it. Waits for memory and launches are not included. The result is a static schedule
estimate, not a measured time, and the time to move the data through HBM is a separate lower bound.

libtpu reads its flags once per process. `cost` therefore starts `python -m mmx.compilers.schedule` as a new process.
"""
import glob
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from mmx.chips import CHIPS
from mmx.compilers import hlo
from mmx.startup import interrupts


class Cost(NamedTuple):
    """Cost of one run on one device. Times are of one TensorCore."""
    us: float               # static schedule estimate, microseconds
    mxu: float              # share of the cycles in which the matrix units multiply
    vmem: int               # bytes of VMEM of the largest kernel
    spills: int             # instructions in the schedules that spill a register
    temporaries: int        # bytes of temporary buffers in HBM
    bytes: int              # read and written by the operations; the body of a loop counts once


def missing() -> str:
    """The reason why `cost` cannot run on this machine; empty if it can."""
    return "" if importlib.util.find_spec("libtpu") else "libtpu, the TPU's compiler, is not installed: pip install libtpu"


def cost(case: str, chip: str) -> Cost:
    """Compiles `case` for `chip` and returns its cost.

    Args:
      case: "module:function:argument:...". The function is called with the arguments, which are strings, and returns the
        function to compile and the shapes of that function's arguments. The function to compile may already be jitted.
      chip: a name in mmx.chips.TPUS.
    """
    with tempfile.TemporaryDirectory() as folder, interrupts.removing(folder):
        dump = Path(folder, "dump")
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
        memory = _run(case, chip, folder, flags)
        tables = glob.glob(f"{dump}/*pre-delay*-per-bundle-utilization.txt")
        kernels = {name: kernel for name, kernel in map(_parse_kernel, tables) if kernel}
        # A Pallas kernel that is called twice is compiled and dumped once, under the name of one of its calls.
        pallas = {name.partition(".")[0]: kernel for name, kernel in kernels.items() if "fusion" not in name}
        found = [(kernels.get(name) or pallas.get(name.partition(".")[0]), times)
                 for name, times in hlo.operations(Path(folder, "hlo").read_text())]
        runs = [(kernel, times) for kernel, times in found if kernel]
    total = lambda field: sum(field(kernel) * times for kernel, times in runs)
    cycles = total(lambda k: k.cycles)
    us = 1e6 / CHIPS[chip].tpu.clock
    return Cost(cycles * us, total(lambda k: k.mxu) / max(cycles, 1),
                max((k.vmem for k, _ in runs), default=0), sum(k.spills for k, _ in runs), *memory)


def memory(case: str, chip: str) -> tuple[int, int]:
    """Cost.temporaries and Cost.bytes only. Skips the dump of the schedule, which takes minutes for large matrix products."""
    with tempfile.TemporaryDirectory() as folder, interrupts.removing(folder):
        return _run(case, chip, folder)


def _run(case, chip, folder, flags=""):
    """Compiles in a new process, which writes its HLO to `folder`; returns Cost.temporaries and Cost.bytes."""
    env = os.environ | {"LIBTPU_INIT_ARGS": flags, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
                        "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "3",
                        "XLA_FLAGS": ""}
    run = subprocess.run([sys.executable, "-m", "mmx.compilers.schedule", case, chip, folder], env=env,
                         capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{case} does not compile for {chip}: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(Path(folder, "memory").read_text())


def compile_case(case: str, chip: str, folder: str):
    """Compiles `case` in this process and writes its memory figures and HLO to `folder`."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    module, function, *arguments = case.split(":")
    function, shapes = getattr(importlib.import_module(module), function)(*arguments)
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].tpu.topology).devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), "x")
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), shapes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function = function if hasattr(function, "lower") else jax.jit(function)
        compiled = function.lower(*shapes).compile()
    Path(folder, "memory").write_text(json.dumps(
        [compiled.memory_analysis().temp_size_in_bytes, int(compiled.cost_analysis()["bytes accessed"])]))
    Path(folder, "hlo").write_text(compiled.as_text())


class _Kernel(NamedTuple):
    cycles: float
    mxu: float              # cycles in which all matrix units would be busy
    vmem: int               # bytes
    spills: int             # spill instructions


ROW = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:LB|LH|LE|PB|PF|CT)? *: *(?:> *)*(\{.*)$")
UNITS = "MATMUL MATPUSH XLU VALU VPOP EUP VLOAD FILL VSTORE SPILL SALU".split()       # the table's columns, in order
SMALL = 6       # bundles: a branch over so few saves nothing
DELAY = 5       # a branch takes effect this many bundles after its own


def _parse_kernel(path: str) -> tuple[str, _Kernel | None]:
    """A kernel's name and cost.

    Args:
      path: the utilization file: four header lines, the third with the number of slots of each unit, then one line for each
        bundle with the slots it uses. The other files of the kernel are next to it.
    """
    base = re.match(r"(.*/\d+-(.+?))-\d+-pre-delay", path)
    texts = [p for p in glob.glob(glob.escape(base[1]) + "-[0-9]*-packed-bundles-post-ra.txt") if "schedule" not in p]
    if not texts:
        return base[2], None
    bundles = []
    for line in Path(max(texts)).read_text(errors="replace").splitlines():
        row = ROW.match(line)
        if row:
            bundles.append(row[1])
        elif bundles:
            bundles[-1] += " " + line
    _, _, capacity, _, *rows = Path(path).read_text().split("\n")
    capacity = dict(zip(UNITS, map(int, capacity.split())))
    used = [dict(zip(UNITS, map(int, row.split()))) for row in rows if row.strip()][:len(bundles)]
    used += [dict.fromkeys(UNITS, 0)] * (len(bundles) - len(used))

    weight = _weights(bundles, used)
    original = "".join(Path(p).read_text(errors="replace") for p in glob.glob(glob.escape(base[1]) + "*-02-original.txt"))
    vmem = dict(re.findall(r"(#allocation\d+) \[[^\n]*?space=vmem, size = (0x[0-9a-f]+)", original))
    return base[2], _Kernel(sum(weight), sum(w * row["MATMUL"] for w, row in zip(weight, used)) / capacity["MATMUL"],
                            sum(int(size, 16) for size in vmem.values()), sum(row["SPILL"] for row in used))


def _weights(bundles, used) -> list[float]:
    """How often each bundle runs."""
    weight = [1.0] * len(bundles)
    loops, skipped = _branches(bundles)
    for begin, end, trips in loops:
        for i in range(begin, end):
            weight[i] *= trips
    for begin, end in skipped:
        works = any(row["MATMUL"] for row in used[begin:end]) or end - begin > 0.3 * len(bundles) or end - begin <= SMALL
        inner = min((loop for loop in loops if loop[0] <= begin and end <= loop[1]), key=lambda l: l[1] - l[0], default=None)
        share = float(works)
        if works and inner and inner[2] > 2 and end - begin > 0.9 * (inner[1] - inner[0] - 1):
            share = (inner[2] - 2) / inner[2]       # two trips of a pipelined loop only fill and drain the pipeline
        for i in range(begin, end):
            weight[i] *= share
    return weight


def _branches(bundles):
    """Loops as (begin, end, trip count), and the ranges (begin, end) of bundles that a forward branch skips."""
    defined = {name: value for text in bundles for name, value in
               re.findall(r"(%[psv]\d+(?:_[psv]\d+)?) = ([^;}]*)", text)}
    grid = re.search(r"iteration_bounds: \(([\d, ]+)\)", "\n".join(bundles))
    steps = 1
    for extent in re.findall(r"\d+", grid[1]) if grid else ():
        steps *= int(extent)
    loops, skipped = [], []
    for i, text in enumerate(bundles):
        for predicate, target in re.findall(r"sbr\.rel (?:\(!?(%\w+)\) )?target bundleno = (\d+)", text):
            target = int(target)
            if target > i:
                if i + DELAY < target:
                    skipped.append((i + DELAY, min(target, len(bundles))))
                continue
            long = i + DELAY - 1 - target > 0.4 * len(bundles)      # the loop over the grid of a Pallas kernel
            trips = _trips(defined, predicate) or (steps + 2 if grid and long else 1)
            loops.append((target, min(len(bundles), i + DELAY), trips))
    return loops, skipped


def _trips(defined, predicate):
    """The trip count of a loop that ends when a counter reaches a constant; None for any other loop."""
    value = defined.get(predicate, "")
    for _ in range(4):
        through = re.match(r"(?:pneg|por|pnand|pmov) (%\w+)", value)
        value = defined.get(through[1], "") if through else value
    compared = re.match(r"scmp\.\w+\.[su]32\.totalorder (\S+), (\S+)", value)
    bound = compared and _constant(defined, compared[2])
    if not bound:
        return None
    start, step = 0, 1
    added = re.match(r"sadd\.s32 (\S+), (\S+)", defined.get(compared[1], ""))
    if added:
        first, second = (_constant(defined, x) for x in added.groups())
        step = first or second or 1
        counter = re.match(r"sphi (\S+), ", defined.get(added[2] if first is not None else added[1], ""))
        start = (counter and _constant(defined, counter[1])) or 0
    step = step - 2 ** 32 if step > 2 ** 31 else step
    return max(1, -(-(bound - start) // step))


def _constant(defined, name, depth=0) -> int | None:
    """The value of a scalar register that is set to a constant, or a literal; else None."""
    name = name.strip().rstrip(",")
    if re.fullmatch(r"-?\d+", name):
        return int(name)
    moved = re.match(r"(?:smov\.u32|scalar_lea\.\w+) (\S+)$", defined.get(name, "").split("/*")[0].strip())
    return _constant(defined, moved[1], depth + 1) if moved and depth < 6 else None


if __name__ == "__main__":
    compile_case(*sys.argv[1:])
