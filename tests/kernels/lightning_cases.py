"""Test cases of lightning attention, with the results of the recurrence in float64.

The float32 recurrence has errors of up to 8e-6 at 300 tokens: exp(-4e-8) is 1 - 6e-8 in float32, and the error grows with every
token.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmx.kernels.lightning import reference

TOLERANCE = {"float32": 3e-6, "bfloat16": 6e-3}
NAMES = ("o", "state", "dq", "dk", "dv", "dstate")
SLOPES = (1.0, 1e-2, 4e-8, 0.0)


def documents(T):
    """Returns the segments of seven rows, which cover the ways that documents and padding can lie in chunks and spans."""
    t = np.arange(T)
    rows = [1 + t // 16,                                                            # documents begin on chunk edges
            1 + t // 256,                                                           # documents begin on span edges
            1 + np.searchsorted(np.cumsum(t + 1), t, side="right"),                 # documents of 1, 2, 3, ... tokens
            np.where(t < T // 3, 0, 1 + t // 100),                                  # padding on the left
            np.where(t >= T - T // 3, 0, 1),                                        # padding on the right
            (1 + t // 23) * (t % 5 != 2),                                           # padding inside documents and between them
            np.zeros(T)]                                                            # only padding
    return jnp.asarray(np.stack(rows), jnp.int32)


@functools.cache
def case(T, K, V, dtype, segmented, slopes=SLOPES, B=2):
    """Returns (q, k, v, state), (do, dstate), log_decay_H, segments_BT, and the six expected results in the order of NAMES.

    Row 0 starts from a state of zeros.
    """
    B, H = 7 if segmented else B, len(slopes)
    keys = jax.random.split(jax.random.key(T * K + V), 6)
    shapes = [(B, H, T, K), (B, H, T, K), (B, H, T, V), (B, H, K, V), (B, H, T, V), (B, H, K, V)]
    q, k, v, state, do, dstate = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    q, k, v, do = (x.astype(dtype) for x in (q, k, v, do))
    args, cotangents, log_decay_H = (q, k, v, state.at[0].set(0)), (do, dstate), -jnp.asarray(slopes, jnp.float32)
    segments_BT = documents(T) if segmented else None
    with jax.enable_x64(True):
        float64 = jax.tree.map(lambda x: np.asarray(x, np.float64), (args, cotangents, log_decay_H))
        one_document = np.ones((B, T), np.int32)
        want = jax.tree.map(np.asarray, _recurrence(*float64, np.asarray(segments_BT) if segmented else one_document))
    return args, cotangents, log_decay_H, segments_BT, want


@jax.jit
def _recurrence(args, cotangents, log_decay_H, segments_BT):
    out, pull = jax.vjp(lambda q, k, v, s: reference.lightning_attention(q, k, v, log_decay_H, segments_BT, s), *args)
    return out + pull(cotangents)


def errors(got, want):
    """Returns the relative errors of each result by row and head."""
    return {name: np.linalg.norm(np.asarray(x, np.float64) - y, axis=(2, 3)) / np.maximum(np.linalg.norm(y, axis=(2, 3)), 1e-30)
            for name, x, y in zip(NAMES, got, want)}


def assert_close(got, want, dtype):
    for name, error in errors(got, want).items():
        b, h = np.unravel_index(error.argmax(), error.shape)
        assert error.max() <= TOLERANCE[dtype], f"{name}: relative error {error.max():.2e} in row {b}, head {h}"
