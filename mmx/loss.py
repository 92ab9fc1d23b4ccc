"""The training loss: cross-entropy in chunks, the routers' balance and z losses."""
import jax
import jax.numpy as jnp

from mmx import config
from mmx.parallel.expert import balance_loss


def cross_entropy(x_BTD, head_WD, targets_BT, weights_BT, chunk: int):
    """nats_B: each row's summed nats of its targets, weighted. Only [chunk, W] of logits exist at a time, both ways."""
    B, T = targets_BT.shape
    head_WD = head_WD.astype(x_BTD.dtype)

    @jax.checkpoint
    def rows(total_B, xs):
        x_QD, target_Q, weight_Q = xs
        logits_QW = jnp.einsum("QD,WD->QW", x_QD, head_WD, preferred_element_type=weights_BT.dtype)
        nats_Q = jax.nn.logsumexp(logits_QW, axis=1) - jnp.take_along_axis(logits_QW, target_Q[:, None], axis=1)[:, 0]
        return total_B + jnp.sum((nats_Q * weight_Q).reshape(B, -1), axis=1), None

    steps = -(-T // max(1, min(T, chunk // B)))
    span = -(-T // steps)

    def split(x):
        """B T -> steps, B x span: chunks run along time, so that a batch sharded over devices stays so."""
        x = jnp.pad(x, ((0, 0), (0, steps * span - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, steps, span, *x.shape[2:]), 1, 0).reshape(steps, B * span, *x.shape[2:])

    xs = split(x_BTD), split(targets_BT), split(weights_BT)
    return jax.lax.scan(rows, jnp.zeros(B, weights_BT.dtype), xs)[0]


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
    count = batch["weights"].sum()
    nats_B = cross_entropy(x_BTD, params["head_WD"], batch["targets"], batch["weights"], loss_chunk)
    cross = nats_B.sum() / jnp.maximum(count, 1)
    balance, z = router_losses(stats, c)
    metrics = {"loss": cross, "aux_loss": balance, "z_loss": z, "targets": count,
               "load_E": stats["load_E"], "dropped": stats["dropped"]}
    return cross + c.aux_weight * balance + c.z_weight * z, metrics
