"""What the collectives of a compiled function move, read from its HLO."""
import math
import re

SHARE = {       # received by a device, in its result's bytes
    "all-gather": lambda X: (X - 1) / X, "collective-permute": lambda X: 1, "all-reduce": lambda X: 2 * (X - 1) / X,
    "reduce-scatter": lambda X: X - 1, "all-to-all": lambda X: (X - 1) / X,
}
KINDS = "|".join(SHARE)
BYTES = {"f64": 8, "f32": 4, "s32": 4, "bf16": 2, "pred": 1}


def collectives(compiled, axis_size: int) -> list[tuple[str, int, int]]:
    """(kind, bytes that a device receives, how often a call runs it) of every collective."""
    text = compiled.as_text()
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    times = dict.fromkeys(bodies, 1)
    for trips, name in [(int(n), body) for body, n in re.findall(r"body=%?([\w.-]+),.*?known_trip_count\D*(\d+)", text)]:
        times[name] = trips
    found = []
    for name, body in bodies.items():
        for shapes, kind in re.findall(rf"= (.*?) ({KINDS})\(", body):
            size = sum(BYTES[dtype] * math.prod(map(int, filter(None, dims.split(","))))
                       for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes))
            found.append((kind, int(size * SHARE[kind](axis_size)), times[name]))
    return found
