"""The mixers' projections: to heads, which stand before time, and from heads back.

On a mesh the heads are cut over the tensor axis and time between layers is too (Megatron's sequence parallelism): time is
gathered before the products to heads, and the sums over all heads are scattered over it behind the products back. Inside
`shard_map` every letter is a local extent. X: heads times their dims.
"""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.kernels import platform
from mmx.parallel import sharding


def to_heads(x_BTD, **weights):
    """[x W for each of `weights`], each named by its axes (`q_DHK`), as [B, H, T, K]."""
    letters, weights = [name.rpartition("_")[2] for name in weights], list(weights.values())
    if not sharding.tokens_are_sharded(*x_BTD.shape[:2]):
        return [_heads(x_BTD, w) for w in weights]
    mesh = sharding.active_mesh()
    rows, time = sharding.token_axes(mesh)
    kept = [sharding.weight_spec(axes, w.shape, mesh) for axes, w in zip(letters, weights)]

    def local(x_BTD, *weights):
        x_BSD = x_BTD
        if any(map(sharding.is_tensor_sharded, kept)):     # 'B T/(seq etp) D -> B T/seq D'
            with jax.named_scope("whole_time"):
                x_BSD = jax.lax.all_gather(x_BTD, "etp", axis=1, tiled=True)
        return [_heads(x_BSD if sharding.is_tensor_sharded(spec) else x_BTD, sharding.gather_weight(w, axes, spec, rows + time))
                for w, axes, spec in zip(weights, letters, kept)]
    out = [_cut(spec, rows, time) for spec in kept]
    return jax.shard_map(local, in_specs=(P(rows, time), *kept), out_specs=out)(x_BTD, *weights)


def from_heads(x_BHTV, w_HVD):
    """All heads' outputs through W: y_BTD."""
    B, _, T, _ = x_BHTV.shape
    if not sharding.tokens_are_sharded(B, T):
        return _join(x_BHTV, w_HVD)
    mesh = sharding.active_mesh()
    (rows, time), kept = sharding.token_axes(mesh), sharding.weight_spec("HVD", w_HVD.shape, mesh)

    def local(x_BHTV, w_HVD):
        y_BTD = _join(x_BHTV, sharding.gather_weight(w_HVD, "HVD", kept, rows + time))
        if not sharding.is_tensor_sharded(kept):
            return y_BTD
        with jax.named_scope("part_time"):      # 'B T/seq D -> B T/(seq etp) D', summed
            return jax.lax.psum_scatter(y_BTD, "etp", scatter_dimension=1, tiled=True)
    return jax.shard_map(local, in_specs=(_cut(kept, rows, time), kept), out_specs=P(rows, time))(x_BHTV, w_HVD)


def _cut(kept, rows, time):
    """How [B, H, T, K] of a weight is cut: heads that the tensor axis does not divide stay whole, and time stays cut."""
    if not sharding.is_tensor_sharded(kept):
        return P(rows, None, time)
    return P(rows, "etp", tuple(axis for axis in time if axis != "etp"))


def _heads(x_BTD, w_DHK):
    if platform.name() != "cpu":        # the weights are read as they lie, and what follows joins the product's epilogue
        return jnp.einsum("BTD,DHK->BHTK", x_BTD, w_DHK)
    D, H, K = w_DHK.shape               # XLA's CPU dot would copy the weights to transpose them
    x_BTX = jnp.einsum("BTD,DX->BTX", x_BTD, w_DHK.reshape(D, H * K))
    return jnp.einsum("BTHK->BHTK", x_BTX.reshape(*x_BTX.shape[:2], H, K))


def _join(x_BHTV, w_HVD):
    if platform.name() != "cpu":
        return jnp.einsum("BHTV,HVD->BTD", x_BHTV, w_HVD)
    B, H, T, V = x_BHTV.shape
    x_BTX = jnp.einsum("BHTV->BTHV", x_BHTV).reshape(B, T, H * V)
    return jnp.einsum("BTX,XD->BTD", x_BTX, w_HVD.reshape(H * V, -1))
