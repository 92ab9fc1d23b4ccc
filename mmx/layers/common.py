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
    """How a released checkpoint stores one parameter."""
    name: str           # of the tensor, without its layer's prefix ("model.layers.0."); {e} is replaced by the expert's number
    axes: str           # the stored parameter's axes, separated by spaces: "HK D" is a matrix [H * K, D]
    # A tensor may contain several parameters, interleaved along the first letter of their axes: the rows of qkv_proj (parts=3,
    # each "HK D") are q of head 0, k of head 0, v of head 0, q of head 1, and so on.
    part: int = 0       # index of this parameter in the tensor
    parts: int = 1      # number of parameters in the tensor


@dataclasses.dataclass(frozen=True)
class Released:
    """How released checkpoints store a kind (docs/model.md section 6)."""
    code: int                           # in config.json's attn_type_list
    layer_type: str                     # in config.json's layer_types
    tensors: Mapping[str, Layout]       # by the mixer's parameter names


@dataclasses.dataclass(frozen=True)
class Kind:
    """A layer kind; `layers.kinds` explains how the mixer's module is called."""
    name: str
    mixer: Callable                     # (config.Model, name) -> Flax module
    cache: Callable                     # (config.Model, dtype of keys and values) -> {name: `cache_entry`}
    flops: Callable                     # (config.Model, length) -> forward FLOPs per token, without the mixer's projections
    constants: Callable | None = None   # (config.Model, layer number) -> arrays that the mixer gets as `constants`
    factor_suffix: str = "softmax"      # suffix of the keys model.alpha_* and model.beta_* that `model.Layer` uses
    config_keys: tuple[str, ...] = ()   # keys model.* that affect only the kinds that list them
    splits_time: bool = False           # whether mesh.seq may split its sequences
    released: Released | None = None    # None: layers of this kind cannot be converted
    # (config.Model, length) -> training FLOPs per token, counted as in Table 1 of arXiv 2501.08313 and in its companion paper,
    # arXiv 2406.16690, without the q, k, v and output projections; `analysis.counts.flops_companion` adds the rest. None: no
    # such count.
    paper_flops: Callable | None = None


def extents(c: config.Model) -> dict[str, int]:
    """The size of each axis letter in the parameters and caches of layers."""
    return {"W": c.vocab, "D": c.dim, "H": c.heads, "G": c.kv_heads, "K": c.head_dim, "V": c.head_dim,
            "E": c.experts, "F": c.expert_dim}


def param(module: nn.Module, name: str, fan_in: str = "", fan_out: str = "", scaled: bool = False):
    """Creates the parameter `name`, whose last part spells its axes, and casts it to the computation's dtype.

    Args:
      fan_in: letters of the input axes, over which a matrix product sums. Empty: the parameter is the scale of a norm, and
        starts at one.
      fan_out: letters of the output axes. With n_in and n_out the products of the axes' sizes, the initial variance is
        2 / (n_in + n_out) (Xavier), or 1 / n_in with model.init="fan_in".
      scaled: whether model.init="deepnorm" multiplies the initial values by (8 layers)^(-1/4). It does so for v, out and the
        experts' weights (paper section 4.2).
    """
    c = module.config
    size = extents(c)
    shape = tuple(size[axis] for axis in axes_of(name))
    if not fan_in:
        return module.param(name, nn.initializers.ones, shape).astype(c.dtype)
    n_in, n_out = (math.prod(size[axis] for axis in fan) for fan in (fan_in, fan_out))
    std = n_in ** -0.5 if c.init == "fan_in" else (2 / (n_in + n_out)) ** 0.5
    if c.init == "deepnorm" and scaled:
        std *= (8 * c.layers) ** -0.25
    # A new parameter is a float array. A parameter that the caller passes to `apply` may be an `int8.Int8`.
    return dequantize(module.param(name, nn.initializers.normal(std), shape), c.dtype)


def cache_entry(c: config.Model, name: str, dtype) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the entry `name` of a cache, for one row and, if the name has an axis S, for one token."""
    size = extents(c) | {"B": 1, "S": 1}
    return jax.ShapeDtypeStruct(tuple(size[axis] for axis in axes_of(name)), dtype)


def rms_norm(x_BTD, scale_D, eps: float):
    """Returns x / rms(x), computed in float32 and cast back to x's dtype, then scaled (docs/model.md section 2)."""
    wide_BTD = widen(x_BTD)
    inverse_rms_BT1 = jax.lax.rsqrt(jnp.mean(wide_BTD ** 2, axis=-1, keepdims=True) + eps)
    return (wide_BTD * inverse_rms_BT1).astype(x_BTD.dtype) * scale_D
