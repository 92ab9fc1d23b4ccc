"""mmx: MiniMax-01 in JAX. Train, convert, sample and study hybrid lightning-attention mixtures of experts.

    loaded = mmx.load("demo")                               # a workdir, or a Hugging Face directory
    logits_BTW = mmx.forward(loaded, tokens_BT)
    texts = mmx.generate(loaded, ["The state of the Union"], steps=200, temperature=0.8)
    texts = mmx.generate(sees, "<image> What is this?", images=["a.png"], steps=50)     # a checkpoint with vision

Names are imported when first used, so that `mmx config` and the data need no accelerator.
"""
import importlib

__version__ = "0.1.0"

FUNCTIONS = {"load": "mmx.checkpoints.convert", "forward": "mmx.inference.engine", "generate": "mmx.inference.engine"}
MODULES = ("config", "kernels", "torch")
__all__ = [*FUNCTIONS, *MODULES]


def __getattr__(name):
    if name in FUNCTIONS:
        return getattr(importlib.import_module(FUNCTIONS[name]), name)
    if name in MODULES:
        return importlib.import_module(f"mmx.{name}")
    raise AttributeError(f"module 'mmx' has no attribute {name!r}")
