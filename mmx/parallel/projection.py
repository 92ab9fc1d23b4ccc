"""The projections of attention layers, from the model's width to heads and back. Heads come before time in the result.

On a mesh, heads are sharded over the tensor axis (etp), and between layers time is sharded over it too (Megatron's sequence
parallelism). `to_heads` therefore gathers time before the product; `from_heads` scatters the sum over all heads along time
after the product. Inside `shard_map` every letter is a local extent.
"""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.kernels import platform
from mmx.parallel import sharding


def to_heads(x_BTD, **weights):
    """Returns x W as [B, H, T, K] for each of `weights`, whose names end in their axes (`q_DHK`)."""
    letters, weights = [name.rpartition("_")[2] for name in weights], list(weights.values())
    if not sharding.tokens_are_sharded(*x_BTD.shape[:2]):
        return [_to_heads(x_BTD, w) for w in weights]
    mesh = sharding.active_mesh()
    rows, time = sharding.token_axes(mesh)
    specs = [sharding.weight_spec(axes, w.shape, mesh) for axes, w in zip(letters, weights)]

    def local(x_BTD, *weights):
        x_BSD = x_BTD
        if any(map(sharding.is_tensor_sharded, specs)):
            with jax.named_scope("whole_time"):     # 'B T/(seq etp) D -> B T/seq D': (etp - 1) B T D numbers received
                x_BSD = jax.lax.all_gather(x_BTD, "etp", axis=1, tiled=True)
        return [_to_heads(x_BSD if sharding.is_tensor_sharded(spec) else x_BTD,
                          sharding.gather_weight(w, axes, spec, rows + time)) for w, axes, spec in zip(weights, letters, specs)]
    out = [_heads_spec(spec, rows, time) for spec in specs]
    return jax.shard_map(local, in_specs=(P(rows, time), *specs), out_specs=out)(x_BTD, *weights)


def from_heads(x_BHTV, w_HVD):
    """Returns y_BTD, the product of all heads' outputs and W."""
    B, _, T, _ = x_BHTV.shape
    if not sharding.tokens_are_sharded(B, T):
        return _from_heads(x_BHTV, w_HVD)
    mesh = sharding.active_mesh()
    (rows, time), spec = sharding.token_axes(mesh), sharding.weight_spec("HVD", w_HVD.shape, mesh)

    def local(x_BHTV, w_HVD):
        y_BTD = _from_heads(x_BHTV, sharding.gather_weight(w_HVD, "HVD", spec, rows + time))
        if not sharding.is_tensor_sharded(spec):
            return y_BTD
        with jax.named_scope("part_time"):      # 'B T/seq D -> B T/(seq etp) D', summed: (etp - 1) / etp B T D numbers received
            return jax.lax.psum_scatter(y_BTD, "etp", scatter_dimension=1, tiled=True)
    return jax.shard_map(local, in_specs=(_heads_spec(spec, rows, time), spec), out_specs=P(rows, time))(x_BHTV, w_HVD)


def _heads_spec(weight_spec, rows, time):
    """The PartitionSpec of [B, H, T, K]. Heads that the tensor axis does not divide are not sharded, and time stays sharded."""
    if not sharding.is_tensor_sharded(weight_spec):
        return P(rows, None, time)
    return P(rows, "etp", tuple(axis for axis in time if axis != "etp"))


def _to_heads(x_BTD, w_DHK):
    if platform.name() != "cpu":        # no transpose of the weights; the next operation is fused into the product
        return jnp.einsum("BTD,DHK->BHTK", x_BTD, w_DHK)
    (B, T, _), (D, H, K) = x_BTD.shape, w_DHK.shape         # XLA's CPU dot would copy the weights to transpose them
    x_BTh = jnp.einsum("BTD,Dh->BTh", x_BTD, w_DHK.reshape(D, H * K))                      # h: heads x K
    return jnp.einsum("BTHK->BHTK", x_BTh.reshape(B, T, H, K))


def _from_heads(x_BHTV, w_HVD):
    if platform.name() != "cpu":
        return jnp.einsum("BHTV,HVD->BTD", x_BHTV, w_HVD)
    B, H, T, V = x_BHTV.shape
    x_BTh = jnp.einsum("BHTV->BTHV", x_BHTV).reshape(B, T, H * V)                          # h: heads x V
    return jnp.einsum("BTh,hD->BTD", x_BTh, w_HVD.reshape(H * V, -1))
