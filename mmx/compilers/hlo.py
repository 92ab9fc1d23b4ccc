"""Reads from a compiled program's HLO text what one run does on one device: matrix products, kernels, collectives, bytes.

The input is `compiled.as_text()`: the optimised HLO, a list of computations. Each computation is a list of instructions
"%name = type kind(operands), attributes". Instructions call other computations: fusions, while loops, conditionals.

XLA's own cost analysis counts the body of a loop once. Here an instruction counts once for each time it runs:

- Loops in HLO for GPUs and CPUs state their trip count (known_trip_count).
- For TPUs the trip count is the largest constant in the loop's condition, less the counter's first value.
- If the condition has no constant, the trip count is the number of slices in the largest array that the loop's body slices.
- A conditional counts as its branch with the most matrix FLOPs.

The figures are therefore upper bounds where a run skips work.
"""
import functools
import math
import re
from typing import NamedTuple

import numpy as np

RECEIVED = {    # bytes that a device receives, by bytes of its result, in a group of n devices; an upper bound if ragged
    "all-gather": lambda n: (n - 1) / n, "all-reduce": lambda n: 2 * (n - 1) / n, "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n, "ragged-all-to-all": lambda n: 1, "collective-permute": lambda n: 1,
}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}
KERNELS = (     # targets of custom calls that are Pallas or Triton kernels
    "tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call")
NO_ESTIMATE = 2 ** 63 - 1       # the compiler's number of cycles for operations it cannot estimate, such as SparseCore scatters
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")     # move no bytes


class Operation(NamedTuple):
    """An instruction that runs."""
    name: str
    kind: str
    result: str             # type of the result
    rest: str               # operands and attributes
    times: int              # how often it runs
    body: str               # the computation that contains it
    scheduled: str          # the computation in whose schedule it runs: if it is fused, the one that contains the fusion
    position: int           # in `scheduled`


class Collective(NamedTuple):
    kind: str
    axes: str               # mesh axes it communicates over, joined by +; "slices" for data received from another slice
    bytes: int              # received by a device each time it runs
    times: int              # how often it runs
    overlapped: bool        # whether matrix products or kernels run between its start and its done instruction
    name: str               # op_name: the operation's path in the model's source


class Program(NamedTuple):
    """What one run of a program does on one device."""
    collectives: list[Collective]
    flops: float            # of matrix products; kernels count by the estimate in their cost_estimate
    flops_kernels: float    # the kernels' part of `flops`
    cycles_matrix: float    # TPU: the compiler's estimated cycles of operations with matrix products, kernels excepted
    cycles_other: float     # TPU: of all other operations
    unknown: dict[str, int]     # kernels without a cost_estimate, and how often they run


def analyse(text: str, axes: dict[str, int]) -> Program:
    """Counts a program's matrix FLOPs, kernels, collectives and estimated cycles.

    Args:
      text: optimised HLO.
      axes: sizes of the mesh axes that the program was compiled for, outermost first.
    """
    bodies, entry = _computations(text)
    multiplies = _multiplies(bodies)
    collectives, unknown, flops, kernels, cycles = [], {}, 0.0, 0.0, {True: 0.0, False: 0.0}
    for op in _walk(bodies, entry):
        kind = op.kind.removesuffix("-start")
        if kind in RECEIVED:
            collectives.append(_collective(op, kind, axes, bodies[op.scheduled], multiplies))
        elif kind == "recv" and "is_host_transfer=true" in op.rest:        # between TPU slices
            (dtype, shape), *_ = _arrays(op.result)
            collectives.append(Collective(kind, "slices", BYTES[dtype] * math.prod(shape), op.times,
                                          _is_overlapped(op, bodies[op.scheduled], multiplies), _source(op.rest)))
        products = _flops(op, bodies)
        flops += op.times * products
        if _is_kernel(op.rest):
            if estimate := _kernel_flops(op.rest):
                kernels += op.times * estimate
            else:
                unknown[_stem(op.name)] = unknown.get(_stem(op.name), 0) + op.times
        estimate = None if op.body != op.scheduled else re.search(r'"estimated_cycles":"(\d+)"', op.rest)
        if estimate and int(estimate[1]) < NO_ESTIMATE:
            cycles[multiplies(op.kind, op.rest)] += op.times * int(estimate[1])
    return Program(collectives, flops + kernels, kernels, cycles[True], cycles[False], unknown)


def operations(text: str):
    """(name, how often it runs) of each operation in a schedule: fusions count, the operations inside them do not."""
    return [(op.name, op.times) for op in _walk(*_computations(text)) if op.body == op.scheduled]


def bytes_moved(text: str) -> tuple[int, int]:
    """(bytes that all operations read and write, number of operations that run).

    Each operand and each result of an operation counts once. An array that an operation only slices counts by its slice, and
    so does an array that is updated in place.
    """
    bodies, entry = _computations(text)
    runs = [op for op in _walk(bodies, entry) if op.body == op.scheduled and op.kind not in FREE]
    return sum(op.times * _traffic(op, bodies) for op in runs), sum(op.times for op in runs)


def _traffic(op, bodies) -> int:
    """Bytes that an operation reads and writes."""
    if op.kind == "fusion":
        inside = bodies[_called(op.kind, op.rest)[0]]
    else:       # an operation that is not fused is treated as a fusion of one
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
    """Names of the operands."""
    return re.findall(r"%([\w.\-<>]+)", rest.partition(")")[0])


def _size(result):
    """Bytes of a result; s8 arrays are left out, since they are workspace of cuBLAS."""
    return sum(BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in _arrays(result) if dtype != "s8")


def _computations(text):
    """Parses HLO: {computation: [(name, kind, result, rest) of each instruction]}, and the name of the entry computation."""
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
    """Yields the Operations that run in the computation `name` and in all that it calls.

    `outer` is (computation, position) of the fusion that contains the computation, if any.
    """
    for position, (op, kind, result, rest) in enumerate(bodies.get(name, ())):
        place = outer or (name, position)
        if kind == "while":
            yield from _walk(bodies, re.search(r"body=%?([\w.\-<>]+)", rest)[1], times * _trips(rest, bodies, name))
            continue
        inline, inside = kind in ("fusion", "async-start"), _called(kind, rest)
        for called in inside if kind != "conditional" else [max(inside, key=lambda branch: _products(branch, bodies))]:
            yield from _walk(bodies, called, times, place if inline or outer else None)
        if kind not in ("call", "conditional", "async-start"):
            yield Operation(op, kind, result, rest, times, name, *place)


def _called(kind, rest):
    """Names of the computations that an instruction calls, while loops excepted."""
    if kind == "conditional":
        some = re.search(r"branch_computations=\{(.*?)\}", rest)
        found = some[1] if some else " ".join(re.findall(r"(?:true|false)_computation=(%?[\w.\-<>]+)", rest))
        return re.findall(r"[\w.\-<>]+", found)
    return re.findall(r"(?:to_apply|calls)=%?([\w.\-<>]+)", rest) if kind in ("call", "fusion", "async-start") else ()


def _trips(rest, bodies, outside):
    """Trip count of a while loop in the computation `outside`."""
    known = re.search(r'"?known_trip_count"?\D*(\d+)', rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-<>]+)", rest)[1]
    inside = [op for name in (condition, *(called for _, kind, _, rest in bodies[condition] for called in _called(kind, rest)))
              for op in bodies[name]]
    bounds = [int(rest.partition(")")[0]) for _, kind, result, rest in inside
              if kind == "constant" and re.match(r"[su]32\[\]", result)]
    if not bounds:
        return _slices(re.search(r"body=%?([\w.\-<>]+)", rest)[1], bodies)[1]
    counters = [int(re.search(r"index=(\d+)", rest)[1]) for _, kind, _, rest in bodies[condition]
                if kind == "get-tuple-element"]
    return max(bounds) - (_first_value(rest, counters[0], bodies[outside]) if len(counters) == 1 else 0)


def _first_value(rest, index, body) -> int:
    """First value of element `index` of a loop's carry. The counter of a loop whose first steps were peeled is not 0."""
    made = {name: (kind, rest) for name, kind, _, rest in body}
    kind, rest = made[_names(rest)[0]]
    kind, rest = made[_names(rest)[index]] if kind == "tuple" else (kind, rest)
    while kind in ("copy", "bitcast"):
        kind, rest = made[_names(rest)[0]]
    return int(rest.partition(")")[0]) if kind == "constant" else 0


def _slices(name, bodies) -> tuple[int, int]:
    """(bytes of the largest array that a computation slices, number of such slices in the array)."""
    types, found = {op: result for op, _, result, _ in bodies[name]}, [(0, 1)]
    for _, kind, result, rest in bodies[name]:
        if kind == "dynamic-slice":
            whole = types[_names(rest)[0]]
            extents = zip(_arrays(whole)[0][1], _arrays(result)[0][1])
            found.append((_size(whole), max((-(-size // part) for size, part in extents), default=1)))
        found += [_slices(called, bodies) for called in _called(kind, rest)]
    return max(found)


def _products(name, bodies) -> float:
    """Matrix FLOPs of a computation."""
    return sum(op.times * (_flops(op, bodies) + (_kernel_flops(op.rest) or 0)) for op in _walk(bodies, name))


def _multiplies(bodies):
    """Returns a function of (kind, rest): whether an instruction, or a computation it calls, multiplies matrices."""
    @functools.cache
    def inside(name):
        return any(multiplies(kind, rest) for _, kind, _, rest in bodies.get(name, ()))

    def multiplies(kind, rest):
        called = re.findall(r"body=%?([\w.\-<>]+)", rest) if kind == "while" else _called(kind, rest)
        return kind in ("dot", "convolution") or _is_kernel(rest) or _is_gemm(rest) or any(map(inside, called))
    return multiplies


def _is_kernel(rest):
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    return bool(target) and target[1] in KERNELS and "ragged-dot-metadata" not in rest


def _kernel_flops(rest) -> int | None:
    """The FLOPs in a kernel's cost_estimate; None if it has none."""
    stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', rest)
    return int(stated[1]) if stated else None


def _is_gemm(rest):
    """Whether a custom call is a matrix product of cuBLAS."""
    return '"lhs_contracting_dimensions"' in rest


def _collective(op, kind, axes, body, multiplies):
    groups = _groups(op.rest, math.prod(axes.values()))
    arrays = _arrays(op.result)
    # The result of a start instruction is (operands, results, ...): one result for each operand, but one in all if ragged.
    if op.kind.endswith("-start") and kind != "all-reduce":
        operands = len(_names(op.rest))
        arrays = arrays[operands:operands + 1 if kind.startswith("ragged") else 2 * operands]
    size, received = sum(BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in arrays), RECEIVED[kind]
    if op.body.startswith("all-reduce-scatter"):        # a reduce-scatter on TPUs: a fusion of an all-reduce and a slice
        kind, received = "reduce-scatter", RECEIVED["all-gather"]
    return Collective(kind, _axes(groups, axes), int(size * received(len(groups[0]))), op.times,
                      _is_overlapped(op, body, multiplies), _source(op.rest))


def _is_overlapped(op, body, multiplies) -> bool:
    """Whether matrix products are scheduled between a start instruction and the done instruction that takes its result."""
    between = False
    for name, kind, _, rest in body[op.position + 1:]:
        if re.search(rf"%{re.escape(body[op.position][0])}(?![.\-\w])", rest.partition(")")[0]):
            return between and "-done" in name + kind
        between |= multiplies(kind, rest)
    return False


def _groups(rest, devices) -> np.ndarray:
    """Device numbers [group, member] of a collective; for a permutation the pairs (source, target)."""
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
    """Parses an iota such as [2,4]T(1,0): the numbers from 0 on, reshaped and then transposed."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(math.prod(map(int, shape.split(",")))).reshape([int(n) for n in shape.split(",")])
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _axes(groups, axes) -> str:
    """Names of the mesh axes along which the members of a group differ, joined by +."""
    coordinates = np.array(np.unravel_index(groups, tuple(axes.values())))       # [axis, group, member]
    varies = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    return "+".join(axis for axis, differs in zip(axes, varies) if differs) or "one device"


def _flops(op, bodies) -> float:
    """FLOPs of a matrix product, a multiplication and an addition counting two; 0 for other operations."""
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
    """Shapes of the first two operands."""
    types = {name: result for name, _, result, _ in bodies[op.body]}
    return [_arrays(types[name])[0][1] for name in re.findall(r"%([\w.\-<>]+)", op.rest.partition(")")[0])[:2]]


def _convolution(rest, lhs, rhs, out) -> float:
    """FLOPs of a convolution, which is how TPU programs write matrix products.

    Batch dimensions of the product are spatial axes of the convolution. Only pairs of an output position and a window element
    that meet an input element count: padding and the holes of a dilated input do not.
    """
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
def _pairs(size, window, outputs, stride, pad, dilation, window_dilation) -> int:
    """Number of pairs of an output position and a window element that meet an input element, along one axis."""
    at = np.arange(outputs)[:, None] * stride + np.arange(window) * window_dilation - pad
    return int(((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)).sum())


def _arrays(result):
    """(dtype, shape) of each array in a result's type."""
    return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)]


def _stem(name):
    """An instruction's name without its number."""
    return re.sub(r"[.\d]+$", "", name)


def _source(rest):
    """The op_name that the instruction was traced with; empty if it has none."""
    path = re.search(r'op_name="([^"]*)"', rest)
    return path[1] if path else ""
