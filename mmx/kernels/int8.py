"""Weights as int8 with a scale for each output channel: half of bfloat16's bytes, made while a checkpoint is loaded.

Mixers' and experts' matrices are kept so; the embedding, the head, routers, norms and all of vision, a hundredth of the whole,
stay as they are.
"""
from typing import NamedTuple

import jax
import numpy as np


class Int8(NamedTuple):
    """w = whole * scale. `scale` has the axes of `whole`, of extent 1 where a product with w sums."""
    whole: jax.Array
    scale: jax.Array


def summed(name: str) -> tuple[int, ...]:
    """The axes, counted from the last, over which a product with this matrix sums; none for what is kept as it is.

    Names end in their axes: what gives D sums over all others but E, the rest sums over D.
    """
    kind, _, letters = name.rpartition("_")
    if len(letters) < 2 or kind in ("embed", "head", "router", "norm"):
        return ()
    over = letters[:-1].replace("E", "") if letters.endswith("D") else "D"
    return tuple(letters.index(letter) - len(letters) for letter in over)


def quantised(w: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(whole, scale) of a matrix or a slice of it that has all of these axes."""
    w = np.asarray(w, np.float32)
    scale = np.maximum(np.abs(w).max(axis=axes, keepdims=True), 1e-30) / np.float32(127)
    return np.rint(w / scale).astype(np.int8), scale


def floats(w, dtype):
    """A parameter in the computation's dtype."""
    return w.whole.astype(dtype) * w.scale.astype(dtype) if isinstance(w, Int8) else w.astype(dtype)
