"""AdamW, the parts of the parameters that are frozen, and the learning rate of each step.

The host computes the learning rate and the batch size from the step's number and the progress of the run, so a checkpoint does
not contain them. The paper (section 4.2) trains with 500 steps of warm-up, stepwise constant rates, an exponential decay at
the end, and a batch size that doubles at given numbers of tokens.
"""
import itertools
import math

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from mmx import config
from mmx.config import ConfigError
from mmx.dims import is_matrix


def adamw(t: config.Train) -> optax.GradientTransformation:
    """AdamW with clipped gradients and a learning rate of 1: the caller multiplies the updates by the step's rate.

    Weight decay applies only to matrices. Updates of the vision parameters are multiplied by train.vision_lr.
    """
    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path[-1].key), params)

    def scale_vision(updates, _):
        return jax.tree_util.tree_map_with_path(lambda path, u: u * t.vision_lr if path[0].key == "vision" else u, updates)

    steps = [optax.clip_by_global_norm(t.clip) if t.clip else optax.identity(),
             optax.scale_by_adam(t.beta1, t.beta2, t.eps),
             optax.add_decayed_weights(t.weight_decay, decays)]
    if t.vision_lr != 1:
        steps.append(optax.stateless(scale_vision))
    return optax.chain(*steps, optax.scale(-1.0))


def split(params: dict, freeze: tuple) -> tuple[dict, dict]:
    """Splits nested parameters into (learned, frozen).

    Args:
      freeze: names of the frozen parts: paths joined by dots, such as "groups" or "vision.layers".
    Raises:
      ConfigError: `freeze` contains a name that no part has, or names every part.
    """
    flat = flatten_dict(params)
    # {path of a leaf: names of all parts that contain the leaf}
    parts = {path: [".".join(path[:n + 1]) for n in range(len(path))] for path in flat}
    known = dict.fromkeys(itertools.chain(*parts.values()))
    for name in freeze:
        if name not in known:
            raise ConfigError(f"train.freeze names {name!r}, which is not a part of this model{config.nearest(name, known)}")
    frozen = {path: x for path, x in flat.items() if not set(freeze).isdisjoint(parts[path])}
    if len(frozen) == len(flat):
        raise ConfigError(f"train.freeze={freeze} leaves nothing to learn; remove a name")
    return unflatten_dict({path: x for path, x in flat.items() if path not in frozen}), unflatten_dict(frozen)


def join(learned: dict, frozen: dict) -> dict:
    """Merges the two parts of `split` into nested parameters."""
    return unflatten_dict(flatten_dict(learned) | flatten_dict(frozen))


def learning_rate(t: config.Train, step: int, progress: float) -> float:
    """The learning rate of step number `step` (the first is 0).

    `progress` is the part of the run that is done when the step begins, 0 to 1 (`loop.fraction_done`).
    """
    warmup = min(1.0, (step + 1) / t.warmup) if t.warmup else 1.0
    if t.schedule == "cosine":
        return warmup * (t.lr_end + (t.lr - t.lr_end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)
    # t.rates: ((tokens, rate from then on), ...)
    peak = config.value_at(t.rates, t.tokens_seen(step)) if t.schedule == "stepwise" else t.lr
    # The decay takes the last t.decay of the run, a fraction. `remaining` is 1 before the decay and falls to 0 at its end.
    remaining = min(1.0, max(0.0, 1 - progress) / t.decay) if t.decay else 1.0
    if t.decay_form == "exponential" and peak:
        end = max(t.lr_end, 1e-3 * peak)        # at least peak / 1000: an exponential cannot decay to 0
        return warmup * peak * (end / peak) ** (1 - remaining)
    height = remaining if t.decay_form == "linear" else 1 - math.sqrt(1 - remaining)     # 1 at the peak, 0 at train.lr_end
    return warmup * (t.lr_end + (peak - t.lr_end) * height)
