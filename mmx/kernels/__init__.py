"""Functions on arrays; `mmx.kernels.lightning` and `mmx.kernels.attention` are imported when first used."""
import importlib


def __getattr__(name):
    if name in ("attention", "lightning"):
        return importlib.import_module(f"mmx.kernels.{name}")
    raise AttributeError(f"module 'mmx.kernels' has no attribute {name!r}")
