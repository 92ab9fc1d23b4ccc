"""mmx is a JAX implementation of MiniMax-01: lightning and softmax attention, with mixture-of-experts layers.

    loaded = mmx.load("demo")                               # a workdir of `mmx train`, or a Hugging Face directory
    logits_BTW = mmx.forward(loaded, tokens_BT)             # batch B, tokens T, vocabulary W; works under jax.jit and jax.grad
    texts = mmx.generate(loaded, ["The state of the Union"], steps=200, temperature=0.8)
    torch_model = mmx.torch.load("run-hf")                  # a transformers model, from a Hugging Face directory

docs/python.md describes these calls. They are imported at first use, so that importing mmx does not import JAX.
"""
import importlib

__version__ = "0.1.0"

FUNCTIONS = {"load": "mmx.checkpoints.convert", "forward": "mmx.inference.forward", "generate": "mmx.inference.engine"}
MODULES = ("config", "kernels", "torch")
__all__ = [*FUNCTIONS, *MODULES]


def __getattr__(name):
    if name in FUNCTIONS:
        return getattr(importlib.import_module(FUNCTIONS[name]), name)
    if name in MODULES:
        return importlib.import_module(f"mmx.{name}")
    raise AttributeError(f"module 'mmx' has no attribute {name!r}")
