"""MiniMax-VL-01's image side: a ViT of each tile (CLIP ViT-L/14-336's geometry) and a projector (model.md section 8).

    x = LayerNorm([class, patches W] + positions)                       a place for each patch, one more for the class token
    x = x + Attention(LayerNorm(x));  x = x + W_down GELU(W_up LayerNorm(x))        biases everywhere, GELU by erf
    W_out GELU(W_in x) of every patch's place                           the class token is left out, no norm at the end

A text's tokens take their places from the patches, and from the row that ends a row of them (`data.images`' places). On a mesh
tiles are cut over all its axes, each device's own (`parallel.sharding`), and a layer's weights are gathered as it runs.
"""
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx import config
from mmx.parallel.sharding import constrain_tiles, replicate


def param(module: nn.Module, name: str, fan_in: str = ""):
    """The parameter `name`, whose last part spells its axes, in the computation's dtype.

    Initially normal with variance 1/fan_in; without a fan the norms' scales are ones, the rest zeros.
    """
    c = module.config
    size = c.vision.extents(c.dim)
    shape, width = (tuple(size[axis] for axis in axes) for axes in (name.rpartition("_")[2], fan_in))
    plain = nn.initializers.ones if name.startswith("norm") else nn.initializers.zeros
    made = module.param(name, nn.initializers.normal(math.prod(width) ** -0.5) if fan_in else plain, shape)
    return replicate(made.astype(c.dtype))


def layer_norm(module: nn.Module, x_IPJ, name: str = ""):
    """(x - mean) / deviation in float32, cast back, then scaled and shifted by the module's parameters."""
    wide_IPJ = x_IPJ.astype(jnp.promote_types(x_IPJ.dtype, jnp.float32))
    off_IPJ = wide_IPJ - jnp.mean(wide_IPJ, axis=-1, keepdims=True)
    u_IPJ = off_IPJ * jax.lax.rsqrt(jnp.mean(off_IPJ ** 2, axis=-1, keepdims=True) + module.config.vision.norm_eps)
    return u_IPJ.astype(x_IPJ.dtype) * param(module, f"norm{name}_J") + param(module, f"shift{name}_J")


class Block(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, x_IPJ, _):
        own = functools.partial(param, self)
        u_IPJ = layer_norm(self, x_IPJ, "_attention")
        q_IPAK, k_IPAK, v_IPAK = (jnp.einsum("IPJ,JAK->IPAK", u_IPJ, own(f"{name}_JAK", "J")) + own(f"{name}_AK")
                                  for name in "qkv")
        o_IPAK = jax.nn.dot_product_attention(q_IPAK, k_IPAK, v_IPAK)
        x_IPJ += jnp.einsum("IPAK,AKJ->IPJ", o_IPAK, own("out_AKJ", "AK")) + own("out_J")
        h_IPU = jnp.einsum("IPJ,JU->IPU", layer_norm(self, x_IPJ, "_mlp"), own("up_JU", "J")) + own("up_U")
        h_IPU = jax.nn.gelu(h_IPU, approximate=False)
        return constrain_tiles(x_IPJ + jnp.einsum("IPU,UJ->IPJ", h_IPU, own("down_UJ", "U")) + own("down_J")), None


class Vision(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, pixels_NIYXZ):
        """newline_D, the row that ends a row of patches, and patches_NMD of each block's tiles: tile by tile, row by row."""
        c, own = self.config, functools.partial(param, self)
        v, blocks, tiles = c.vision, len(pixels_NIYXZ), math.prod(pixels_NIYXZ.shape[:2])
        cut = pixels_NIYXZ.astype(c.dtype).reshape(tiles, v.side, v.patch, v.side, v.patch, 3)
        # R rows, C columns of patches
        patches_IPJ = jnp.einsum("IRYCXZ,YXZJ->IRCJ", cut, own("patch_YXZJ", "YXZ")).reshape(tiles, v.side ** 2, v.dim)
        class_IPJ = jnp.broadcast_to(own("class_J", "J"), (tiles, 1, v.dim))
        x_IPJ = layer_norm(self, jnp.concatenate([class_IPJ, constrain_tiles(patches_IPJ)], axis=1) + own("place_PJ", "J"))
        layers = nn.scan(nn.remat(Block) if c.remat else Block, variable_axes={"params": 0}, split_rngs={"params": True},
                         length=v.layers)
        x_IPJ, _ = layers(c, name="layers")(constrain_tiles(x_IPJ), None)
        h_IPO = jax.nn.gelu(jnp.einsum("IPJ,JO->IPO", x_IPJ[:, 1:], own("in_JO", "J")) + own("in_O"), approximate=False)
        y_IPD = jnp.einsum("IPO,OD->IPD", h_IPO, own("out_OD", "O")) + own("out_D")
        return own("newline_D", "D"), constrain_tiles(y_IPD).reshape(blocks, -1, c.dim)
