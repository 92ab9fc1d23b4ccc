"""Checks of the kernels' arguments beyond their shapes: dtypes, and integers of any width as int32."""
import jax
import jax.numpy as jnp
import numpy as np


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
        low, high, most = np.asarray(array).min(), np.asarray(array).max(), np.iinfo(np.int32)
        if low < most.min or high > most.max:
            raise ValueError(f"{name} holds {low} to {high}; it needs int32, {most.min} to {most.max}")
    return array.astype(jnp.int32)
