"""Dtypes of the kernels' arrays: which inputs are accepted, in which dtype sums are kept, and int32 indices."""
import functools

import jax
import jax.numpy as jnp
import numpy as np


def wide_dtype(*dtypes):
    """The dtype for sums, states and statistics of values of these dtypes: float32, or float64 if one of them is float64."""
    return functools.reduce(jnp.promote_types, dtypes, jnp.float32)


def widen(x):
    """Converts x to float32, or leaves float64 as it is."""
    return x.astype(wide_dtype(x.dtype))


def check_floats(**arrays) -> None:
    """Raises a one-line ValueError if one of the named arrays is not float32, bfloat16 or float64."""
    for name, array in arrays.items():
        if array.dtype.name not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"{name} is {array.dtype}; it must be float32, bfloat16 or float64")


def as_int32(array, name: str):
    """Converts integers of any width to int32.

    Raises:
      ValueError: the array does not contain integers, or contains known values outside int32. Traced values are not checked.
    """
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must contain integers, got {array.dtype}")
    if not isinstance(array, jax.core.Tracer) and not np.can_cast(array.dtype, np.int32):
        low, high, int32 = np.asarray(array).min(), np.asarray(array).max(), np.iinfo(np.int32)
        if low < int32.min or high > int32.max:
            raise ValueError(f"{name} contains values from {low} to {high}; they must fit int32, {int32.min} to {int32.max}")
    return array.astype(jnp.int32)
