"""Dtypes of parameters, and casts that refuse to turn a finite value into infinity."""
import ml_dtypes
import numpy as np

from mmx.config import ConfigError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def find_dtype(name) -> np.dtype | None:
    """The dtype of a name, or of what NumPy and JAX accept as one; None stays None.

    Raises ConfigError for an unsupported dtype.
    """
    name = name if name is None or isinstance(name, str) else np.dtype(name).name
    if name is not None and name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is none of {', '.join(DTYPES)}")
    return DTYPES.get(name)


def cast(array: np.ndarray, dtype, name: str) -> np.ndarray:
    """The array in another dtype. Raises ConfigError, with the tensor's name, if a finite value does not fit into `dtype`.

    Values that are not finite stay as they are.
    """
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):        # reported below
        new = array.astype(dtype)
    most = float(ml_dtypes.finfo(dtype).max)
    if float(ml_dtypes.finfo(array.dtype).max) > most:
        overflowed = np.isinf(new)
        if overflowed.any() and (overflowed := overflowed & np.isfinite(array)).any():
            largest = float(np.abs(array[overflowed].astype(np.float64)).max())
            raise ConfigError(f"tensor {name} contains {largest:.4g}, too large for {dtype.name} (at most {most:.4g}); "
                              "use a dtype with a wider range, such as float32")
    return new
