"""The one alphabet of dimensions: array names, einsums, parameter axes and sharding rules share it.

    B batch      T query tokens  S key/cache tokens  D model      H query heads   G KV heads   R = H/G
    K key dim    V value dim     F expert hidden     E experts    C expert capacity
    N chunks     Q tokens/chunk  L scanned groups    W vocabulary M token rows (B x T, flattened)

Inside `shard_map` a letter means the local extent.
"""
import jax
import jax.numpy as jnp
import numpy as np


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


def check_floats(**arrays) -> None:
    """Raises a one-line ValueError unless the arrays, by name, are of dtypes that the kernels take."""
    for name, array in arrays.items():
        if array.dtype.name not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"{name} is {array.dtype}; it needs float32, bfloat16 or float64")


def as_int32(array, name: str):
    """The integers as int32, which the kernels count in; ValueError for others, and for known values that it does not hold."""
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} needs integers, got {array.dtype}")
    if not isinstance(array, jax.core.Tracer) and not np.can_cast(array.dtype, np.int32):
        low, high, most = np.min(array), np.max(array), np.iinfo(np.int32)
        if low < most.min or high > most.max:
            raise ValueError(f"{name} holds {low} to {high}; it needs int32, {most.min} to {most.max}")
    return array.astype(jnp.int32)
