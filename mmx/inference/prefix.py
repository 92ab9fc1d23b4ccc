"""Prefix files: the cache of a long prompt, saved once and loaded by any number of later runs.

The file is NumPy's .npz without pickles. It contains the arrays of a one-row cache, and one line of JSON that identifies
the model. It is written under a temporary name and renamed when it is complete.
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

from mmx.checkpoints import finite
from mmx.checkpoints.tokenizer_files import fingerprint
from mmx.config import IMPLEMENTATION_KEYS, ConfigError
from mmx.data.tokens import TAIL
from mmx.files import atomic, json_text, untrusted
from mmx.inference.engine import Prefix, Tail
from mmx.model import empty_cache
from mmx.parallel.cache import kv_dtype

SAMPLE = 64                     # values from each end of a parameter that go into the fingerprint
ABOUT_BYTES = 1 << 16           # most bytes of the line of JSON
HEADER_BYTES = 10_000           # most bytes that NumPy and zip put before an array
# keys of the model's config that do not change a cache
IGNORED = {*IMPLEMENTATION_KEYS, "transport", "context", "aux", "aux_weight", "z_weight", "init", "embed_std", "vision"}


def save(path: str | Path, loaded, prefix: Prefix) -> None:
    """Writes a prefix of `engine.make_prefix`. An existing file is replaced once the new one is complete."""
    arrays = {}
    for name, x in _flat(prefix.cache).items():
        x = np.asarray(x)
        finite.check(x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x, loaded.params, f"the cached {name}")
        arrays[name] = x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x
    about = {"last": prefix.last, "length": prefix.length, "tail": prefix.tail, "model": _fingerprint(loaded),
             "kv_dtype": kv_dtype(prefix.cache), **_optional(loaded)}
    with atomic.replacing(path, "wb") as file:
        np.savez(file, about=np.array(json_text.dumps(about)), **arrays)


def load(path: str | Path, loaded) -> Prefix:
    """Reads a prefix that `save` wrote. Raises ConfigError if the file is damaged, or belongs to another model."""
    if not Path(path).is_file():
        raise ConfigError(f"prefix file {path} does not exist, or is not a file")
    with _damage_reported(path), zipfile.ZipFile(path) as file:
        about = untrusted.loads(str(_read_array(file, "about", ABOUT_BYTES)))
        last, length, dtype, model = (about[name] for name in ("last", "length", "kv_dtype", "model"))
        if not (type(last) is int and 0 <= last < loaded.config.vocab and type(length) is int and 0 < length < 2 ** 31):
            raise ValueError(about)
        tail = about.get("tail", [])
        if not (isinstance(tail, list) and len(tail) <= TAIL
                and all(type(i) is int and 0 <= i < loaded.config.vocab for i in tail)):
            raise ValueError(tail)
        if dtype not in ("", "float32", "bfloat16", "int8", "float64"):
            raise ValueError(dtype)
    for name, value in _optional(loaded).items():       # files of earlier versions do not have them
        if about.get(name, value) != value:
            raise ConfigError(f"{path} was made with another {name}: use the checkpoint that it was saved with")
    if model != _fingerprint(loaded):
        raise ConfigError(f"{path} was made with another model: use the checkpoint and the dtypes that it was saved with")
    expected = jax.eval_shape(lambda: empty_cache(loaded.config, 1, length - 1, dtype))
    leaves = []
    for name, x in _flat(expected).items():
        stored = np.dtype(np.uint16 if x.dtype == jnp.bfloat16 else x.dtype)
        with _damage_reported(path, f": {name} should be {x.dtype} of shape {x.shape}"), zipfile.ZipFile(path) as file:
            leaves.append(jnp.asarray(_read_array(file, name, x.size * stored.itemsize, x.shape, stored).view(x.dtype)))
    return Prefix(jax.tree.unflatten(jax.tree.structure(expected), leaves), last, length, Tail(tail))


@contextlib.contextmanager
def _damage_reported(path, detail: str = ""):
    """Turns all errors of zipfile, zlib and NumPy for a damaged file into a ConfigError."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception:
        raise ConfigError(f"{path} is not a prefix file written by --save-cache, or it is damaged{detail}") from None


def _read_array(file: zipfile.ZipFile, name: str, limit: int, shape=None, dtype=None) -> np.ndarray:
    """Reads an array of at most `limit` bytes from an .npz file.

    The sizes that the headers give are checked before any data is read. Raises KeyError if there is no such array, and
    ValueError if it is too large, compressed, or not of the given shape and dtype.
    """
    info = file.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit + HEADER_BYTES or info.compress_size > info.file_size:
        raise ValueError(name)
    with file.open(info) as data:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            np.lib.format.read_magic(data)]
        stored_shape, fortran, stored_dtype = read_header(data, max_header_size=HEADER_BYTES)
        if stored_dtype.hasobject or fortran or (shape is not None and (stored_shape, stored_dtype) != (shape, dtype)):
            raise ValueError(name)
        size = math.prod(stored_shape) * stored_dtype.itemsize
        if size > limit or size > info.file_size:
            raise ValueError(name)
        return np.frombuffer(data.read(size), stored_dtype).reshape(stored_shape)


def _fingerprint(loaded) -> str:
    """A digest of the config and of both ends of each parameter: it distinguishes models without reading all weights."""
    function = {name: value for name, value in dataclasses.asdict(loaded.config).items() if name not in IGNORED}
    digest = hashlib.sha256(json.dumps(function, sort_keys=True).encode())
    for path, w in jax.tree_util.tree_leaves_with_path(loaded.params):
        first, last = (w[(at,) * (w.ndim - 1)] for at in (0, -1))       # rows: flattening would copy the whole parameter
        ends = jnp.concatenate([first[:SAMPLE], last[-SAMPLE:]])
        digest.update(f"{jax.tree_util.keystr(path)}{w.shape}{w.dtype}".encode() + np.asarray(ends).tobytes())
    return digest.hexdigest()


def _optional(loaded) -> dict[str, str]:
    """What the cached tokens depend on besides `_fingerprint`: the tokenizer, and how images become patches."""
    found = {"tokenizer": fingerprint(loaded.tokenizer)} if loaded.tokenizer else {}
    if loaded.config.vision.layers:
        found["image encoder"] = json.dumps(dataclasses.asdict(loaded.config.vision))
    return found


def _flat(cache) -> dict:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree_util.tree_leaves_with_path(cache)}
