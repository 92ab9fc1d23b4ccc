"""The one alphabet of dimensions: array names, einsums, parameter axes and sharding rules share it.

    B batch      T query tokens  S key/cache tokens  D model      H query heads   G KV heads   R = H/G
    K key dim    V value dim     F expert hidden     E experts    C slots of an exchange buffer
    N chunks     Q tokens/chunk  L scanned groups or layers       W vocabulary    M token rows (B x T, flattened)
    I tiles      Y, X pixels down and across          Z colours    P positions of a tile, the class token first
    J ViT model  A ViT heads     U ViT hidden        O projector hidden (as wide as D)

Lower-case letters are axes that only one package or file has; its docstring explains them. Layer kinds (`layers.kinds`) are a
separate alphabet. Inside `shard_map` a letter means the local extent.
"""


def check(array, axes: str, name: str, **extents: int) -> None:
    """Raises a one-line ValueError unless `array` has one axis a letter, none empty, with the extents given by letter."""
    if not hasattr(array, "shape"):
        raise ValueError(f"{name} needs an array with axes {axes}, got {type(array).__name__}")
    if array.ndim != len(axes):
        raise ValueError(f"{name} needs {len(axes)} axes {axes}, got shape {tuple(array.shape)}")
    for letter, have in zip(axes, array.shape):
        want = extents.get(letter)
        if want is not None and have != want:
            raise ValueError(f"{name} has {letter}={have} in shape {tuple(array.shape)} ({axes}), needs {letter}={want}")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: shape {tuple(array.shape)} ({axes}); every axis needs 1 at least")


def axes_of(name: str) -> str:
    """The letters of the axes that a parameter's or a cache entry's name ends in: "DHK" of "q_DHK"."""
    return name.rpartition("_")[2]


def is_matrix(name: str) -> bool:
    """Whether a parameter of this name takes part in a matrix product: neither a norm's scale, nor a vector, nor the biases of
    the ViT's heads, which have two axes ("AK")."""
    return not name.startswith("norm") and len(axes_of(name)) > 1 and axes_of(name) != "AK"
