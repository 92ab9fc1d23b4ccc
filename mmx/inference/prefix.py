"""A prefix that was read once, in a file: a long document's states, keys and values, to be asked often.

The file is NumPy's .npz, without pickles: the arrays of a row's cache, and a line of JSON that says whose they are. It
stands beside its destination until it is whole.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mmx.config import IMPLEMENTATION_KEYS, ConfigError
from mmx.files import atomic, untrusted
from mmx.inference.engine import Prefix
from mmx.model import empty_cache
from mmx.parallel.cache import kv_dtype

SAMPLE = 64     # values at either end of a parameter that tell a model from another
ABOUT_BYTES, HEADER_BYTES = 1 << 16, 10_000       # of the line of JSON, and of what NumPy and zip put before an array
FREE = {*IMPLEMENTATION_KEYS, "transport", "context", "aux", "aux_weight", "z_weight", "init", "embed_std",
        "vision"}       # no cache depends on it


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
    if not Path(path).is_file():
        raise ConfigError(f"{path} is missing, or no file")
    with _damage_told(path), zipfile.ZipFile(path) as file:
        about = untrusted.loads(str(_array(file, "about", ABOUT_BYTES)))
        last, length, kind, model = (about[name] for name in ("last", "length", "kv_dtype", "model"))
        if not (type(last) is int and 0 <= last < loaded.config.vocab and type(length) is int and 0 < length < 2 ** 31):
            raise ValueError(about)
        if kind not in ("", "float32", "bfloat16", "int8", "float64"):
            raise ValueError(kind)
    if model != _model(loaded):
        raise ConfigError(f"{path} was read by another model: give the checkpoint and the dtypes that it was saved with")
    whole = jax.eval_shape(lambda: empty_cache(loaded.config, 1, length - 1, kind))
    leaves = []
    for name, x in _flat(whole).items():
        kept = np.dtype(np.uint16 if x.dtype == jnp.bfloat16 else x.dtype)
        with _damage_told(path, f": {name} should be {x.dtype} of shape {x.shape}"), zipfile.ZipFile(path) as file:
            leaves.append(jnp.asarray(_array(file, name, x.size * kept.itemsize, x.shape, kept).view(x.dtype)))
    return Prefix(jax.tree.unflatten(jax.tree.structure(whole), leaves), last, length)


@contextlib.contextmanager
def _damage_told(path, what: str = ""):
    """zipfile, zlib and NumPy have as many kinds of errors as there are damages."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception:
        raise ConfigError(f"{path} is no prefix that --save-cache wrote, or it is damaged{what}") from None


def _array(file: zipfile.ZipFile, name: str, most: int, shape=None, dtype=None) -> np.ndarray:
    """An array of an .npz of at most `most` bytes, of this shape and type where they are given. Raises ValueError for another,
    KeyError for none; what its header says of its size is held against the file's before any is read."""
    info = file.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most + HEADER_BYTES or info.compress_size > info.file_size:
        raise ValueError(name)
    with file.open(info) as data:
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            np.lib.format.read_magic(data)]
        there, fortran, kind = header(data, max_header_size=HEADER_BYTES)
        if kind.hasobject or fortran or (shape is not None and (there, kind) != (shape, dtype)):
            raise ValueError(name)
        size = math.prod(there) * kind.itemsize
        if size > most or size > info.file_size:
            raise ValueError(name)
        return np.frombuffer(data.read(size), kind).reshape(there)


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

