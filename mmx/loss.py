"""The training loss: cross-entropy in chunks, the routers' balance and z losses."""
import jax
import jax.numpy as jnp

from mmx import config
from mmx.parallel.expert import balance_loss
from mmx.parallel.vocabulary import cross_entropy


def router_losses(stats, c: config.Model):
    """The balance loss and the z-loss, means over the layers ("hf" takes all layers' tokens together)."""
    load_LE, prob_LE = stats["load_E"], stats["prob_E"]
    if c.aux == "hf":
        load_LE, prob_LE = load_LE.mean(0, keepdims=True), prob_LE.mean(0, keepdims=True)
    balance = jax.vmap(lambda f_E, p_E: balance_loss(f_E, p_E, c.top_k, c.aux))(load_LE, prob_LE)
    return balance.mean(), stats["z"].mean()


def loss(model, params, batch, loss_chunk: int):
    """Mean nats per target plus the weighted router losses; metrics as a dict of arrays.

    `batch`: tokens, targets, segments, positions, weights, each [B, T].
    """
    c = model.config
    x_BTD, _, stats = model.apply({"params": params}, batch["tokens"], batch["segments"], batch["positions"])
    weights_BT = batch["weights"].astype(jnp.promote_types(c.dtype, jnp.float32))       # the logits' type, too
    count = weights_BT.sum()
    nats_B = cross_entropy(x_BTD, params["head_WD"], batch["targets"], weights_BT, loss_chunk)
    cross = nats_B.sum() / jnp.maximum(count, 1)
    balance, z = router_losses(stats, c)
    metrics = {"loss": cross, "aux_loss": balance, "z_loss": z, "targets": count,
               "load_E": stats["load_E"], "dropped": stats["dropped"], "overflow": stats["overflow"]}
    return cross + c.aux_weight * balance + c.z_weight * z, metrics
