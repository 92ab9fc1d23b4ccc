"""What all layers share: the record of a kind, the context of a call, parameters named by their axes, RMSNorm."""
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx import config
from mmx.dims import axes_of
from mmx.kernels.dtypes import widen
from mmx.kernels.int8 import dequantize


class Context(NamedTuple):
    """What a layer knows about its tokens besides their values."""
    segments_BT: jax.Array | None       # document numbers from 1, 0 for padding; None: one document, no padding
    positions_BT: jax.Array             # for RoPE
    start_B: jax.Array | None           # number of tokens in the cache; None without a cache


class Layout(NamedTuple):
    """A tensor of the released checkpoint form."""
    name: str           # below its layer's name; {e} stands for the expert's number
    axes: str           # a space separates the tensor's own axes: "HK D" is a matrix [H * K, D]
    part: int = 0       # number of this array among the `parts` arrays that the first letter interleaves
    parts: int = 1      # qkv_proj interleaves 3: its rows are [q | k | v], head by head


@dataclasses.dataclass(frozen=True)
class Released:
    """A kind's form in released checkpoints (docs/model.md section 6)."""
    code: int                           # in config.json's attn_type_list
    layer_type: str                     # in config.json's layer_types
    tensors: Mapping[str, Layout]       # by the mixer's parameter names


@dataclasses.dataclass(frozen=True)
class Kind:
    """A layer kind; `layers.kinds` explains how a mixer is called."""
    name: str
    mixer: Callable                     # (config.Model, name) -> Flax module
    cache: Callable                     # (config.Model, dtype of keys and values) -> {name: `cache_entry`}
    flops: Callable                     # (config.Model, length) -> a token's forward FLOPs besides products with parameters
    constants: Callable | None = None   # (config.Model, layer number) -> arrays that the mixer gets as `constants`
    residual: str = "softmax"           # model.alpha_* and model.beta_* of this name scale the residual and the mixer's output
    keys: tuple[str, ...] = ()          # keys of model that change the function of layers of this kind and of no other part
    splits_time: bool = False           # whether mesh.seq may split its sequences
    released: Released | None = None    # None: it cannot be converted
    companion_flops: Callable | None = None     # (config.Model, length) -> FLOPs as arXiv 2406.16690 counts; None: not counted


def extents(c: config.Model) -> dict[str, int]:
    """The extent of each letter in the parameters and caches of layers."""
    return {"W": c.vocab, "D": c.dim, "H": c.heads, "G": c.kv_heads, "K": c.head_dim, "V": c.head_dim,
            "E": c.experts, "F": c.expert_dim}


def param(module: nn.Module, name: str, fan_in: str = "", fan_out: str = "", scaled: bool = False):
    """Creates the parameter `name`, whose last part spells its axes, and casts it to the computation's dtype.

    Args:
      fan_in: the axes that a product with it sums; none: a norm's scale, initially ones.
      fan_out: the axes of that product's result. The variance is Xavier's, or 1 / fan_in with model.init="fan_in".
      scaled: whether DeepNorm scales the initial values by (8 layers)^(-1/4) (v, out and the FFN; paper section 4.2).
    """
    c = module.config
    size = extents(c)
    shape = tuple(size[axis] for axis in axes_of(name))
    if not fan_in:
        return module.param(name, nn.initializers.ones, shape).astype(c.dtype)
    fan_in_size, fan_out_size = (math.prod(size[axis] for axis in fan) for fan in (fan_in, fan_out))
    std = fan_in_size ** -0.5 if c.init == "fan_in" else (2 / (fan_in_size + fan_out_size)) ** 0.5
    if c.init == "deepnorm" and scaled:
        std *= (8 * c.layers) ** -0.25
    return dequantize(module.param(name, nn.initializers.normal(std), shape), c.dtype)


def cache_entry(c: config.Model, name: str, dtype) -> jax.ShapeDtypeStruct:
    """What a cache keeps under `name` for one row, and for one token where its axes have S."""
    size = extents(c) | {"B": 1, "S": 1}
    return jax.ShapeDtypeStruct(tuple(size[axis] for axis in axes_of(name)), dtype)


def rms_norm(x_BTD, scale_D, eps: float):
    """x / rms(x) in float32, cast back to x's dtype, then scaled (docs/model.md section 2)."""
    wide_BTD = widen(x_BTD)
    rms_BT1 = jax.lax.rsqrt(jnp.mean(wide_BTD ** 2, axis=-1, keepdims=True) + eps)
    return (wide_BTD * rms_BT1).astype(x_BTD.dtype) * scale_D
