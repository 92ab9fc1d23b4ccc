"""MiniMax-VL-01's vision encoder: a ViT of each tile (as CLIP ViT-L/14-336) and a projector (docs/model.md section 8).

    x = LayerNorm([class, patches W] + positions)       one position embedding for the class token and for each patch
    x = x + Attention(LayerNorm(x))                     biases everywhere
    x = x + W_down GELU(W_up LayerNorm(x))              GELU by erf
    y = W_out GELU(W_in x)                              of the patches, without the class token; no norm at the end

`parallel.vision.insert_patches` then replaces the decoder's image tokens by y, and by a learned newline vector after each line
of patches. On a mesh, tiles are sharded over all axes (`parallel.sharding`), and each layer gathers its weights when it runs.

Axes: I tiles, P positions of a tile (the class token first, then its patches), J the ViT's width, A its heads, K their dim, U
its hidden units, O the projector's hidden units, D the decoder's width, Y and X pixels down and across, Z colours. Lower-case
axes: b blocks of a batch's rows, each with its own tiles (`data.pipeline`), p patches of all tiles of a block.
"""
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx import config
from mmx.dims import axes_of
from mmx.kernels.dtypes import widen
from mmx.parallel.sharding import constrain_tiles, replicate


def extents(c: config.Model) -> dict[str, int]:
    """The size of each axis letter in the vision encoder's parameters, where Y and X count the pixels of a patch."""
    v = c.vision
    return {"Y": v.patch, "X": v.patch, "Z": 3, "P": v.patches_per_side ** 2 + 1, "J": v.dim, "A": v.heads,
            "K": v.dim // v.heads, "U": v.hidden, "O": c.dim, "D": c.dim, "L": v.layers}


def vit_param(module: nn.Module, name: str, fan_in: str = ""):
    """Creates the parameter `name`, which ends in its axes; returns it in the computation's dtype, gathered on every device.

    `fan_in` contains the letters of the input axes. The initial values are normal, and their variance is 1 / (product of the
    sizes of these axes). Without `fan_in` they are ones for the scale of a norm, and zeros otherwise.
    """
    c = module.config
    size = extents(c)
    n_in = math.prod(size[axis] for axis in fan_in)
    plain = nn.initializers.ones if name.startswith("norm") else nn.initializers.zeros
    created = module.param(name, nn.initializers.normal(n_in ** -0.5) if fan_in else plain,
                           tuple(size[axis] for axis in axes_of(name)))
    return replicate(created.astype(c.dtype))


def layer_norm(module: nn.Module, x_IPJ, name: str = ""):
    """Returns (x - mean) / deviation, computed in float32 and cast back, scaled and shifted by the module's parameters."""
    wide_IPJ = widen(x_IPJ)
    centred_IPJ = wide_IPJ - jnp.mean(wide_IPJ, axis=-1, keepdims=True)
    variance_IP1 = jnp.mean(centred_IPJ ** 2, axis=-1, keepdims=True)
    u_IPJ = centred_IPJ * jax.lax.rsqrt(variance_IP1 + module.config.vision.norm_eps)
    return u_IPJ.astype(x_IPJ.dtype) * vit_param(module, f"norm{name}_J") + vit_param(module, f"shift{name}_J")


class Block(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, x_IPJ, _):
        create = functools.partial(vit_param, self)
        u_IPJ = layer_norm(self, x_IPJ, "_attention")
        q_IPAK, k_IPAK, v_IPAK = (jnp.einsum("IPJ,JAK->IPAK", u_IPJ, create(f"{name}_JAK", "J")) + create(f"{name}_AK")
                                  for name in "qkv")
        o_IPAK = jax.nn.dot_product_attention(q_IPAK, k_IPAK, v_IPAK)
        x_IPJ += jnp.einsum("IPAK,AKJ->IPJ", o_IPAK, create("out_AKJ", "AK")) + create("out_J")
        h_IPU = jnp.einsum("IPJ,JU->IPU", layer_norm(self, x_IPJ, "_mlp"), create("up_JU", "J")) + create("up_U")
        h_IPU = jax.nn.gelu(h_IPU, approximate=False)
        return constrain_tiles(x_IPJ + jnp.einsum("IPU,UJ->IPJ", h_IPU, create("down_UJ", "U")) + create("down_J")), None


class Vision(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, pixels_bIYXZ):
        """Returns newline_D and patches_bpD: the projected patches of each block, tile by tile and line by line.

        `pixels_bIYXZ` contains I tiles for each of the b blocks. Inside this method, axis I counts the tiles of all blocks.
        """
        c, create = self.config, functools.partial(vit_param, self)
        v, blocks, tiles = c.vision, len(pixels_bIYXZ), math.prod(pixels_bIYXZ.shape[:2])
        # Axes y, x: lines and columns of patches. Axes Y, X: pixels of a patch.
        side = v.patches_per_side
        split = pixels_bIYXZ.astype(c.dtype).reshape(tiles, side, v.patch, side, v.patch, 3)
        patches_IPJ = jnp.einsum("IyYxXZ,YXZJ->IyxJ", split, create("patch_YXZJ", "YXZ")).reshape(tiles, -1, v.dim)
        # class_J, place_PJ (positions) and newline_D are embeddings. Their fan_in only sets the initial variance, 1/J or 1/D.
        class_IPJ = jnp.broadcast_to(create("class_J", "J"), (tiles, 1, v.dim))
        x_IPJ = layer_norm(self, jnp.concatenate([class_IPJ, constrain_tiles(patches_IPJ)], axis=1) + create("place_PJ", "J"))
        layers = nn.scan(nn.remat(Block) if c.remat else Block, variable_axes={"params": 0}, split_rngs={"params": True},
                         length=v.layers)
        x_IPJ, _ = layers(c, name="layers")(constrain_tiles(x_IPJ), None)
        h_IPO = jax.nn.gelu(jnp.einsum("IPJ,JO->IPO", x_IPJ[:, 1:], create("in_JO", "J")) + create("in_O"), approximate=False)
        y_IPD = jnp.einsum("IPO,OD->IPD", h_IPO, create("out_OD", "O")) + create("out_D")
        return create("newline_D", "D"), constrain_tiles(y_IPD).reshape(blocks, -1, c.dim)
