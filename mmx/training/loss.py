"""The training loss: cross-entropy in chunks, the routers' balance and z losses; of captioned images a contrastive one.

CoCa (arXiv 2205.01917), by which the report pre-trained its ViT, adds to the captions' cross-entropy

    (1/N) sum_i  -log softmax_j (u_i v_j / t)_i  -log softmax_j (v_i u_j / t)_i         u, v of length 1

over all N pairs of an image u and its caption v in a micro-batch. Ours: one decoder reads a caption behind its image, for the
cross-entropy, and once more without it (`data.pipeline`), for v, its last hidden state; u is the mean of the image's projected
patches, of the squeezed tile alone where there are more; t is 0.07 and not learned. CoCa's proportion is train.contrastive=0.5.
"""
import jax
import jax.numpy as jnp

from mmx import config
from mmx.model import see
from mmx.parallel.routing import balance_loss
from mmx.parallel.vocabulary import cross_entropy

TEMPERATURE = 0.07


def router_losses(stats, c: config.Model):
    """The balance loss and the z-loss, means over the layers ("hf" takes all layers' tokens together)."""
    load_LE, prob_LE = stats["load_E"], stats["prob_E"]
    if c.aux == "hf":
        load_LE, prob_LE = load_LE.mean(0, keepdims=True), prob_LE.mean(0, keepdims=True)
    balance = jax.vmap(lambda f_E, p_E: balance_loss(f_E, p_E, c.top_k, c.aux))(load_LE, prob_LE)
    return balance.mean(), stats["z"].mean()


def contrastive_loss(ends_NI, x_BTD, patches_NMD):
    """The mean over the pairs, 0 without any; `ends_NI`: where in its block of rows the caption of a tile ends, -1 of none."""
    (N, I), D = ends_NI.shape, x_BTD.shape[2]
    there_M = ends_NI.ravel() >= 0
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    image_MD = patches_NMD.reshape(N * I, -1, D).mean(1, dtype=wide)
    text_MD = jnp.take_along_axis(x_BTD.reshape(N, -1, D), jnp.maximum(ends_NI, 0)[..., None], axis=1).reshape(N * I, D)
    image_MD, text_MD = (x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-6)
                         for x in (image_MD, text_MD.astype(wide)))
    logits_MM = jnp.where(there_M[:, None] & there_M, image_MD @ text_MD.T / TEMPERATURE, -1e9)
    nats_M = jax.nn.logsumexp(logits_MM, 0) + jax.nn.logsumexp(logits_MM, 1) - 2 * jnp.diagonal(logits_MM)
    return jnp.sum(nats_M * there_M) / jnp.maximum(there_M.sum(), 1)


def loss(model, params, batch, loss_chunk: int, contrastive: float = 0.0):
    """Mean nats per target plus the weighted router losses, and the contrastive one; metrics as a dict of arrays.

    `batch`: tokens, targets, segments, positions, weights, each [B, T]; where there are images also places [B, T], pixels
    [N, I, Y, X, Z] and ends [N, I] (`data.pipeline`).
    """
    c, shown = model.config, {}
    if "pixels" in batch:
        shown = {"places_BT": batch["places"], "seen": see(c, params, batch["pixels"])}
    x_BTD, _, stats = model.apply({"params": params}, batch["tokens"], batch["segments"], batch["positions"], **shown)
    weights_BT = batch["weights"].astype(jnp.promote_types(c.dtype, jnp.float32))       # the logits' type, too
    count = weights_BT.sum()
    nats_B = cross_entropy(x_BTD, params["head_WD"], batch["targets"], weights_BT, loss_chunk)
    cross = nats_B.sum() / jnp.maximum(count, 1)
    balance, z = router_losses(stats, c)
    metrics = {"loss": cross, "aux_loss": balance, "z_loss": z, "targets": count,
               "load_E": stats["load_E"], "dropped": stats["dropped"], "overflow": stats["overflow"]}
    total = cross + c.aux_weight * balance + c.z_weight * z
    if contrastive and shown:
        metrics["contrastive_loss"] = contrastive_loss(batch["ends"], x_BTD, shown["seen"][1])
        total += contrastive * metrics["contrastive_loss"]
    return total, metrics
