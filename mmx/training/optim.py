"""AdamW, and what changes over a run: learning rate and batch size, both functions of the tokens seen.

Rates and sizes are computed on the host, exactly, from the step's number: no state to lose. Paper section 4.2:
500 steps of warm-up, stepwise constant rates, a last exponential decay; batch doubled at given token counts.
"""
import math

import jax
import optax

from mmx import config
from mmx.config import ConfigError
from mmx.dims import is_matrix


def adamw(t: config.Train) -> optax.GradientTransformation:
    """Clipped AdamW at rate -1: the caller multiplies by the step's learning rate. Scales, shifts and biases do not decay."""
    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path[-1].key), params)

    def slowed(updates, _):
        return jax.tree_util.tree_map_with_path(lambda path, u: u * t.vision_lr if path[0].key == "vision" else u, updates)
    return optax.chain(optax.clip_by_global_norm(t.clip) if t.clip else optax.identity(),
                       optax.scale_by_adam(t.beta1, t.beta2, t.eps),
                       optax.add_decayed_weights(t.weight_decay, decays),
                       *[optax.stateless(slowed)] * (t.vision_lr != 1),
                       optax.scale(-1.0))


def split(params: dict, freeze: tuple) -> tuple[dict, dict]:
    """(learned, frozen): parts are named by their place, as "groups" or "vision.layers". Raises ConfigError for a name of none,
    and where nothing is left to learn."""
    known = _parts(params)
    for name in set(freeze) - set(known):
        raise ConfigError(f"train.freeze names {name!r}, which is no part of this model{config.nearest(name, known)}")
    learned, frozen = _split(params, freeze, "")
    if not learned:
        raise ConfigError(f"train.freeze={freeze} leaves nothing to learn")
    return learned, frozen


def join(learned: dict, frozen: dict) -> dict:
    """The parameters that `split` took apart."""
    both = {name: join(learned[name], frozen[name]) for name in learned.keys() & frozen.keys()}
    return learned | frozen | both


def _split(params, freeze, above):
    learned, frozen = {}, {}
    for name, part in params.items():
        if above + name in freeze:
            frozen[name] = part
        elif isinstance(part, dict):
            kept = _split(part, freeze, f"{above}{name}.")
            for into, some in zip((learned, frozen), kept):
                into |= {name: some} if some else {}
        else:
            learned[name] = part
    return learned, frozen


def _parts(params, above="") -> list[str]:
    """The names of all parts, the parameters themselves too."""
    found = []
    for name, part in params.items():
        found += [above + name, *(_parts(part, f"{above}{name}.") if isinstance(part, dict) else ())]
    return found


def learning_rate(t: config.Train, step: int, progress: float) -> float:
    """The rate of step number `step` (from 0), when `progress` (0 to 1) of the run is done."""
    warm = min(1.0, (step + 1) / t.warmup) if t.warmup else 1.0
    if t.schedule == "cosine":
        return warm * (t.lr_end + (t.lr - t.lr_end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)
    peak = config.latest(t.rates, t.tokens_seen(step)) if t.schedule == "stepwise" else t.lr
    left = min(1.0, max(0.0, 1 - progress) / t.decay) if t.decay else 1.0        # 1 before the decay, 0 at the end
    if t.decay_form == "exponential" and peak:
        return warm * peak * (max(t.lr_end, 1e-3 * peak) / peak) ** (1 - left)    # no exponential reaches 0
    share = left if t.decay_form == "linear" else 1 - math.sqrt(1 - left)
    return warm * (t.lr_end + (peak - t.lr_end) * share)
