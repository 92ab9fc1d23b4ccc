"""Functions on arrays: lightning attention, softmax attention, rotary positions, experts' products, int8 weights.

Axes are named by the letters of `mmx.dims`. These letters are additions, or mean something else in this package than in
`mmx.dims`:

    N  number of parts that a sequence is cut into: chunks, spans of chunks (lightning/gpu.py) or blocks of queries
    Q  tokens of one chunk, query rows of one block, or rows of one block of an expert
    P  tokens of the chunk or block of keys that Q meets
    U  number of blocks of keys (attention/xla.py)
    C  boundaries of chunks: before every chunk and after the last, N + 1
    W  width of an output, K or V (lightning/tpu.py)
    J  choices of a token: its top-k experts
    I  rows sorted by expert
    A  input width of a product with an expert's matrix
    O  its output width

`mmx.kernels.lightning` and `mmx.kernels.attention` are imported when they are first used.
"""
import importlib

# Implementations of lightning attention: the values of `impl`, and of `model.impl` in a configuration.
LIGHTNING_IMPLS = "xla", "tpu", "gpu", "triton"


def __getattr__(name):
    if name in ("attention", "lightning"):
        return importlib.import_module(f"mmx.kernels.{name}")
    raise AttributeError(f"module 'mmx.kernels' has no attribute {name!r}")
