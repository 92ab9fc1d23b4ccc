"""Both ends of the model, whose weights have one row per vocabulary entry: the embedding look-up and the cross-entropy.

On a mesh each device of the tensor axis (etp) has a part of the vocabulary (Megatron). It looks up and scores the tokens of all
devices of that axis; the results are summed over the axis and scattered back to the tokens' devices. The cross-entropy never
materialises all logits: it runs over chunks of time, each with a part of every device's tokens. Inside `shard_map` every letter
is a local extent.
"""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.parallel import sharding


def embed(embed_WD, tokens_BT, dtype):
    """Returns x_BTD, the embedding of token ids."""
    if not sharding.tokens_are_sharded(*tokens_BT.shape):
        return embed_WD[tokens_BT].astype(dtype)
    mesh = sharding.active_mesh()
    (rows, time), spec = sharding.token_axes(mesh), sharding.weight_spec("WD", embed_WD.shape, mesh)

    def local(embed_WD, tokens_BT):
        embed_WD = sharding.gather_weight(embed_WD.astype(dtype), "WD", spec, rows + time)
        if not sharding.is_tensor_sharded(spec):
            return embed_WD[tokens_BT]
        with jax.named_scope("embed"):      # 'B T/etp -> B T' ids, then 'B T D -> B T/etp D', summed: (etp - 1) / etp B T D
            tokens_BT = jax.lax.all_gather(tokens_BT, "etp", axis=1, tiled=True)
            index_BT = tokens_BT - jax.lax.axis_index("etp") * len(embed_WD)
            own_BT1 = ((index_BT >= 0) & (index_BT < len(embed_WD)))[..., None]
            return jax.lax.psum_scatter(embed_WD[index_BT] * own_BT1, "etp", scatter_dimension=1, tiled=True)
    return jax.shard_map(local, in_specs=(spec, P(rows, time)), out_specs=P(rows, time))(embed_WD, tokens_BT)


def cross_entropy(x_BTD, head_WD, targets_BT, weights_BT, chunk: int):
    """Returns nats_B, the weighted sum of each row's cross-entropies in nats.

    The forward and the backward pass hold the logits of `chunk` tokens at a time, counted over all devices.
    """
    if not sharding.tokens_are_sharded(*targets_BT.shape):
        return _nats(x_BTD, head_WD.astype(x_BTD.dtype), targets_BT, weights_BT, chunk, None)
    mesh = sharding.active_mesh()
    (rows, time), spec = sharding.token_axes(mesh), sharding.weight_spec("WD", head_WD.shape, mesh)
    vocabulary_axis = "etp" if sharding.is_tensor_sharded(spec) else None

    def local(x_BTD, head_WD, targets_BT, weights_BT):
        head_WD = sharding.gather_weight(head_WD.astype(x_BTD.dtype), "WD", spec, rows + time)
        nats_B = _nats(x_BTD, head_WD, targets_BT, weights_BT, chunk // mesh.size, vocabulary_axis)
        return jax.lax.psum(nats_B, time) if time else nats_B       # 4 B bytes
    tokens = P(rows, time)
    sharded = jax.shard_map(local, in_specs=(tokens, spec, tokens, tokens), out_specs=P(rows))
    return sharded(x_BTD, head_WD, targets_BT, weights_BT)


def _nats(x_BTD, head_WD, targets_BT, weights_BT, chunk, axis):
    """`cross_entropy` of one device's tokens. `axis`: the mesh axis that shards W and T, or None."""
    B, T = targets_BT.shape
    steps = -(-T // max(1, min(T, chunk // B)))
    span = -(-T // steps)

    @jax.checkpoint
    def add_chunk(total_B, xs):
        x_BQD, target_BQ, weight_BQ = xs
        if axis:        # 'B Q/etp D -> B Q D': (etp - 1) / etp B Q D numbers received; two sums a token are scattered back
            x_BQD, target_BQ = (jax.lax.all_gather(a, axis, axis=1, tiled=True) for a in (x_BQD, target_BQ))
            target_BQ = target_BQ - jax.lax.axis_index(axis) * len(head_WD)
        logits_BQW = jnp.einsum("BQD,WD->BQW", x_BQD, head_WD, preferred_element_type=weights_BT.dtype)
        top_BQ = jax.lax.stop_gradient(logits_BQW.max(2))
        top_BQ = jax.lax.pmax(top_BQ, axis) if axis else top_BQ
        sum_BQ = jnp.exp(logits_BQW - top_BQ[..., None]).sum(2)
        own_BQ = jnp.sum(jnp.where(jnp.arange(len(head_WD)) == target_BQ[..., None], logits_BQW, 0), axis=2)
        if axis:        # 'B Q -> B Q/etp', summed
            sum_BQ, own_BQ = (jax.lax.psum_scatter(a, axis, scatter_dimension=1, tiled=True) for a in (sum_BQ, own_BQ))
            top_BQ = jax.lax.dynamic_slice_in_dim(top_BQ, jax.lax.axis_index(axis) * span, span, axis=1)
        return total_B + jnp.sum((jnp.log(sum_BQ) + top_BQ - own_BQ) * weight_BQ, axis=1), None

    def split(x):
        """[B, T, ...] -> [steps, B, span, ...], padded with zeros."""
        x = jnp.pad(x, ((0, 0), (0, steps * span - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, steps, span, *x.shape[2:]), 1, 0)

    xs = split(x_BTD), split(targets_BT), split(weights_BT)
    zero_B = xs[2][0, :, 0] * 0         # varies over the mesh as the weights do
    return jax.lax.scan(add_chunk, zero_B, xs)[0]
