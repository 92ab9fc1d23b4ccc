"""Sampling: how the next token is chosen from the logits."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ConfigError, nearest


class Sampling(NamedTuple):
    """How a continuation is sampled, and where its text ends."""
    temperature: float = 0.0        # 0: greedy, the most likely token
    top_k: int = 0                  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0              # sample from the most likely tokens whose probabilities sum to top_p
    seed: int = 0                   # the same seed gives the same draws
    stop: tuple[str, ...] = ()      # the text ends before the first of these strings

    @classmethod
    def of(cls, caller: str, keywords: dict) -> "Sampling":
        """The keywords of a call as a Sampling. Raises TypeError for a keyword that `caller` does not have."""
        for name in keywords:
            if name not in cls._fields:
                raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}{nearest(name, cls._fields)}")
        sampling = cls(**keywords)
        return sampling._replace(stop=(sampling.stop,) if isinstance(sampling.stop, str) else tuple(sampling.stop))


class SlotSampling(NamedTuple):
    """The sampling parameters of each slot of a batch."""
    temperature_B: np.ndarray
    top_k_B: np.ndarray         # from 1 to the size of the vocabulary
    top_p_B: np.ndarray


def check_sampling(sampling: Sampling):
    """Raises ConfigError for a parameter that is out of range."""
    temperature, top_k, top_p, seed, stop = sampling
    for name, value in (("top_k", top_k), ("seed", seed)):
        if not isinstance(value, (int, np.integer)):
            raise ConfigError(f"{name}={value!r} must be a whole number")
    if isinstance(stop, str):
        raise ConfigError(f"stop={stop!r} must be a tuple of strings: ({stop!r},)")
    if not all(stop):
        raise ConfigError("stop contains an empty string, which every text contains: leave it out")
    for name, value, good, allowed in (
            ("temperature", temperature, temperature >= 0, "at least 0"),
            ("top_k", top_k, 0 <= top_k < 2**31, "from 0 (all tokens) to 2^31 - 1"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
            ("seed", seed, 0 <= seed < 2**32, "from 0 to 2^32 - 1")):
        if not good:
            raise ConfigError(f"{name}={value} is out of range: it must be {allowed}")


def sample_tokens(logits_BW, key_B, sampling: SlotSampling | None):
    """The next token of each slot.

    A slot of temperature 0 takes its most likely token; so do all slots where `sampling` is None, without sorting any
    logits. The others draw from the tokens that top-k and top-p keep, by the Gumbel-max method.
    """
    likeliest_B = jnp.argmax(logits_BW, axis=1).astype(jnp.int32)
    if sampling is None:
        return likeliest_B
    W = logits_BW.shape[1]
    temperature_B, top_k_B, top_p_B = map(jnp.asarray, sampling)
    logits_BW = logits_BW.astype(jnp.float32) / jnp.where(temperature_B > 0, temperature_B, 1)[:, None]
    sorted_BW = jnp.sort(logits_BW, axis=1, descending=True)
    p_BW = jax.nn.softmax(jnp.where(jnp.arange(W) < top_k_B[:, None], sorted_BW, -jnp.inf))
    above_BW = jnp.cumsum(p_BW, axis=1) - p_BW              # the probability of all likelier tokens
    kept_B1 = jnp.sum((above_BW < top_p_B[:, None]) & (p_BW > 0), axis=1, keepdims=True)
    threshold_B1 = jnp.take_along_axis(sorted_BW, jnp.maximum(kept_B1, 1) - 1, axis=1)
    noise_BW = jax.vmap(lambda key: jax.random.gumbel(key, (W,)))(key_B)
    drawn_B = jnp.argmax(jnp.where(logits_BW >= threshold_B1, logits_BW + noise_BW, -jnp.inf), axis=1).astype(jnp.int32)
    return jnp.where(temperature_B > 0, drawn_B, likeliest_B)
