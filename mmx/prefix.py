"""A prefix that was read once, in a file: a long document's states, keys and values, to be asked often.

The file is NumPy's .npz, without pickles: the arrays of a row's cache, and a line of JSON that says whose they are. It
stands beside its destination until it is whole.
"""
import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mmx import atomic
from mmx.config import ConfigError
from mmx.inference import Prefix
from mmx.parallel.cache import empty_cache, kv_dtype

SAMPLE = 64     # values at either end of a parameter that tell a model from another
FREE = {"impl", "chunk", "remat", "keep_arrived", "transport", "token_groups", "ragged", "context", "aux", "aux_weight",
        "z_weight", "init", "embed_std", "vision"}      # of a model's config: what no cache hangs on


def save(path: str | Path, loaded, prefix: Prefix) -> None:
    """Writes a prefix of `inference.read`; an existing file is replaced once the new one is whole."""
    names = {}
    for name, x in _flat(prefix.cache).items():
        x = np.asarray(x)
        names[name] = x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x
    about = {"last": prefix.last, "length": prefix.length, "model": _model(loaded), "kv_dtype": kv_dtype(prefix.cache)}
    with atomic.replacing(path, "wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **names)


def load(path: str | Path, loaded) -> Prefix:
    """A prefix as `save` wrote it. Raises ConfigError where it is damaged, or another model's."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about, arrays = json.loads(str(file["about"])), {name: file[name] for name in file.files if name != "about"}
        last, length, kind, model = (about[name] for name in ("last", "length", "kv_dtype", "model"))
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        raise ConfigError(f"{path} is no prefix that --save-cache wrote, or it is damaged") from None
    if model != _model(loaded):
        raise ConfigError(f"{path} was read by another model: give the checkpoint and the dtypes that it was saved with")
    whole = jax.eval_shape(lambda: empty_cache(loaded.config, 1, length - 1, kind))
    want = _flat(whole)
    for name, x in want.items():
        if name not in arrays or arrays[name].shape != x.shape or arrays[name].itemsize != x.dtype.itemsize:
            raise ConfigError(f"{path} is damaged: {name} should be {x.dtype} of shape {x.shape}")
    leaves = [jnp.asarray(arrays[name].view(x.dtype) if x.dtype == jnp.bfloat16 else arrays[name]) for name, x in want.items()]
    return Prefix(jax.tree.unflatten(jax.tree.structure(whole), leaves), last, length)


def _model(loaded) -> str:
    """What tells a model and its parameters from others, short of reading all of them."""
    function = {name: value for name, value in dataclasses.asdict(loaded.config).items() if name not in FREE}
    digest = hashlib.sha256(json.dumps(function, sort_keys=True).encode())
    for path, w in jax.tree_util.tree_leaves_with_path(loaded.params):
        first, last = (w[(at,) * (w.ndim - 1)] for at in (0, -1))        # not the whole, copied flat
        ends = jnp.concatenate([first[:SAMPLE], last[-SAMPLE:]])
        digest.update(f"{jax.tree_util.keystr(path)}{w.shape}{w.dtype}".encode() + np.asarray(ends).tobytes())
    return digest.hexdigest()


def _flat(cache) -> dict:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree_util.tree_leaves_with_path(cache)}

