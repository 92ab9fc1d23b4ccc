"""Compares the arrays of a checkpoint with those that a model needs."""
from mmx.config import ConfigError


def check_shapes(shapes: dict[str, tuple], wanted: dict[str, tuple], where, what: str = "its config.json") -> None:
    """Raises ConfigError if an array is missing, unknown or of the wrong shape.

    Args:
      shapes, wanted: shapes by name, of the checkpoint and of the model.
      where: the checkpoint, for the message.
      what: what needs the arrays, for the message.
    """
    if prefix := _common_prefix(shapes, wanted):
        raise ConfigError(f"{where}: the names of its tensors begin with {prefix!r}, which another program has added: save it "
                          "without this prefix")
    problems = (("lacks", [name for name in wanted if name not in shapes]),
                ("has unknown", sorted(shapes.keys() - wanted.keys())),
                ("has misshapen", [f"{name} {list(shapes[name])} instead of {list(shape)}"
                                   for name, shape in wanted.items() if shapes.get(name, shape) != shape]))
    found = [f"{label} {first_five(names)}" for label, names in problems if names]
    if found:
        raise ConfigError(f"{where} does not contain the tensors of {what}: it {'; it '.join(found)}")


def _common_prefix(names, wanted) -> str:
    """A prefix of all names without which they are the wanted ones, such as "_orig_mod."; "" if there is none."""
    first = next(iter(wanted), "")
    ends = (name for name in names if name.endswith(f".{first}") and first)
    prefixes = (name.removesuffix(first) for name in ends)
    return next((prefix for prefix in prefixes if all(prefix + name in names for name in wanted)), "")


def first_five(names) -> str:
    """The first five names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
