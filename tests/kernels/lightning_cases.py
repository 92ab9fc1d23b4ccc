"""The table of cases of lightning attention, and what the recurrence makes of them in float64.

In float64 since the float32 recurrence is itself off by up to 8e-6 at 300 tokens: exp(-4e-8) is 1 - 6e-8 in float32 and the
error grows with every token.
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
    """Segments of seven rows: every way in which documents and padding meet chunks and spans."""
    t = np.arange(T)
    rows = [1 + t // 16,                                                            # on chunk edges
            1 + t // 256,                                                           # on span edges
            1 + np.searchsorted(np.cumsum(t + 1), t, side="right"),                 # 1, 2, 3, ... tokens
            np.where(t < T // 3, 0, 1 + t // 100),                                  # padding at the left
            np.where(t >= T - T // 3, 0, 1),                                        # at the right
            (1 + t // 23) * (t % 5 != 2),                                           # inside documents and between
            np.zeros(T)]                                                            # nothing else
    return jnp.asarray(np.stack(rows), jnp.int32)


@functools.cache
def case(T, K, V, dtype, segmented, slopes=SLOPES, B=2):
    """(q, k, v, state), (do, dstate), log_decay_H, segments_BT, and the recurrence's six answers. Row 0 starts from zeros."""
    B, H = 7 if segmented else B, len(slopes)
    keys = jax.random.split(jax.random.key(T * K + V), 6)
    shapes = [(B, H, T, K), (B, H, T, K), (B, H, T, V), (B, H, K, V), (B, H, T, V), (B, H, K, V)]
    q, k, v, state, do, dstate = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    q, k, v, do = (x.astype(dtype) for x in (q, k, v, do))
    args, cotangents, log_decay_H = (q, k, v, state.at[0].set(0)), (do, dstate), -jnp.asarray(slopes, jnp.float32)
    segments_BT = documents(T) if segmented else None
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (args, cotangents, log_decay_H))
        one = np.ones((B, T), np.int32)
        want = jax.tree.map(np.asarray, _recurrence(*wide, np.asarray(segments_BT) if segmented else one))
    return args, cotangents, log_decay_H, segments_BT, want


@jax.jit
def _recurrence(args, cotangents, log_decay_H, segments_BT):
    out, pull = jax.vjp(lambda q, k, v, s: reference.lightning_attention(q, k, v, log_decay_H, segments_BT, s), *args)
    return out + pull(cotangents)


def errors(got, want):
    """Of each answer, the relative errors by row and head."""
    return {name: np.linalg.norm(np.asarray(x, np.float64) - y, axis=(2, 3)) / np.maximum(np.linalg.norm(y, axis=(2, 3)), 1e-30)
            for name, x, y in zip(NAMES, got, want)}


def assert_close(got, want, dtype):
    for name, error in errors(got, want).items():
        b, h = np.unravel_index(error.argmax(), error.shape)
        assert error.max() <= TOLERANCE[dtype], f"{name}: relative error {error.max():.2e} in row {b}, head {h}"
