"""Which mesh axes shard which array axes: one table for weights and one for activations, by letter (paper section 3.1).

Weights are stored sharded over the tensor axis (etp) and the expert axis (ep) by their letters. They are also sharded over
the mesh axes whose devices have different tokens (FSDP): each of these axes shards the first array axis that it divides.
Weights are gathered where they are used, and their gradients are reduce-scattered. Slices, which a slow network connects, all
store the same weights and sum their gradients.

Activations between layers are sharded by rows over the data axes and by time over the sequence axis (seq) and the tensor axis
(Megatron's sequence parallelism). Inside layers, heads, experts' hidden units and the vocabulary are sharded over the tensor
axis. An array axis that its mesh axes do not divide is not sharded. Letters are defined in `mmx.dims`.
"""
import math

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS, TIME, TENSOR = ("slice", "edp", "ep"), ("seq", "etp"), ("etp",)
FSDP = "edp", "ep", "seq"
WEIGHTS = {"E": ("ep",), "F": TENSOR, "H": TENSOR, "G": TENSOR, "W": TENSOR}
ACTIVATIONS = {
    "B": ROWS, "T": TIME, "H": TENSOR, "G": TENSOR,
    "S": ("seq",),          # time, if gathered over the tensor axis
    "I": ROWS + TIME,       # the tiles of a block of rows are distributed over the devices that share the block's time
}


def active_mesh() -> Mesh | None:
    """Returns the mesh of jax.set_mesh; None without one or with a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def size(mesh, axes) -> int:
    """Returns the number of devices along the mesh axes together."""
    return math.prod(mesh.shape[axis] for axis in axes)


def nontrivial(mesh, axes) -> tuple[str, ...]:
    """Returns the axes that have more than one device."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def is_tensor_sharded(spec: P) -> bool:
    """Whether a weight is sharded over the tensor axis."""
    return any("etp" in names for names in _axes(spec))


def token_axes(mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the mesh axes that shard rows, and those that shard time."""
    return nontrivial(mesh, ROWS), nontrivial(mesh, TIME)


def tokens_are_sharded(B: int, T: int) -> bool:
    """Whether the active mesh shards rows and time. If it does not divide both, neither is sharded (decoding one row, say)."""
    mesh = active_mesh()
    return mesh is not None and B % size(mesh, ROWS) == 0 and T % size(mesh, TIME) == 0


def weight_spec(letters: str, shape, mesh) -> P:
    """Returns the PartitionSpec of a stored weight. `letters` name its last axes; axes before them (layers) are not sharded."""
    extents = shape[len(shape) - len(letters):]
    axes = [names if extent % size(mesh, names) == 0 else ()
            for extent, names in zip(extents, (WEIGHTS.get(letter, ()) for letter in letters))]
    # FSDP shards matrices only: the scale of a norm is too small to be worth an exchange
    for axis in FSDP if set("DJ") & set(letters[:-1] + letters[1:]) else ():
        fits = (n for n, extent in enumerate(extents) if extent % size(mesh, (*axes[n], axis)) == 0)
        if not any(axis in names for names in axes) and (n := next(fits, None)) is not None:
            axes[n] = (*axes[n], axis)
    return _spec([()] * (len(shape) - len(letters)) + axes, shape, mesh)


def activation_spec(letters: str, shape, mesh) -> P:
    """Returns the PartitionSpec of an activation."""
    return _spec([ACTIVATIONS.get(letter, ()) for letter in letters], shape, mesh)


def constrain(x, letters: str):
    """Constrains an activation [B, T or S, ...] to its sharding, if the active mesh shards rows and time."""
    if not tokens_are_sharded(*x.shape[:2]):
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(letters, x.shape, active_mesh()))


def constrain_tiles(x_IPJ):
    """Constrains tiles, or activations of the vision encoder, to their sharding on the active mesh."""
    mesh = active_mesh()
    return x_IPJ if mesh is None else jax.lax.with_sharding_constraint(x_IPJ, activation_spec("IPJ", x_IPJ.shape, mesh))


def replicate(w):
    """Gathers a weight on every device of the active mesh."""
    return w if active_mesh() is None else jax.lax.with_sharding_constraint(w, P())


def without_fsdp(letters: str, spec: P) -> P:
    """Returns a weight's PartitionSpec without the axes that FSDP added."""
    return P(*(tuple(axis for axis in names if axis in WEIGHTS.get(letter, ())) for letter, names in zip(letters, _axes(spec))))


def gather_weight(w, letters: str, spec: P, axes):
    """Gathers a stored weight over FSDP's axes, inside `shard_map`; it stays sharded by its letters.

    `axes` are the mesh axes over which the tokens differ. The weight's gradient is reduce-scattered over the axes that are
    gathered here, and summed over the rest of `axes`.
    """
    shape = list(w.shape)
    # The pcast comes before the gathers: gradients are then summed over the rest of `axes` after they are scattered.
    w = jax.lax.pcast(w, gradient_sum_axes(spec, axes), to="varying")
    # One axis after the other, the nearest devices first: over several axes at once, TPUs gather by a sum of complete arrays,
    # which is twice the bytes. all_gather without `tiled` gives the parts a separate axis, so no part needs padding.
    for at, axis in fsdp_axes(letters, spec):       # 'D/(edp ep) -> D/edp -> D': receives (n - 1) / n of the result
        shape[at] *= jax.lax.axis_size(axis)
        w = jax.lax.all_gather(w, axis, axis=at).reshape(shape)
    return w


def fsdp_axes(letters: str, spec: P) -> list[tuple[int, str]]:
    """Returns (array axis, mesh axis) of each axis that FSDP added to a weight, in the order in which it is gathered."""
    return [(at, axis) for at, names in reversed([*enumerate(_axes(spec))]) for axis in reversed(names)
            if axis not in WEIGHTS.get(letters[at], ())]


def gradient_sum_axes(spec: P, axes) -> tuple[str, ...]:
    """Returns the token axes that do not shard a weight: its gradient is summed over them."""
    return tuple(axis for axis in axes if not any(axis in names for names in _axes(spec)))


def letters_of(path) -> str:
    """Returns the letters that the name of a tree's leaf ends in; "" if the path ends in an index."""
    return getattr(path[-1], "key", "").rpartition("_")[2]


def param_shardings(abstract, mesh: Mesh):
    """Returns the shardings of parameters, or of an optimizer state with the same leaves. Leaf names end in their letters."""
    def leaf(path, x):
        letters = letters_of(path)
        return NamedSharding(mesh, weight_spec(letters, x.shape, mesh) if letters else P())
    return jax.tree_util.tree_map_with_path(leaf, abstract)


def cache_shardings(abstract, mesh: Mesh):
    """Returns the shardings of a cache. Leaf names end in their letters; the axis of the scanned layers comes before these."""
    def leaf(path, x):
        letters = letters_of(path)
        return NamedSharding(mesh, activation_spec("L" * (x.ndim - len(letters)) + letters, x.shape, mesh))
    return jax.tree_util.tree_map_with_path(leaf, abstract)


def weight_sharding(letters: str, shape) -> NamedSharding | None:
    """Returns the sharding of a stored weight on the mesh of jax.set_mesh; None, which is the default device, without one."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else NamedSharding(mesh, weight_spec(letters, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Returns the sharding of a batch's arrays [..., B, T], with `leading` axes before B that are not sharded."""
    return NamedSharding(mesh, P(*[None] * leading, ROWS, TIME))


def tile_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Returns the sharding of arrays [..., blocks of rows, ...], such as tiles, with `leading` axes that are not sharded."""
    return NamedSharding(mesh, P(*[None] * leading, ROWS))


def _axes(spec: P) -> list[tuple[str, ...]]:
    """Returns the mesh axes that shard each array axis."""
    return [(names,) if isinstance(names, str) else names or () for names in spec]


def _spec(axes, shape, mesh) -> P:
    """Returns a PartitionSpec of the nontrivial mesh axes; an array axis that they do not divide is not sharded."""
    parts = []
    for extent, names in zip(shape, axes):
        names = nontrivial(mesh, names)
        if extent % size(mesh, names):
            names = ()
        parts.append(names if len(names) > 1 else names[0] if names else None)
    return P(*parts)
