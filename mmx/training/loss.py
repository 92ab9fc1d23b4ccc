"""The training loss: cross-entropy, the balance and z losses of the routers, and a contrastive loss of captioned images.

The contrastive loss follows CoCa (arXiv 2205.01917), which the paper uses to pre-train its ViT. Pair i of a micro-batch is an
image with the unit vector u_i and its caption with the unit vector v_i. The loss is the mean over all pairs i of

    -log[ exp(u_i . v_i / 0.07) / sum_i' exp(u_i . v_i' / 0.07) ] - log[ exp(u_i . v_i / 0.07) / sum_i' exp(u_i' . v_i / 0.07) ]

The following choices are ours. u_i is the mean of the image's projected patches; if an image has several tiles, only the tile
that shows the whole image counts. The decoder reads each caption twice (`data.pipeline`): once after its image, for the
cross-entropy, and once without the image, for v_i, which is the last hidden state of the caption's last token. The temperature
0.07 is not learned. train.contrastive is the weight of the contrastive loss relative to the cross-entropy. CoCa's weights are 1
for the contrastive loss and 2 for the cross-entropy, which corresponds to train.contrastive=0.5.

Lower-case axes: l layers; b blocks of a batch's rows and p patches of a block, as in `mmx.model`.
"""
import jax
import jax.numpy as jnp

from mmx import config
from mmx.kernels.dtypes import wide_dtype
from mmx.model import encode_images
from mmx.parallel.routing import balance_loss
from mmx.parallel.vocabulary import cross_entropy

TEMPERATURE = 0.07


def router_losses(stats, c: config.Model):
    """The balance loss and the z-loss, each averaged over the layers. With c.aux="hf", the statistics are averaged instead."""
    load_lE, prob_lE = stats["load_E"], stats["prob_E"]
    if c.aux == "hf":
        load_lE, prob_lE = load_lE.mean(0, keepdims=True), prob_lE.mean(0, keepdims=True)
    balance_l = jax.vmap(lambda load_E, prob_E: balance_loss(load_E, prob_E, c.top_k, c.aux))(load_lE, prob_lE)
    return balance_l.mean(), stats["z"].mean()


def contrastive_loss(caption_ends_bI, x_BTD, patches_bpD):
    """The mean loss over all pairs of an image and its caption; 0 without any pair.

    Args:
      caption_ends_bI: the index of the last token of the tile's caption, -1 for a tile without a caption. The index counts the
        tokens of the tile's block, row after row.
      x_BTD: the last hidden states. The rows form b blocks of B / b rows.
      patches_bpD: the projected patches of each block, tile after tile.
    """
    (blocks, I), D = caption_ends_bI.shape, x_BTD.shape[2]
    dtype = wide_dtype(x_BTD.dtype)
    image_ID = patches_bpD.reshape(blocks * I, -1, D).mean(1, dtype=dtype)       # below, I counts the tiles of all blocks
    text_bID = jnp.take_along_axis(x_BTD.reshape(blocks, -1, D), jnp.maximum(caption_ends_bI, 0)[..., None], axis=1)
    text_ID = text_bID.reshape(blocks * I, D)
    image_ID, text_ID = (x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-6)
                         for x in (image_ID, text_ID.astype(dtype)))
    paired_I = caption_ends_bI.ravel() >= 0
    logits_II = jnp.where(paired_I[:, None] & paired_I, image_ID @ text_ID.T / TEMPERATURE, -1e9)
    nats_I = jax.nn.logsumexp(logits_II, 0) + jax.nn.logsumexp(logits_II, 1) - 2 * jnp.diagonal(logits_II)
    return jnp.sum(nats_I * paired_I) / jnp.maximum(paired_I.sum(), 1)


def loss(model, params, batch, loss_chunk: int, contrastive: float = 0.0):
    """The loss that training minimizes, and a dict of metrics.

    The loss is the cross-entropy, the mean nats per target, plus the weighted router losses and, if the batch has images, the
    contrastive loss. The metric "loss" is the cross-entropy alone.

    Args:
      batch: a dict of "tokens", "targets", "segments", "positions" and "weights" (0 if a token has no target), each [B, T].
        A batch with images also has "patch_code" [B, T] (see `Model`), "pixels" [b, I, Y, X, Z] and "caption_ends" [b, I]
        (see `contrastive_loss`).
      loss_chunk: number of tokens whose logits are in memory at the same time.
      contrastive: weight of the contrastive loss.
    """
    c, image_arguments = model.config, {}
    if "pixels" in batch:
        image_arguments = {"patch_code_BT": batch["patch_code"], "images": encode_images(c, params, batch["pixels"])}
    x_BTD, _, stats = model.apply({"params": params}, batch["tokens"], batch["segments"], batch["positions"],
                                  **image_arguments)
    weights_BT = batch["weights"].astype(wide_dtype(c.dtype))       # the dtype of the logits
    target_count = weights_BT.sum()
    nats_B = cross_entropy(x_BTD, params["head_WD"], batch["targets"], weights_BT, loss_chunk)
    nats = nats_B.sum() / jnp.maximum(target_count, 1)
    balance, z = router_losses(stats, c)
    metrics = {"loss": nats, "aux_loss": balance, "z_loss": z, "target_count": target_count,
               "load_E": stats["load_E"], "dropped": stats["dropped"], "overflow": stats["overflow"]}
    total = nats + c.aux_weight * balance + c.z_weight * z
    if contrastive and image_arguments:
        metrics["contrastive_loss"] = contrastive_loss(batch["caption_ends"], x_BTD, image_arguments["images"][1])
        total += contrastive * metrics["contrastive_loss"]
    return total, metrics
