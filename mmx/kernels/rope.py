"""Rotary position embedding (arXiv:2104.09864) of the first rotary_dim dims of a head; the others are unchanged.

With half = rotary_dim / 2, dims i and i + half (i < half) are rotated together by the angle position * theta^(-i / half):

    y_i = x_i cos - x_(i+half) sin        y_(i+half) = x_(i+half) cos + x_i sin

Angles are computed in 32-bit integers, as fractions of a full turn: integer products then wrap around exactly as angles do.
The position is split into low and high bits so that both products keep their precision. The angle is accurate to 4e-6 up to
4M tokens. The product of position and frequency in float32 would be wrong by 0.1.
"""
import math

import jax.numpy as jnp
import numpy as np

LOW_BITS = 12       # bits of the low part of a position


def rope(x_BHTK, positions_BT, *, rotary_dim: int, theta: float):
    """Rotates x by the positions of its tokens.

    Args:
      x_BHTK: queries or keys.
      positions_BT: integers.
      rotary_dim: number of leading dims of a head to rotate; even.
      theta: base of the frequencies.
    Returns:
      The rotated array in x's dtype. Cosines, sines and products are float32.
    Raises:
      ValueError: rotary_dim is odd, or not between 0 and K.
    """
    if rotary_dim % 2 or not 0 <= rotary_dim <= x_BHTK.shape[3]:
        raise ValueError(f"rotary_dim={rotary_dim} must be even and between 0 and K={x_BHTK.shape[3]}")
    half = rotary_dim // 2
    angle_BTK = _angles(positions_BT, half, theta)
    cos_B1TK, sin_B1TK = jnp.cos(angle_BTK)[:, None], jnp.sin(angle_BTK)[:, None]
    low_BHTK, high_BHTK, rest_BHTK = jnp.split(x_BHTK, [half, rotary_dim], axis=-1)
    rotated = low_BHTK * cos_B1TK - high_BHTK * sin_B1TK, high_BHTK * cos_B1TK + low_BHTK * sin_B1TK
    return jnp.concatenate([*(y.astype(x_BHTK.dtype) for y in rotated), rest_BHTK], axis=-1)


def _angles(positions_BT, half: int, theta: float):
    """Returns position * theta^(-i / half) for i < half, modulo 2 pi: float32 between -pi and pi."""
    turns_K = theta ** (-np.arange(half) / half) / (2 * math.pi)
    low_K, high_K = (jnp.asarray((np.round(np.ldexp(turns, 32) % 2.0 ** 32) % 2.0 ** 32).astype(np.uint32))
                     for turns in (turns_K, np.ldexp(turns_K, LOW_BITS)))
    low_BT1, high_BT1 = positions_BT[..., None] & (2 ** LOW_BITS - 1), positions_BT[..., None] >> LOW_BITS
    turn_BTK = low_BT1.astype(jnp.uint32) * low_K + high_BT1.astype(jnp.uint32) * high_K
    return turn_BTK.view(jnp.int32).astype(jnp.float32) * (math.pi / 2 ** 31)
