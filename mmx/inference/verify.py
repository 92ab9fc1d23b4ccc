"""Comparison of two checkpoints by their logits."""
from pathlib import Path

import jax
import numpy as np

from mmx.checkpoints import finite
from mmx.checkpoints.convert import find_model, load
from mmx.config import ConfigError, NonFiniteError
from mmx.inference.forward import forward


def verify(a: str | Path, b: str | Path, torch: bool = False, weights_dtype: str | None = None, batch: int = 2,
           length: int = 64, seed: int = 0) -> dict[str, float]:
    """The largest difference between the logits of two checkpoints on random tokens, in float32.

    mmx runs checkpoint `a`. The keys of the result name the implementation that runs `b`: "mmx", with `weights_dtype` as in
    `mmx.load`; or with `torch=True` "mmx.torch", which gives the logits of the released code, and "stock transformers", which
    gives other logits.
    """
    first, vocab = load(a, "float32"), find_model(b).vocab
    if first.config.vocab != vocab:
        raise ConfigError(f"{a} has a vocabulary of {first.config.vocab}, {b} one of {vocab}: their logits cannot be compared")
    tokens_BT = np.random.default_rng(seed).integers(vocab, size=(batch, length))
    with jax.default_matmul_precision("highest"):
        logits_BTW = forward(first, tokens_BT)
        finite.check(logits_BTW, first.params, f"the logits of {a}")
        if torch:
            from mmx import torch as transformers

            loaders = {"mmx.torch": transformers.load, "stock transformers": transformers.load_stock}
            others = {name: transformers.logits(load_with(b), tokens_BT) for name, load_with in loaders.items()}
        else:
            others = {"mmx": forward(load(b, "float32", weights_dtype), tokens_BT)}
    for name, other_BTW in others.items():
        if not np.isfinite(other_BTW).all():
            raise NonFiniteError(f"the logits of {b}, computed by {name}, are not finite: the checkpoint is damaged, or the "
                                 "computation overflows")
    return {name: float(np.abs(logits_BTW - other_BTW).max()) for name, other_BTW in others.items()}
