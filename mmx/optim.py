"""AdamW, and what changes over a run: learning rate and batch size, both functions of the tokens seen.

Rates and sizes are computed on the host, exactly, from the step's number: no state to lose. Paper section 4.2:
500 steps of warm-up, stepwise constant rates, a last exponential decay; batch doubled at given token counts.
"""
import bisect
import itertools
import math

import jax
import optax

from mmx import config


def adamw(t: config.Train) -> optax.GradientTransformation:
    """Clipped AdamW at rate -1: the caller multiplies by the step's learning rate. Norm scales do not decay."""
    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.startswith("norm_"), params)
    return optax.chain(optax.clip_by_global_norm(t.clip) if t.clip else optax.identity(),
                       optax.scale_by_adam(t.beta1, t.beta2, t.eps),
                       optax.add_decayed_weights(t.weight_decay, decays),
                       optax.scale(-1.0))


def micro_batches(t: config.Train, tokens: int) -> int:
    """Micro-batches in the step that begins after `tokens`."""
    return _latest(t.ramp, tokens) if t.ramp else 1


def tokens_seen(t: config.Train, step: int) -> int:
    """Tokens before step number `step` (from 0): a walk over the ramp's stages."""
    tokens, stages = 0, t.ramp or ((0, 1),)
    for (_, count), (end, _) in itertools.pairwise(stages):
        size = count * t.batch * t.length
        steps = min(step, max(0, -(-(end - tokens) // size)))
        tokens, step = tokens + steps * size, step - steps
    return tokens + step * stages[-1][1] * t.batch * t.length


def learning_rate(t: config.Train, step: int, progress: float) -> float:
    """The rate of step number `step` (from 0), when `progress` (0 to 1) of the run is done."""
    warm = min(1.0, (step + 1) / t.warmup) if t.warmup else 1.0
    if t.schedule == "cosine":
        return warm * (t.lr_end + (t.lr - t.lr_end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)
    peak = _latest(t.rates, tokens_seen(t, step)) if t.schedule == "stepwise" else t.lr
    left = min(1.0, max(0.0, 1 - progress) / t.decay) if t.decay else 1.0        # 1 before the decay, 0 at the end
    if t.decay_form == "exponential":
        return warm * peak * (max(t.lr_end, 1e-3 * peak) / peak) ** (1 - left)    # no exponential reaches 0
    share = left if t.decay_form == "linear" else 1 - math.sqrt(1 - left)
    return warm * (t.lr_end + (peak - t.lr_end) * share)


def _latest(points, tokens):
    return points[bisect.bisect_right([p[0] for p in points], tokens) - 1][1]
