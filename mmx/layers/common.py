"""What all layers share: parameters named by their axes, initial values, RMSNorm, the context of a call."""
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx import config
from mmx.kernels.int8 import dequantize


class Context(NamedTuple):
    """What a layer knows of its tokens besides their values."""
    segments_BT: jax.Array | None       # documents from 1, 0 padding; None: one document, no padding
    positions_BT: jax.Array             # for RoPE
    start_B: jax.Array | None           # tokens already in the cache; None without a cache


def extents(c: config.Model) -> dict[str, int]:
    """The letters' extents in parameters."""
    return {"W": c.vocab, "D": c.dim, "H": c.heads, "G": c.kv_heads, "K": c.head_dim, "V": c.head_dim,
            "E": c.experts, "F": c.expert_dim}


def param(module: nn.Module, name: str, fan_in: str = "", fan_out: str = "", scaled: bool = False):
    """The parameter `name`, whose last part spells its axes, cast to the computation's dtype, cut as it is kept.

    No fan: ones (a norm's scale). Else normal with Xavier's or 1/fan_in variance; `scaled` marks the branch parts
    that DeepNorm scales by beta = (8 layers)^(-1/4) (v, out and the FFN; paper section 4.2).
    """
    c = module.config
    size = extents(c)
    shape = tuple(size[axis] for axis in name.rpartition("_")[2])
    if not fan_in:
        return module.param(name, nn.initializers.ones, shape).astype(c.dtype)
    wide_in, wide_out = (math.prod(size[axis] for axis in fan) for fan in (fan_in, fan_out))
    std = wide_in ** -0.5 if c.init == "fan_in" else (2 / (wide_in + wide_out)) ** 0.5
    if c.init == "deepnorm" and scaled:
        std *= (8 * c.layers) ** -0.25
    return dequantize(module.param(name, nn.initializers.normal(std), shape), c.dtype)


def rms_norm(x_BTD, scale_D, eps: float):
    """x / rms(x) in float32, cast back, then scaled (model.md section 2)."""
    wide_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    rms_BT1 = jax.lax.rsqrt(jnp.mean(wide_BTD ** 2, axis=-1, keepdims=True) + eps)
    return (wide_BTD * rms_BT1).astype(x_BTD.dtype) * scale_D
