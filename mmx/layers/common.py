"""What all layers share: parameters named by their axes, initial values, RMSNorm, the context of a call."""
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx import config
from mmx.kernels import platform
from mmx.parallel import sharding


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
    """The parameter `name`, whose last part spells its axes, cast to the computation's dtype, gathered for use on a mesh
    (but experts' matrices, which `parallel.expert` gathers).

    No fan: ones (a norm's scale). Else normal with Xavier's or 1/fan_in variance; `scaled` marks the branch parts
    that DeepNorm scales by beta = (8 layers)^(-1/4) (v, out and the FFN; paper section 4.2).
    """
    c = module.config
    size = extents(c)
    letters = name.rpartition("_")[2]
    shape = tuple(size[axis] for axis in letters)
    if not fan_in:
        return sharding.gathered(module.param(name, nn.initializers.ones, shape).astype(c.dtype), letters)
    wide_in, wide_out = (math.prod(size[axis] for axis in fan) for fan in (fan_in, fan_out))
    if c.init == "deepnorm":
        std = (2 / (wide_in + wide_out)) ** 0.5 * ((8 * c.layers) ** -0.25 if scaled else 1)
    else:
        std = wide_in ** -0.5
    w = module.param(name, nn.initializers.normal(std), shape).astype(c.dtype)
    return w if letters in ("EDF", "EFD") else sharding.gathered(w, letters)


def rms_norm(x_BTD, scale_D, eps: float):
    """x / rms(x) in float32, cast back, then scaled (model.md section 2)."""
    wide_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    rms_BT1 = jax.lax.rsqrt(jnp.mean(wide_BTD ** 2, axis=-1, keepdims=True) + eps)
    return (wide_BTD * rms_BT1).astype(x_BTD.dtype) * scale_D


def heads(x_BTD, w_DHK):
    """x W, heads before time."""
    if platform.name() != "cpu":        # the weights are read as they lie, and what follows joins the product's epilogue
        return jnp.einsum("BTD,DHK->BHTK", x_BTD, w_DHK)
    D, H, K = w_DHK.shape               # XLA's CPU dot would copy the weights to transpose them
    x_BTX = jnp.einsum("BTD,DX->BTX", x_BTD, w_DHK.reshape(D, H * K))
    return jnp.einsum("BTHK->BHTK", x_BTX.reshape(*x_BTX.shape[:2], H, K))


def join(x_BHTV, w_HVD):
    """All heads' outputs through W."""
    if platform.name() != "cpu":
        return jnp.einsum("BHTV,HVD->BTD", x_BHTV, w_HVD)
    B, H, T, V = x_BHTV.shape
    x_BTX = jnp.einsum("BHTV->BTHV", x_BHTV).reshape(B, T, H * V)
    return jnp.einsum("BTX,XD->BTD", x_BTX, w_HVD.reshape(H * V, -1))
