"""Images in the decoder's input: their tokens are replaced by patches.

Lower-case axes: b blocks of a batch's rows, each with its own images; p patches of a block.
"""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.parallel import sharding


def insert_patches(x_BTD, patch_code_BT, newline_D, patches_bpD):
    """Returns x_BTD with the tokens of images replaced.

    Args:
      x_BTD: embedded tokens. Their rows are divided into b equal blocks.
      patch_code_BT: 0 for text. 1: newline_D, which follows a line of patches. p + 2: patch p of the row's block.
      patches_bpD: the p patches of each block.

    On a mesh with b data shards, each shard needs the patches of its block only. The devices that share the block's time
    each computed a part of them.
    """
    blocks, patches = patches_bpD.shape[:2]
    mesh = sharding.active_mesh()
    if not sharding.tokens_are_sharded(*patch_code_BT.shape) or blocks != sharding.size(mesh, sharding.ROWS):
        return _insert(x_BTD, patch_code_BT, newline_D, patches_bpD)
    rows, time = sharding.token_axes(mesh)
    patch_axes = time if patches % sharding.size(mesh, time) == 0 else ()

    def local(x_BTD, patch_code_BT, newline_D, patches_bpD):
        if patch_axes:
            with jax.named_scope("patches"):    # '1 p/n D -> 1 p D', n = seq etp: (n - 1) / n p D numbers received
                patches_bpD = jax.lax.all_gather(patches_bpD, patch_axes, axis=1, tiled=True)
        return _insert(x_BTD, patch_code_BT, newline_D, patches_bpD)
    tokens = P(rows, time)
    return jax.shard_map(local, in_specs=(tokens, tokens, P(), P(rows, patch_axes)), out_specs=tokens)(
        x_BTD, patch_code_BT, newline_D, patches_bpD)


def _insert(x_BTD, patch_code_BT, newline_D, patches_bpD):
    B, blocks = len(patch_code_BT), len(patches_bpD)
    patch_BTD = patches_bpD[(jnp.arange(B) * blocks // B)[:, None], jnp.maximum(patch_code_BT - 2, 0)]
    patch_code_BT1 = patch_code_BT[..., None]
    return jnp.where(patch_code_BT1 > 1, patch_BTD, jnp.where(patch_code_BT1 == 1, newline_D, x_BTD))
