"""Which mesh axes cut which dimension: two tables by letter, one for weights and one for activations (paper section 3.1).

Weights are kept cut as finely as their letters allow (FSDP: D over every axis that holds other tokens), and gathered
where they are used; their gradients go back by reduce-scatter. Activations between layers are cut by rows over the data
axes and by time over the sequence and the tensor axis (Megatron's sequence parallelism), while heads, experts' hidden
parts and the vocabulary are cut over the tensor axis. An axis of an array that its mesh axes do not divide stays whole.
"""
import functools
import math

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS, TIME, TENSOR = ("edp", "ep"), ("seq", "etp"), ("etp",)
WEIGHTS = {"E": ("ep",), "F": TENSOR, "H": TENSOR, "G": TENSOR, "W": TENSOR, "D": ("edp", "ep", "seq")}
ACTS = {"B": ROWS, "T": TIME, "S": ("seq",), "H": TENSOR, "G": TENSOR}      # S: time, gathered over the tensor axis


def mesh() -> Mesh | None:
    """The mesh that work is split over; None for one device."""
    here = jax.sharding.get_abstract_mesh()
    return None if here.empty or here.size == 1 else here


def size(mesh, axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def present(mesh, axes) -> tuple[str, ...]:
    """Those of more than one device."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def cuts(mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that rows and time are cut over."""
    return present(mesh, ROWS), present(mesh, TIME)


def splits(B: int, T: int) -> bool:
    """Whether rows and time are cut over the mesh: all of it or none (a sample's one row is computed everywhere)."""
    here = mesh()
    return here is not None and B % size(here, ROWS) == 0 and T % size(here, TIME) == 0


def weight(letters: str, shape, mesh) -> P:
    """How a weight is kept: `letters` name its last axes, and what stands before them (the scanned layers) stays whole."""
    if len(letters) == 1:       # a norm's scale: not worth an exchange
        return P()
    taken = {axis for letter in letters.replace("D", "") for axis in WEIGHTS.get(letter, ())}
    axes = [[axis for axis in WEIGHTS.get(letter, ()) if letter != "D" or axis not in taken] for letter in letters]
    return _fitting([()] * (len(shape) - len(letters)) + axes, shape, mesh)


def act(letters: str, shape, mesh) -> P:
    """How an activation is cut."""
    return _fitting([ACTS.get(letter, ()) for letter in letters], shape, mesh)


def constrain(x, letters: str):
    """An activation [B, T or S, ...] cut by the table, where rows and time are cut."""
    return jax.lax.with_sharding_constraint(x, act(letters, x.shape, mesh())) if splits(*x.shape[:2]) else x


def gathered(w, letters: str):
    """A weight for use: all-gathered over the data axes, cut over the tensor axis alone; its gradient is
    reduce-scattered to where the weight is kept."""
    here = mesh()
    if here is None:
        return w
    kept = weight(letters, w.shape, here)
    return _gather(w, kept, P(*(axes if axes == "etp" else None for axes in kept)))


def whole_time(x_BTD):
    """An activation gathered over the tensor axis, for a product with weights that are cut over it."""
    if not splits(*x_BTD.shape[:2]):
        return x_BTD
    return _gather(x_BTD, act("BTD", x_BTD.shape, mesh()), act("BSD", x_BTD.shape, mesh()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, kept, used):
    """A constraint whose transpose is not itself, which would be an all-reduce, but that to what is kept."""
    return jax.lax.with_sharding_constraint(x, used)


_gather.defvjp(lambda x, kept, used: (_gather(x, kept, used), None),
               lambda kept, used, _, dx: (jax.lax.with_sharding_constraint(dx, kept),))


def unsharded(w, letters: str, kept: P, axes):
    """Inside `shard_map` over `axes`: a weight with all of D, for tokens that differ over all of them. The gradient is
    reduce-scattered over the axes that D is cut over, and summed over those that nothing is."""
    at = letters.index("D")
    if kept[at]:
        w = jax.lax.all_gather(w, kept[at], axis=at, tiled=True)
    cut = {axis for part in kept for axis in ((part,) if isinstance(part, str) else part or ())}
    return jax.lax.pcast(w, tuple(axis for axis in axes if axis not in cut), to="varying")


def tree(abstract, mesh: Mesh):
    """The shardings of parameters, or of an optimizer's state over them: a leaf's name ends in its letters."""
    def leaf(path, x):
        letters = getattr(path[-1], "key", "").rpartition("_")[2]
        return NamedSharding(mesh, weight(letters, x.shape, mesh) if letters else P())
    return jax.tree_util.tree_map_with_path(leaf, abstract)


def whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Of the batch's arrays [B, T], behind `leading` whole axes."""
    return NamedSharding(mesh, P(*[None] * leading, ROWS, TIME))


def _fitting(axes, shape, mesh) -> P:
    """P of these mesh axes: those of one device are left out, and all where they do not divide an array's axis."""
    parts = []
    for extent, names in zip(shape, axes):
        names = present(mesh, names)
        if extent % size(mesh, names):
            names = ()
        parts.append(names if len(names) > 1 else names[0] if names else None)
    return P(*parts)
