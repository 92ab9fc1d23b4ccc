"""Weights as int8 with one scale for each output channel: half the bytes of bfloat16.

Weights are quantized while a checkpoint is loaded. The matrices of mixers and experts are quantized. The embedding, the head,
routers, norms and the vision tower keep their dtype; together they are about 1 % of the parameters.
"""
from typing import NamedTuple

import jax
import numpy as np


class Int8(NamedTuple):
    """A quantized matrix, values * scale. `scale` has the axes of `values`, with extent 1 for contracted axes."""
    values: jax.Array
    scale: jax.Array


def contracted_axes(name: str) -> tuple[int, ...]:
    """Returns the axes, counted from the last, over which a product with this matrix sums.

    The letters at the end of a parameter's name are its axes. A matrix that ends in D (the model dim) sums over all other
    axes except E (experts); any other matrix sums over D. The result is empty for parameters that are not quantized.
    """
    kind, _, letters = name.rpartition("_")
    if len(letters) < 2 or kind in ("embed", "head", "router", "norm"):
        return ()
    contracted = letters[:-1].replace("E", "") if letters.endswith("D") else "D"
    return tuple(letters.index(letter) - len(letters) for letter in contracted)


def quantize(w: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes a matrix, or a slice of it that is complete along the contracted `axes`. Returns (values, scale)."""
    w = np.asarray(w, np.float32)
    scale = np.maximum(np.abs(w).max(axis=axes, keepdims=True), 1e-30) / np.float32(127)
    return np.rint(w / scale).astype(np.int8), scale


def dequantize(w, dtype):
    """Returns a parameter, quantized or not, in `dtype`."""
    return w.values.astype(dtype) * w.scale.astype(dtype) if isinstance(w, Int8) else w.astype(dtype)
