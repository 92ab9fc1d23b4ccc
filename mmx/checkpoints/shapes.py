"""Compares the arrays of a checkpoint with those that a model needs."""
from mmx.config import ConfigError


def check_shapes(shapes: dict[str, tuple], wanted: dict[str, tuple], where, what: str = "its config.json") -> None:
    """Raises ConfigError if an array is missing, unknown or of the wrong shape.

    Args:
      shapes, wanted: shapes by name, of the checkpoint and of the model.
      where: the checkpoint, for the message.
      what: what needs the arrays, for the message.
    """
    problems = (("lacks", [name for name in wanted if name not in shapes]),
                ("has unknown", sorted(shapes.keys() - wanted.keys())),
                ("has misshapen", [f"{name} {list(shapes[name])} instead of {list(shape)}"
                                   for name, shape in wanted.items() if shapes.get(name, shape) != shape]))
    found = [f"{label} {first_five(names)}" for label, names in problems if names]
    if found:
        raise ConfigError(f"{where} does not contain the tensors of {what}: it {'; it '.join(found)}")


def first_five(names) -> str:
    """The first five names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
