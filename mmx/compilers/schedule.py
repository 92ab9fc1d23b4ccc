"""What a jitted function costs on a TPU, asked of the real compiler: no TPU is needed, only libtpu.

libtpu compiles for a described TPU and writes, for every kernel and fusion, the bundles of its static schedule (one a
cycle, before delays are put in) and which units each of them uses. A kernel's cycles are its bundles, times the trips
of the loops around them; regions that are jumped over count where they hold the work. A program's are those of its
operations, times the trips of the while loops around them. Not counted: waits for memory, launches. So this is a static
schedule estimate by the TPU compiler and no measured time; memory traffic sets a floor of its own.

libtpu reads its flags once a process: `python -m mmx.compilers.schedule` is the process, and `cost` starts it.
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


class Cost(NamedTuple):
    """Of one run on one device, `cycles` and what follows on one of its cores."""
    us: float               # static schedule estimate
    mxu: float              # share of the cycles in which the matrix units multiply
    vmem: int               # bytes, of the largest kernel
    spills: int             # registers stored for want of them, in the text
    temporaries: int        # bytes in HBM
    bytes: int              # that its operations read and write, those of a loop counted once


def missing() -> str:
    """Why `cost` cannot run here; empty where it can."""
    return "" if importlib.util.find_spec("libtpu") else "libtpu, the TPU's compiler, is not installed: pip install libtpu"


def cost(case: str, chip: str) -> Cost:
    """The cost of `case`, "module:function" with arguments after colons; called, it gives a function (jitted where it
    donates) and its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder, "dump")
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
        memory = _run(case, chip, folder, flags)
        kernels = {name: kernel for name, kernel in map(_kernel, glob.glob(f"{dump}/*pre-delay*-per-bundle-utilization.txt"))
                   if kernel}
        # A Pallas kernel that is called twice is compiled and dumped once, under the name of one of its calls.
        called = {name.partition(".")[0]: kernel for name, kernel in kernels.items() if "fusion" not in name}
        found = [(kernels.get(name) or called.get(name.partition(".")[0]), times)
                 for name, times in hlo.operations(Path(folder, "hlo").read_text())]
        done = [(kernel, times) for kernel, times in found if kernel]
    total = lambda what: sum(what(kernel) * times for kernel, times in done)
    cycles = total(lambda k: k.cycles)
    us = 1e6 / CHIPS[chip].tpu.clock
    return Cost(cycles * us, total(lambda k: k.mxu) / max(cycles, 1),
                max((k.vmem for k, _ in done), default=0), sum(k.spills for k, _ in done), *memory)


def memory(case: str, chip: str) -> tuple[int, int]:
    """The last two of `cost` alone; without the schedule, which takes minutes to write for large products."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(case, chip, folder)


def _run(case, chip, folder, flags=""):
    """Compiles in a process of its own; returns bytes of temporaries, and bytes moved."""
    env = os.environ | {"LIBTPU_INIT_ARGS": flags, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
                        "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": ""}
    run = subprocess.run([sys.executable, "-m", "mmx.compilers.schedule", case, chip, folder], env=env,
                         capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{case} does not compile for {chip}: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(Path(folder, "memory").read_text())


def _compile(case: str, chip: str, folder: str):
    import jax
    import numpy as np
    from jax.experimental import topologies

    module, function, *arguments = case.split(":")
    function, shapes = getattr(importlib.import_module(module), function)(*arguments)
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].tpu.topology).devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), "x")
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function = function if hasattr(function, "lower") else jax.jit(function)       # one that donates is jitted
        compiled = function.lower(*shapes).compile()
    Path(folder, "memory").write_text(json.dumps(
        [compiled.memory_analysis().temp_size_in_bytes, int(compiled.cost_analysis()["bytes accessed"])]))
    Path(folder, "hlo").write_text(compiled.as_text())


class _Kernel(NamedTuple):
    cycles: float
    mxu: float              # cycles' worth of multiplying
    vmem: int
    spills: int


ROW = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:LB|LH|LE|PB|PF|CT)? *: *(?:> *)*(\{.*)$")
UNITS = "MATMUL MATPUSH XLU VALU VPOP EUP VLOAD FILL VSTORE SPILL SALU".split()       # the table's columns, in order
SMALL = 6       # bundles: a jump over so few saves nothing


def _kernel(path: str):
    """A kernel's name and cost, from its table of units a bundle and the text of its bundles."""
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

    weight = [1.0] * len(bundles)
    loops, jumps = _branches(bundles)
    for begin, end, trips in loops:
        for i in range(begin, end):
            weight[i] *= trips
    for begin, end in jumps:
        works = any(row["MATMUL"] for row in used[begin:end]) or end - begin > 0.3 * len(bundles) or end - begin <= SMALL
        around = min((loop for loop in loops if loop[0] <= begin and end <= loop[1]), key=lambda l: l[1] - l[0], default=None)
        share = float(works)
        if works and around and around[2] > 2 and end - begin > 0.9 * (around[1] - around[0] - 1):
            share = (around[2] - 2) / around[2]         # a pipelined loop fills and drains: two trips do no work
        for i in range(begin, end):
            weight[i] *= share
    original = "".join(Path(p).read_text(errors="replace") for p in glob.glob(glob.escape(base[1]) + "*-02-original.txt"))
    vmem = dict(re.findall(r"(#allocation\d+) \[[^\n]*?space=vmem, size = (0x[0-9a-f]+)", original))
    return base[2], _Kernel(sum(weight), sum(w * row["MATMUL"] for w, row in zip(weight, used)) / capacity["MATMUL"],
                            sum(int(size, 16) for size in vmem.values()), sum(row["SPILL"] for row in used))


def _branches(bundles):
    """Loops as (begin, end, trips), and the stretches of bundles that a forward branch jumps over."""
    defined = {name: value for text in bundles for name, value in
               re.findall(r"(%[psv]\d+(?:_[psv]\d+)?) = ([^;}]*)", text)}
    grid = re.search(r"iteration_bounds: \(([\d, ]+)\)", "\n".join(bundles))
    steps = 1
    for extent in re.findall(r"\d+", grid[1]) if grid else ():
        steps *= int(extent)
    loops, jumps = [], []
    for i, text in enumerate(bundles):
        for predicate, target in re.findall(r"sbr\.rel (?:\(!?(%\w+)\) )?target bundleno = (\d+)", text):
            target = int(target)
            if target > i:
                if i + 5 < target:
                    jumps.append((i + 5, min(target, len(bundles))))
                continue
            long = i + 4 - target > 0.4 * len(bundles)
            trips = _trips(defined, predicate) or (steps + 2 if grid and long else 1)
            loops.append((target, min(len(bundles), i + 5), trips))
    return loops, jumps


def _trips(defined, predicate):
    """A loop's trips, where its end compares a counter with a constant; else None."""
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


def _constant(defined, name, depth=0):
    name = name.strip().rstrip(",")
    if re.fullmatch(r"-?\d+", name):
        return int(name)
    moved = re.match(r"(?:smov\.u32|scalar_lea\.\w+) (\S+)$", defined.get(name, "").split("/*")[0].strip())
    return _constant(defined, moved[1], depth + 1) if moved and depth < 6 else None


if __name__ == "__main__":
    _compile(*sys.argv[1:])
