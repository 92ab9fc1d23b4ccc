"""What images put in the places of their tokens. Inside `shard_map` every letter is a local extent."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.parallel import sharding


def insert_patches(x_BTD, places_BT, newline_D, patches_NMD):
    """x_BTD with what places say: 0 the token itself, 1 the newline, from 2 on a patch of the row's own block.

    Rows fall into N equal blocks. On a mesh with as many data shards each sees its own block's patches alone, a part of which
    each of the devices has made that share its time.
    """
    N, M = patches_NMD.shape[:2]
    mesh = sharding.active_mesh()
    if not sharding.tokens_are_sharded(*places_BT.shape) or N != sharding.size(mesh, sharding.ROWS):
        return _insert(x_BTD, places_BT, newline_D, patches_NMD)
    rows, time = sharding.token_axes(mesh)
    shared = time if M % sharding.size(mesh, time) == 0 else ()

    def local(x_BTD, places_BT, newline_D, patches_NMD):
        if shared:
            with jax.named_scope("see"):        # '1 M/(seq etp) D -> 1 M D': (X - 1) / X of it received
                patches_NMD = jax.lax.all_gather(patches_NMD, shared, axis=1, tiled=True)
        return _insert(x_BTD, places_BT, newline_D, patches_NMD)
    tokens = P(rows, time)
    return jax.shard_map(local, in_specs=(tokens, tokens, P(), P(rows, shared)), out_specs=tokens)(
        x_BTD, places_BT, newline_D, patches_NMD)


def _insert(x_BTD, places_BT, newline_D, patches_NMD):
    B, N = len(places_BT), len(patches_NMD)
    patch_BTD = patches_NMD[(jnp.arange(B) * N // B)[:, None], jnp.maximum(places_BT - 2, 0)]
    places_BT1 = places_BT[..., None]
    return jnp.where(places_BT1 > 1, patch_BTD, jnp.where(places_BT1 == 1, newline_D, x_BTD))
