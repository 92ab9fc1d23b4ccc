"""What a compiled program does in one run on one device, read from its HLO text: matrix products, kernels, exchanges.

The compiler's own cost analysis counts the body of a loop once. Here everything counts as often as the loops around it
run: GPUs' and CPUs' HLO says so (known_trip_count), for TPUs the bound is read from the loop's condition; a loop whose
length only the run knows is taken to walk through all of the largest array that it slices. Of a conditional the branch with
the most products counts. So the figures are upper bounds where work is skipped.
"""
import functools
import math
import re
from typing import NamedTuple

import numpy as np

SHARE = {       # what a device receives over a group of X, in bytes of its result; of a ragged exchange at most
    "all-gather": lambda X: (X - 1) / X, "all-reduce": lambda X: 2 * (X - 1) / X, "reduce-scatter": lambda X: X - 1,
    "all-to-all": lambda X: (X - 1) / X, "ragged-all-to-all": lambda X: 1, "collective-permute": lambda X: 1,
}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}
KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call")
NO_ESTIMATE = 2 ** 63 - 1       # cycles that the compiler gives for what it cannot tell, such as scatters on SparseCores
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")     # move nothing


class Operation(NamedTuple):
    name: str
    kind: str
    result: str             # its type
    rest: str               # operands and attributes
    times: int              # it runs
    body: str               # the computation it stands in
    scheduled: str          # and that which is scheduled: of what is fused, the fusion's
    at: int                 # the place in there


class Collective(NamedTuple):
    kind: str
    axes: str               # the mesh axes it goes over, joined by +; "slices" for what comes from another slice
    bytes: int              # a device receives in one run
    times: int
    under: bool             # whether matrix products or kernels run between its start and its done
    name: str               # of the operation in the source


class Program(NamedTuple):
    collectives: list[Collective]
    flops: float            # of matrix products, those of kernels by their own estimate
    flops_kernels: float    # their part of it
    cycles_matrix: float    # the compiler's estimate (TPU), of fusions with matrix products in them; kernels have none
    cycles_other: float
    unknown: dict[str, int]     # kernels without an estimate of FLOPs, and how often they run


def analyse(text: str, axes: dict[str, int]) -> Program:
    """`axes`: the mesh the program was compiled for, extents by name, outermost first."""
    bodies, entry = _computations(text)
    works = _works(bodies)
    collectives, unknown, flops, kernels, cycles = [], {}, 0.0, 0.0, {True: 0.0, False: 0.0}
    for op in _walk(bodies, entry):
        kind = op.kind.removesuffix("-start")
        if kind in SHARE:
            collectives.append(_collective(op, kind, axes, bodies[op.scheduled], works))
        elif kind == "recv" and "is_host_transfer=true" in op.rest:        # TPU slices talk through their hosts
            (dtype, shape), *_ = _arrays(op.result)
            collectives.append(Collective(kind, "slices", BYTES[dtype] * math.prod(shape), op.times,
                                          _under(op, bodies[op.scheduled], works), _source(op.rest)))
        products = _flops(op, bodies)
        flops += op.times * products
        if _is_kernel(op.rest):
            if estimate := _estimate(op.rest):
                kernels += op.times * estimate
            else:
                unknown[_stem(op.name)] = unknown.get(_stem(op.name), 0) + op.times
        estimate = None if op.body != op.scheduled else re.search(r'"estimated_cycles":"(\d+)"', op.rest)
        if estimate and int(estimate[1]) < NO_ESTIMATE:
            cycles[works(op.kind, op.rest)] += op.times * int(estimate[1])
    return Program(collectives, flops + kernels, kernels, cycles[True], cycles[False], unknown)


def operations(text: str):
    """(name, times) of the operations that run, those in while loops as often as the loop does."""
    return [(op.name, op.times) for op in _walk(*_computations(text)) if op.body == op.scheduled]


def moved(text: str) -> tuple[int, int]:
    """The bytes that operations read and write, and how many run. Every operand and result counts once, whatever reads it
    how often; one that is sliced, or updated in its place, by its slice."""
    bodies, entry = _computations(text)
    runs = [op for op in _walk(bodies, entry) if op.body == op.scheduled and op.kind not in FREE]
    return sum(op.times * _traffic(op, bodies) for op in runs), sum(op.times for op in runs)


def _traffic(op, bodies) -> int:
    if op.kind == "fusion":
        inside = bodies[_called(op.kind, op.rest)[0]]
    else:       # by itself, on parameters
        inside = [(name, "parameter", result, "") for name, _, result, _ in bodies[op.body] if name in _names(op.rest)]
        inside += [(op.name, op.kind, op.result, op.rest)]
    types = {name: result for name, _, result, _ in inside}

    def read(name):
        total = 0
        for _, kind, result, rest in inside:
            operands = _names(rest)
            if kind == "parameter" or name not in operands:
                continue
            if kind in ("dynamic-slice", "slice"):
                total += _size(result)
            elif kind != "dynamic-update-slice" or operands[0] != name:
                return _size(types[name])
        return total

    def written(name):
        kind, rest = next((kind, rest) for other, kind, _, rest in inside if other == name)
        if kind == "tuple":
            return sum(map(written, _names(rest)))
        return _size(types[_names(rest)[1]] if kind == "dynamic-update-slice" else types[name])
    return sum(read(name) for name, kind, _, _ in inside if kind == "parameter") + written(inside[-1][0])


def _names(rest):
    """Of an operation's operands."""
    return re.findall(r"%([\w.\-<>]+)", rest.partition(")")[0])


def _size(result):
    """Bytes; s8 arrays are the workspace of a library's products."""
    return sum(BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in _arrays(result) if dtype != "s8")


def _computations(text):
    """{name: [(name, kind, result, rest)]} and the entry's name."""
    bodies, current, entry = {}, None, None
    for line in text.split("\n"):
        opened = re.match(r"^(ENTRY )?%?([\w.\-<>]+) (?:\([^\n]*\) -> .*)?\{\s*$", line)
        if opened:
            current = bodies.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        elif current is not None and (found := re.match(r"\s+(?:ROOT )?%?([\w.\-<>]+) = (.*?) ([a-z][\w\-]*)\((.*)", line)):
            current.append((found[1], found[3], found[2], found[4]))
    return bodies, entry


def _walk(bodies, name, times=1, outer=None):
    for at, (op, kind, result, rest) in enumerate(bodies.get(name, ())):
        place = outer or (name, at)
        if kind == "while":
            yield from _walk(bodies, re.search(r"body=%?([\w.\-<>]+)", rest)[1], times * _trips(rest, bodies, name))
            continue
        inline, inside = kind in ("fusion", "async-start"), _called(kind, rest)
        for called in inside if kind != "conditional" else [max(inside, key=lambda branch: _products(branch, bodies))]:
            yield from _walk(bodies, called, times, place if inline or outer else None)
        if kind not in ("call", "conditional", "async-start"):
            yield Operation(op, kind, result, rest, times, name, *place)


def _called(kind, rest):
    if kind == "conditional":
        some = re.search(r"branch_computations=\{(.*?)\}", rest)
        found = some[1] if some else " ".join(re.findall(r"(?:true|false)_computation=(%?[\w.\-<>]+)", rest))
        return re.findall(r"[\w.\-<>]+", found)
    return re.findall(r"(?:to_apply|calls)=%?([\w.\-<>]+)", rest) if kind in ("call", "fusion", "async-start") else ()


def _trips(rest, bodies, outside):
    """Of a loop in the computation `outside`."""
    known = re.search(r'"?known_trip_count"?\D*(\d+)', rest)
    if known:
        return int(known[1])
    # the bound is the largest constant in the loop's condition
    condition = re.search(r"condition=%?([\w.\-<>]+)", rest)[1]
    inside = [op for name in (condition, *(called for _, kind, _, rest in bodies[condition] for called in _called(kind, rest)))
              for op in bodies[name]]
    bounds = [int(rest.partition(")")[0]) for _, kind, result, rest in inside
              if kind == "constant" and re.match(r"[su]32\[\]", result)]
    if not bounds:
        return _slices(re.search(r"body=%?([\w.\-<>]+)", rest)[1], bodies)[1]
    counters = [int(re.search(r"index=(\d+)", rest)[1]) for _, kind, _, rest in bodies[condition]
                if kind == "get-tuple-element"]
    return max(bounds) - (_start(rest, counters[0], bodies[outside]) if len(counters) == 1 else 0)


def _start(rest, at, body) -> int:
    """What a loop's carry begins with at the place `at`: a peeled loop's counter not with 0."""
    made = {name: (kind, rest) for name, kind, _, rest in body}
    kind, rest = made[_names(rest)[0]]
    kind, rest = made[_names(rest)[at]] if kind == "tuple" else (kind, rest)
    while kind in ("copy", "bitcast"):
        kind, rest = made[_names(rest)[0]]
    return int(rest.partition(")")[0]) if kind == "constant" else 0


def _slices(name, bodies) -> tuple[int, int]:
    """The bytes of the largest array that a computation slices, and how many such slices it has along an axis."""
    types, found = {op: result for op, _, result, _ in bodies[name]}, [(0, 1)]
    for _, kind, result, rest in bodies[name]:
        if kind == "dynamic-slice":
            whole = types[_names(rest)[0]]
            extents = zip(_arrays(whole)[0][1], _arrays(result)[0][1])
            found.append((_size(whole), max((-(-size // part) for size, part in extents), default=1)))
        found += [_slices(called, bodies) for called in _called(kind, rest)]
    return max(found)


def _products(name, bodies) -> float:
    return sum(op.times * (_flops(op, bodies) + (_estimate(op.rest) or 0)) for op in _walk(bodies, name))


def _works(bodies):
    """A function (kind, rest) that says whether an operation multiplies matrices, by itself or in what it calls."""
    @functools.cache
    def inside(name):
        return any(works(kind, rest) for _, kind, _, rest in bodies.get(name, ()))

    def works(kind, rest):
        called = re.findall(r"body=%?([\w.\-<>]+)", rest) if kind == "while" else _called(kind, rest)
        return kind in ("dot", "convolution") or _is_kernel(rest) or _is_gemm(rest) or any(map(inside, called))
    return works


def _is_kernel(rest):
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    return bool(target) and target[1] in KERNELS and "ragged-dot-metadata" not in rest


def _estimate(rest) -> int | None:
    """The FLOPs that a kernel states of itself."""
    stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', rest)
    return int(stated[1]) if stated else None


def _is_gemm(rest):
    return '"lhs_contracting_dimensions"' in rest


def _collective(op, kind, axes, body, works):
    groups = _groups(op.rest, math.prod(axes.values()))
    arrays = _arrays(op.result)
    if op.kind.endswith("-start") and kind != "all-reduce":        # (operands, results, ...): one an operand, ragged one in all
        operands = len(_names(op.rest))
        arrays = arrays[operands:operands + 1 if kind.startswith("ragged") else 2 * operands]
    size, share = sum(BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in arrays), SHARE[kind]
    if op.body.startswith("all-reduce-scatter"):        # a TPU's reduce-scatter: a fusion of a sum and the slice that is kept
        kind, share = "reduce-scatter", SHARE["all-gather"]
    return Collective(kind, _axes(groups, axes), int(size * share(len(groups[0]))), op.times, _under(op, body, works),
                      _source(op.rest))


def _under(op, body, works):
    """Whether the schedule has matrix products between the operation and the first that takes its result, a done."""
    worked = False
    for name, kind, _, rest in body[op.at + 1:]:
        if re.search(rf"%{re.escape(body[op.at][0])}(?![.\-\w])", rest.partition(")")[0]):
            return worked and "-done" in name + kind
        worked |= works(kind, rest)
    return False


def _groups(rest, devices) -> np.ndarray:
    """[groups, devices in each], of a permutation the pairs."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", rest)
    if listed:
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if iota:
        return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? \{(.*?)\}", rest)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = (_iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))).reshape(list(sizes.values()))
        over = re.findall(r"'(\w+)'", named[3])
        last = [list(sizes).index(axis) for axis in over]
        return np.moveaxis(ids, last, range(-len(last), 0)).reshape(-1, math.prod(ids.shape[axis] for axis in last))
    return np.arange(devices)[None]


def _iota(text):
    """[2,4]T(1,0): the numbers in order, so shaped and transposed."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(math.prod(map(int, shape.split(",")))).reshape([int(n) for n in shape.split(",")])
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _axes(groups, axes) -> str:
    """Along which axes of the mesh the members of a group differ."""
    places = np.array(np.unravel_index(groups, tuple(axes.values())))       # [axis, group, member]
    varies = (places != places[:, :, :1]).any(axis=(1, 2))
    return "+".join(axis for axis, moves in zip(axes, varies) if moves) or "one device"


def _flops(op, bodies) -> float:
    """Two for each multiplication and addition of a matrix product; padding that is not multiplied does not count."""
    if op.kind == "convolution":
        return _convolution(op.rest, *_operands(op, bodies), _arrays(op.result)[0][1])
    if op.kind == "dot":
        contracted, lhs = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)[1], _operands(op, bodies)[0]
    elif op.kind == "custom-call" and _is_gemm(op.rest):
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.rest)[1].replace('"', "")
        lhs = _operands(op, bodies)[0]
    else:
        return 0.0
    return 2.0 * math.prod(_arrays(op.result)[0][1]) * math.prod(lhs[int(n)] for n in contracted.split(",") if n)


def _operands(op, bodies):
    types = {name: result for name, _, result, _ in bodies[op.body]}
    return [_arrays(types[name])[0][1] for name in re.findall(r"%([\w.\-<>]+)", op.rest.partition(")")[0])[:2]]


def _convolution(rest, lhs, rhs, out) -> float:
    """As TPUs write matrix products: batches are spatial axes, most of whose places are holes or padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    sizes = [dict(zip(label, shape)) for label, shape in zip(labels, (lhs, rhs, out))]
    window = dict(re.findall(r"(\w+)=(\S+?)[ }]", re.search(r"window=(\{.*?\})", rest)[1])) if "window=" in rest else {}
    spatial = sorted(set(labels[0]) - set("bf"))
    parts = {key: value.split("x") for key, value in window.items()}
    pairs = math.prod(_pairs(
        sizes[0][axis], sizes[1][axis], sizes[2][axis], int(parts.get("stride", "1" * len(spatial))[n]),
        int(parts["pad"][n].split("_")[0]) if "pad" in parts else 0, int(parts.get("lhs_dilate", "1" * len(spatial))[n]),
        int(parts.get("rhs_dilate", "1" * len(spatial))[n])) for n, axis in enumerate(spatial))
    groups = int((re.search(r"batch_group_count=(\d+)", rest) or [0, 1])[1])
    return 2.0 * pairs * sizes[1]["i"] * sizes[1]["o"] * sizes[0]["b"] / groups


@functools.cache
def _pairs(size, taps, places, stride, pad, dilation, tap_dilation) -> int:
    """How many pairs of an output's place and a tap of the window meet an element."""
    at = np.arange(places)[:, None] * stride + np.arange(taps) * tap_dilation - pad
    return int(((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)).sum())


def _arrays(result):
    return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)]


def _stem(name):
    return re.sub(r"[.\d]+$", "", name)


def _source(rest):
    """Where in the model: the end of the operation's path."""
    path = re.search(r'op_name="([^"]*)"', rest)
    return path[1] if path else ""
