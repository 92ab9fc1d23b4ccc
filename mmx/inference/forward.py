"""Logits of whole sequences, and log-probabilities of a text."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmx.checkpoints import finite
from mmx.config import ConfigError
from mmx.data import images as pictures
from mmx.inference import engine
from mmx.inference.requests import check_ids
from mmx.model import Model, empty_cache, logits
from mmx.parallel import cache as caches


def forward(loaded, tokens_BT, mask_BT=None, images=None, *, params=None):
    """Logits of whole sequences. Can be called under jax.jit and jax.grad.

    Args:
      loaded: the result of `mmx.load`.
      tokens_BT: token ids. Their values are checked unless they are traced, as under jax.jit.
      mask_BT: 0 marks padding, whose logits are meaningless. None: no padding.
      images: a list of files or PIL images for each row. Their patches replace the row's tokens with the id
        `config.vision.token`, in order; `mmx.data.images.token_count` says how many such tokens an image needs. With images,
        tokens_BT must not be traced.
      params: parameters to use instead of `loaded.params`, for jax.grad.

    Returns:
      logits_BTW over the vocabulary W, float32.

    Raises:
      ConfigError: an id is outside the vocabulary, a shape is wrong, or a row has too few or too many image tokens.
    """
    c, params = loaded.config, loaded.params if params is None else params
    if images is not None and isinstance(tokens_BT, jax.core.Tracer):
        raise ConfigError("images need known token ids, and tokens_BT is traced: with images, do not pass tokens_BT as an "
                          "argument of the transformed function (jax.jit, jax.grad)")
    tokens_BT = check_ids(c, tokens_BT)
    if mask_BT is not None and np.shape(mask_BT) != tokens_BT.shape:
        raise ConfigError(f"mask_BT has shape {np.shape(mask_BT)}, tokens_BT has {tokens_BT.shape}: they must be equal")
    segments_BT = None if mask_BT is None else jnp.asarray(mask_BT, jnp.int32)
    image_arguments = {}
    if images is not None:
        if len(images) != len(tokens_BT):
            raise ConfigError(f"images need a list for each of {len(tokens_BT)} rows, got {len(images)}")
        prepared = [pictures.prepare_all(c.vision, row) for row in images]
        patch_code_BT, pixels_bIYXZ = pictures.collate(c.vision, tokens_BT, prepared)
        image_arguments = {"patch_code_BT": patch_code_BT, "images": engine.encode_images(c, params, pixels_bIYXZ)}
    return _forward(loaded.model, params, tokens_BT, segments_BT, image_arguments)


def score(loaded, ids_T, next_T):
    """Scores a text. It is prefilled in chunks, so that the logits of only one chunk are in memory.

    Args:
      ids_T: token ids.
      next_T: the target of each, usually ids_T shifted by one.
    Returns:
      nats_T: -log p(next_T[t] given ids_T[:t + 1]), float32.
      likeliest_T: the most likely next ids.
    Raises:
      NonFiniteError: a nats_T is nan or infinite.
    """
    ids_T, sizes, scores, start = check_ids(loaded.config, np.asarray(ids_T)[None])[0], engine.chunk_sizes(len(ids_T)), [], 0
    cache = empty_cache(loaded.config, 1, -(-sum(sizes) // caches.PAGE) * caches.PAGE)
    for size in sizes:
        ids_1T, next_1T, mask_1T = (np.zeros((1, size), np.int32) for _ in range(3))
        real = min(size, len(ids_T) - start)
        ids_1T[0, :real], next_1T[0, :real], mask_1T[0, :real] = ids_T[start:start + real], next_T[start:start + real], 1
        *chunk_scores, cache = _score(loaded.model, loaded.params, ids_1T, next_1T, mask_1T, cache)
        scores.append([x_1T[0, :real] for x_1T in jax.device_get(chunk_scores)])
        finite.check(scores[-1][0], loaded.params, "the loss")
        start += real
    return tuple(np.concatenate(part) for part in zip(*scores))


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Model, params, tokens_BT, segments_BT, image_arguments):
    return logits(params, model.apply({"params": params}, tokens_BT, segments_BT, **image_arguments)[0])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _score(model: Model, params, ids_BT, next_BT, mask_BT, cache):
    x_BTD, cache, _ = model.apply({"params": params}, ids_BT, mask_BT, cache=cache)
    logits_BTW = logits(params, x_BTD)
    next_logits_BT = jnp.take_along_axis(logits_BTW, next_BT[..., None], axis=2)[..., 0]
    return jax.nn.logsumexp(logits_BTW, axis=2) - next_logits_BT, jnp.argmax(logits_BTW, axis=2), cache
