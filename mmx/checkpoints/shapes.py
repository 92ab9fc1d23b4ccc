"""Comparison of the arrays that a checkpoint has with those that a model wants."""
from mmx.config import ConfigError


def check_shapes(shapes: dict[str, tuple], wanted: dict[str, tuple], where, what: str = "its config.json") -> None:
    """Raises ConfigError unless no array is missing, none extra, and all have the shape that `what` wants."""
    problems = (("misses", [name for name in wanted if name not in shapes]),
                ("has unknown", sorted(shapes.keys() - wanted.keys())),
                ("has misshapen", [f"{name} {list(shapes[name])} instead of {list(shape)}"
                                   for name, shape in wanted.items() if shapes.get(name, shape) != shape]))
    found = [f"{label} {first_five(names)}" for label, names in problems if names]
    if found:
        raise ConfigError(f"{where} does not hold the tensors of {what}: it {'; it '.join(found)}")


def first_five(names) -> str:
    """Up to five names, and how many more."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
