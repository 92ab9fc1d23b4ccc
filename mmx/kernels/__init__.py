"""Functions on arrays: lightning attention, softmax attention, rotary positions, experts' products, int8 weights.

Axes are named by the letters of `mmx.dims`. N is chunks or blocks of queries; Q is the tokens of one of these, or the rows of
one block of an expert. Lower-case letters are axes that only kernels have:

    p  tokens of the chunk, or keys of the block, that are multiplied with the Q tokens
    u  blocks of keys (attention/xla.py)
    n  spans of several chunks (lightning/gpu.py)
    c  boundaries of chunks: before every chunk and after the last, N + 1
    w  width of an output, K or V (lightning/tpu.py)
    j  choices of a token: its top-k experts
    r  rows sorted by expert
    i  input width of a product with an expert's matrix
    o  its output width

`mmx.kernels.lightning` and `mmx.kernels.attention` are imported when they are first used.
"""
import importlib

# Implementations of lightning attention: the values of `impl`, and of `model.impl` in a configuration.
LIGHTNING_IMPLS = "xla", "tpu", "gpu", "triton"


def __getattr__(name):
    if name in ("attention", "lightning"):
        return importlib.import_module(f"mmx.kernels.{name}")
    raise AttributeError(f"module 'mmx.kernels' has no attribute {name!r}")
