"""Rotary position embedding (arXiv:2104.09864) of the first rotary_dim dims of a head; the others pass through.

With half = rotary_dim / 2, dims i and i + half (i < half) turn together by the angle position * theta^(-i / half):

    y_i = x_i cos - x_(i+half) sin        y_(i+half) = x_(i+half) cos + x_i sin

The angle is a fraction of a turn in 32 bits, whose integer products wrap around as turns do, with the position split in
two so that both parts are small. It is exact to 4e-6 up to 4M tokens; position times frequency in float32 is 0.1 off.
"""
import math

import jax.numpy as jnp
import numpy as np

LOW_BITS = 12       # of a position


def rope(x_BHTK, positions_BT, *, rotary_dim: int, theta: float):
    """x turned to the positions (ints) of its tokens, in x's dtype; cos, sin and products are float32."""
    if rotary_dim % 2 or not 0 <= rotary_dim <= x_BHTK.shape[3]:
        raise ValueError(f"rotary_dim={rotary_dim} must be even and at most K={x_BHTK.shape[3]}")
    half = rotary_dim // 2
    angle_BTK = _angles(positions_BT, half, theta)
    cos_B1TK, sin_B1TK = jnp.cos(angle_BTK)[:, None], jnp.sin(angle_BTK)[:, None]
    low_BHTK, high_BHTK, rest_BHTK = jnp.split(x_BHTK, [half, rotary_dim], axis=-1)
    turned = low_BHTK * cos_B1TK - high_BHTK * sin_B1TK, high_BHTK * cos_B1TK + low_BHTK * sin_B1TK
    return jnp.concatenate([*(y.astype(x_BHTK.dtype) for y in turned), rest_BHTK], axis=-1)


def _angles(positions_BT, half: int, theta: float):
    """position * theta^(-i / half) for i < half, less whole turns: between -pi and pi, float32."""
    turns_K = theta ** (-np.arange(half) / half) / (2 * math.pi)
    low_K, high_K = (jnp.asarray((np.round(np.ldexp(turns, 32) % 2.0 ** 32) % 2.0 ** 32).astype(np.uint32))
                     for turns in (turns_K, np.ldexp(turns_K, LOW_BITS)))
    low_BT1, high_BT1 = positions_BT[..., None] & (2 ** LOW_BITS - 1), positions_BT[..., None] >> LOW_BITS
    turned_BTK = low_BT1.astype(jnp.uint32) * low_K + high_BT1.astype(jnp.uint32) * high_K
    return turned_BTK.view(jnp.int32).astype(jnp.float32) * (math.pi / 2 ** 31)
