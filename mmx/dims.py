"""The one alphabet of dimensions: array names, einsums, parameter axes and sharding rules share it.

    B batch      T query tokens  S key/cache tokens  D model      H query heads   G KV heads   R = H/G
    K key dim    V value dim     F expert hidden     E experts    C slots of an exchange buffer
    N chunks     Q tokens/chunk  L scanned groups of layers       W vocabulary    M tokens (B x T, flattened)
    I tiles      Y, X pixels down and across          Z colours    P positions of a tile, the class token first
    J ViT model  A ViT heads     U ViT hidden        O projector hidden (as wide as D)

A group is one repeat of the decoder's layer pattern, or one layer of the ViT. Lower-case letters are explained in the files
that use them. Layer kinds (`layers.kinds`) have their own letters. Inside `shard_map` a letter is a local extent.
"""


def check(array, axes: str, name: str, **extents: int) -> None:
    """Raises ValueError unless `array` has one axis, not empty, for each letter of `axes`, with the sizes in `extents`."""
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
    """The letters that the name of a parameter or of a cache entry ends in: "DHK" for "q_DHK"."""
    return name.rpartition("_")[2]


def is_matrix(name: str) -> bool:
    """Whether a parameter of this name is multiplied in a matrix product.

    False for scales of norms, for vectors, and for q_AK, k_AK and v_AK: these are biases of the ViT, with one row per head.
    """
    return not name.startswith("norm") and len(axes_of(name)) > 1 and axes_of(name) != "AK"
