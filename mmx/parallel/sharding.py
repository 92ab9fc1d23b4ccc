"""Which mesh axes cut which dimension: two tables by letter, one for weights and one for activations (paper section 3.1).

Weights are kept cut over the tensor and the expert axis by their letters, and over the axes of other tokens too (FSDP):
each of those cuts the first letter that it divides. They are gathered where they are used, and their gradients go back by
reduce-scatter. Slices, which a slow network joins, all keep the same, and sum their parts of gradients. Activations between
layers are cut by rows over the data axes and by time over the sequence and the tensor axis (Megatron's sequence parallelism),
while heads, experts' hidden parts and the vocabulary are cut over the tensor axis. An axis of an array that its mesh axes do
not divide stays whole.
"""
import math

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS, TIME, TENSOR = ("slice", "edp", "ep"), ("seq", "etp"), ("etp",)
FSDP = "edp", "ep", "seq"
WEIGHTS = {"E": ("ep",), "F": TENSOR, "H": TENSOR, "G": TENSOR, "W": TENSOR}
ACTS = {"B": ROWS, "T": TIME, "S": ("seq",), "H": TENSOR, "G": TENSOR,      # S: time, gathered over the tensor axis
        "I": ROWS + TIME}       # tiles: those of a block of rows are dealt to the devices that have its time


def active_mesh() -> Mesh | None:
    """The mesh that work is split over; None for one device."""
    here = jax.sharding.get_abstract_mesh()
    return None if here.empty or here.size == 1 else here


def size(mesh, axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def nontrivial(mesh, axes) -> tuple[str, ...]:
    """Those of more than one device."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def is_tensor_sharded(kept: P) -> bool:
    """Whether a weight is cut over the tensor axis."""
    return any("etp" in names for names in _axes(kept))


def token_axes(mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that rows and time are cut over."""
    return nontrivial(mesh, ROWS), nontrivial(mesh, TIME)


def tokens_are_sharded(B: int, T: int) -> bool:
    """Whether rows and time are cut over the mesh: all of it or none (a sample's one row is computed everywhere)."""
    here = active_mesh()
    return here is not None and B % size(here, ROWS) == 0 and T % size(here, TIME) == 0


def weight_spec(letters: str, shape, mesh) -> P:
    """How a weight is kept: `letters` name its last axes, and what stands before them (the scanned layers) stays whole."""
    extents = shape[len(shape) - len(letters):]
    axes = [names if extent % size(mesh, names) == 0 else ()
            for extent, names in zip(extents, (WEIGHTS.get(letter, ()) for letter in letters))]
    for axis in FSDP if set("DJ") & set(letters[:-1] + letters[1:]) else ():       # a norm's scale is not worth an exchange
        fits = (n for n, extent in enumerate(extents) if extent % size(mesh, (*axes[n], axis)) == 0)
        if not any(axis in names for names in axes) and (n := next(fits, None)) is not None:
            axes[n] = (*axes[n], axis)
    return _fitting([()] * (len(shape) - len(letters)) + axes, shape, mesh)


def activation_spec(letters: str, shape, mesh) -> P:
    """How an activation is cut."""
    return _fitting([ACTS.get(letter, ()) for letter in letters], shape, mesh)


def constrain(x, letters: str):
    """An activation [B, T or S, ...] cut by the table, where rows and time are cut."""
    if not tokens_are_sharded(*x.shape[:2]):
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(letters, x.shape, active_mesh()))


def constrain_tiles(x_IPJ):
    """Tiles, or what became of them, cut by the table, where they split over the mesh."""
    here = active_mesh()
    return x_IPJ if here is None else jax.lax.with_sharding_constraint(x_IPJ, activation_spec("IPJ", x_IPJ.shape, here))


def replicate(w):
    """A weight whole on every device."""
    return w if active_mesh() is None else jax.lax.with_sharding_constraint(w, P())


def without_fsdp(letters: str, kept: P) -> P:
    """A weight that FSDP's axes do not cut."""
    return P(*(tuple(axis for axis in names if axis in WEIGHTS.get(letter, ())) for letter, names in zip(letters, _axes(kept))))


def gather_weight(w, letters: str, kept: P, axes):
    """Inside `shard_map`, for tokens that differ over all of `axes`: a weight cut by its letters alone, whole over FSDP's
    axes. Its gradient is reduce-scattered over those that it was cut over, and summed over the rest of `axes`.

    One axis after the other, the nearest first: a TPU gathers over all axes at once by a sum, twice the bytes. Parts arrive
    along an axis of their own, so that none has to fill a tile.
    """
    shape = list(w.shape)
    # before it is gathered, so that gradients are summed over the rest of `axes` in parts as small as they are kept in
    w = jax.lax.pcast(w, gradient_sum_axes(kept, axes), to="varying")
    for at, axis in fsdp_axes(letters, kept):        # 'D/(edp ep) -> D/edp -> D': (X - 1) / X of it received
        shape[at] *= jax.lax.axis_size(axis)
        w = jax.lax.all_gather(w, axis, axis=at).reshape(shape)
    return w


def fsdp_axes(letters: str, kept: P) -> list[tuple[int, str]]:
    """FSDP's cuts of a weight, each an array's axis and a mesh axis, in the order in which `gather_weight` gathers them."""
    return [(at, axis) for at, names in reversed([*enumerate(_axes(kept))]) for axis in reversed(names)
            if axis not in WEIGHTS.get(letters[at], ())]


def gradient_sum_axes(kept: P, axes) -> tuple[str, ...]:
    """Those of the tokens' `axes` that do not cut a weight: over them its gradient is summed."""
    return tuple(axis for axis in axes if not any(axis in names for names in _axes(kept)))


def letters_of(path) -> str:
    """The axes that a leaf's name ends in; none where a path ends in no name."""
    return getattr(path[-1], "key", "").rpartition("_")[2]


def param_shardings(abstract, mesh: Mesh):
    """The shardings of parameters, or of an optimizer's state over them: a leaf's name ends in its letters."""
    def leaf(path, x):
        letters = letters_of(path)
        return NamedSharding(mesh, weight_spec(letters, x.shape, mesh) if letters else P())
    return jax.tree_util.tree_map_with_path(leaf, abstract)


def cache_shardings(abstract, mesh: Mesh):
    """The shardings of a cache: a leaf's name ends in its letters, and the scanned layers stand before them."""
    def leaf(path, x):
        letters = letters_of(path)
        return NamedSharding(mesh, activation_spec("L" * (x.ndim - len(letters)) + letters, x.shape, mesh))
    return jax.tree_util.tree_map_with_path(leaf, abstract)


def weight_sharding(letters: str, shape) -> NamedSharding | None:
    """Where a weight is kept on the mesh in use (jax.set_mesh); None, the default, without one."""
    here = jax.sharding.get_mesh()
    return None if here.empty else NamedSharding(here, weight_spec(letters, shape, here))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Of the batch's arrays [B, T], behind `leading` whole axes."""
    return NamedSharding(mesh, P(*[None] * leading, ROWS, TIME))


def tile_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Of what a batch has block by block of its rows, behind `leading` whole axes: its tiles."""
    return NamedSharding(mesh, P(*[None] * leading, ROWS))


def _axes(kept: P) -> list[tuple[str, ...]]:
    """The mesh axes that cut each of an array's."""
    return [(names,) if isinstance(names, str) else names or () for names in kept]


def _fitting(axes, shape, mesh) -> P:
    """P of these mesh axes: those of one device are left out, and all where they do not divide an array's axis."""
    parts = []
    for extent, names in zip(shape, axes):
        names = nontrivial(mesh, names)
        if extent % size(mesh, names):
            names = ()
        parts.append(names if len(names) > 1 else names[0] if names else None)
    return P(*parts)
