"""One training step: a pure function that adds the gradients of all micro-batches and updates the parameters once."""
import functools

import jax
import jax.numpy as jnp
import optax

from mmx import config
from mmx.model import Model
from mmx.parallel import sharding
from mmx.training import optim
from mmx.training.loss import loss


def init(model: Model, optimizer, train: config.Train):
    """The parameters and the optimizer state before the first step."""
    params = model.init(jax.random.key(train.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    return params, optimizer.init(optim.split(params, train.freeze)[0])


def abstract_state(model: Model, optimizer, train: config.Train, mesh):
    """The shapes, dtypes and shardings of what `init` returns."""
    state = jax.eval_shape(functools.partial(init, model, optimizer, train))
    shardings = sharding.param_shardings(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def jit_train_step(model: Model, optimizer, train: config.Train, state):
    """Returns `train_step` under jit, with the shardings of `state` (from `abstract_state`) and donated params and opt."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    metrics = sharding.replicated(jax.tree.leaves(shardings)[0].mesh)
    return jax.jit(functools.partial(train_step, model=model, optimizer=optimizer, train=train),
                   donate_argnums=(0, 1), out_shardings=(*shardings, metrics))


def train_step(params, opt, batch, lr, *, model: Model, optimizer, train: config.Train):
    """Updates the parameters once, with the gradient of the loss averaged over the targets of all micro-batches.

    If the loss or the gradient norm is not finite, returns params and opt unchanged.

    Args:
      params: all parameters. Parameters that train.freeze names have no gradient and no optimizer state.
      opt: the optimizer state.
      batch: the dict of arrays that `loss.loss` describes, each with a first axis of micro-batches.
      lr: the learning rate of this step.
    Returns:
      params, opt, and a dict of metrics.
    """
    learned, frozen = optim.split(params, train.freeze)
    grad = jax.value_and_grad(lambda p, b: loss(model, optim.join(p, frozen), b, train.loss_chunk, train.contrastive),
                              has_aux=True)

    def add_micro_batch(total, micro_batch):
        (_, metrics), grads = grad(learned, micro_batch)
        total = jax.tree.map(lambda t, g: t + metrics["target_count"] * g, total, grads)
        return total, metrics | {"micro_norm_squared": optax.tree.norm(grads, squared=True)}

    if len(batch["tokens"]) == 1:
        (_, metrics), grads = grad(learned, jax.tree.map(lambda x: x[0], batch))
    else:
        grads, metrics = jax.lax.scan(add_micro_batch, jax.tree.map(jnp.zeros_like, learned), batch)
        # Weighting each micro-batch by its number of targets gives the same means as one large batch.
        weights = metrics["target_count"]
        total = weights.sum()
        grads = jax.tree.map(lambda g: g / jnp.maximum(total, 1), grads)
        # Without any target (prompts only), average with weights of 1: with weights of 0, the result is nan.
        weights = jnp.where(total > 0, weights, 1)
        metrics = jax.tree.map(lambda m: jnp.average(m, 0, weights), metrics)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updates, new_opt = optimizer.update(grads, opt, learned)
    new_learned = optax.apply_updates(learned, jax.tree.map(lambda u: lr * u, updates))
    learned, opt = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (new_learned, new_opt), (learned, opt))
    return optim.join(learned, frozen), opt, metrics | {"grad_norm": norm} | _layer_norms(grads.get("groups", {}))


def _layer_norms(grads) -> dict:
    """The gradient norm of each layer that is not frozen, in the order of the layers."""
    def squares_L(x):       # the sum of squares for each group; the first axis of a leaf is the scan over groups
        return jnp.sum(x ** 2, axis=tuple(range(1, x.ndim)))
    names = sorted(grads, key=lambda name: int(name.removeprefix("layer_")))
    layers = [sum(map(squares_L, jax.tree.leaves(grads[name]))) for name in names]
    return {"layer_norms": jnp.sqrt(jnp.stack(layers, axis=1).reshape(-1))} if names else {}
