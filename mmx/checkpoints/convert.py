"""Converts checkpoints between mmx's form (a workdir) and the released one (a Hugging Face directory), and loads both.

A conversion reads and writes slices of the parameters (`hf_layout.leaves`) of at most `hf_layout.SLICE_BYTES`, so its memory
does not depend on the size of the model. It writes into a temporary directory, which is renamed at the end.
"""
import contextlib
import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmx import config
from mmx.checkpoints import hf_config, hf_layout, manager, run_config, safetensors, side_files, tokenizer_files
from mmx.checkpoints.casts import DTYPES, cast, find_dtype
from mmx.checkpoints.shapes import check_shapes
from mmx.checkpoints.tokenizer_files import BYTE_IDS
from mmx.config import ConfigError
from mmx.data import special_tokens, tokens
from mmx.files import atomic, hub, notes, output, untrusted
from mmx.kernels import int8
from mmx.model import Model
from mmx.parallel import sharding

DIALECTS = ("transformers", "released")


class Loaded(NamedTuple):
    """A model and its parameters, ready to run."""
    model: object           # the Flax module
    params: dict            # plain nested dict
    config: config.Model
    tokenizer: str          # "bytes", the path of a tokenizer.json, or "" if the checkpoint has none

    def __repr__(self):
        count = sum(x.size for x in jax.tree.leaves(self.params))
        return f"Loaded({count:,} parameters, {self.config}, tokenizer={self.tokenizer!r})"


class ReleasedSource:
    """A checkpoint in released form. All names and shapes are checked before the first slice is read."""

    def __init__(self, directory: Path):
        file = directory / "config.json"
        self.directory = self.side_files = directory
        self.json = untrusted.read_json(untrusted.check_link(file))
        self.arguments = hf_config.read_model(self.json, file)
        self.model = config.build({"model": self.arguments}).model
        self.tensors = safetensors.find_tensors(directory)
        safetensors.check_tensors(self.tensors, self.model, directory)
        self.tokenizer = tokenizer_files.find_tokenizer(directory, self.ids())

    def ids(self) -> dict:
        """The ids of bos, eos and pad that generation_config.json or config.json has; eos may be a list."""
        return special_tokens.as_json(special_tokens.stored_ids(self.side_files))

    def dtype(self, leaf) -> np.dtype:
        """The dtype of a leaf; float32 if its tensors have several."""
        found = {self.tensors[name].dtype for _, name in leaf.tensors()}
        return found.pop() if len(found) == 1 else DTYPES["float32"]

    def read(self, files, leaf, piece) -> np.ndarray:
        """Reads a slice of a leaf."""
        return leaf.from_released(safetensors.read_piece(files, self.tensors[piece.name], leaf, piece))

    def read_leaf(self, files, leaf) -> np.ndarray:
        """Reads a whole leaf."""
        dtype = self.dtype(leaf)
        array = np.empty(leaf.shape, dtype)
        for piece in leaf.slices(dtype.itemsize):
            array[piece.index] = cast(self.read(files, leaf, piece), dtype, piece.name)
        return array

    def reader(self, files, leaf):
        """A function that returns the part of a leaf at an index. It keeps the whole leaf in memory."""
        return self.read_leaf(files, leaf).__getitem__


class WorkdirSource:
    """The parameters of a saved step of a workdir."""

    def __init__(self, workdir: Path, step: Path):
        text = run_config.read_config(workdir)
        experiment = config.build(text)
        self.model, self.arguments = experiment.model, text["model"]
        manager.verify_item(step, "params")
        self.arrays = manager.open_arrays(step)
        check_shapes({"/".join(path): array.shape for path, array in self.arrays.items()},
                              {"/".join(leaf.path): leaf.shape for leaf in hf_layout.leaves(self.model)}, step)
        for path, array in self.arrays.items():
            if array.dtype.numpy_dtype not in safetensors.DTYPE_CODES:
                raise ConfigError(f"{step}: tensor {'.'.join(path)} has dtype {array.dtype.name}; supported are "
                                  f"{', '.join(map(str, safetensors.DTYPE_CODES))}")
        # a workdir that `from_hf` wrote and that no run has changed contains the side files of the released checkpoint
        self.directory, self.side_files = workdir, None if "data" in text else workdir
        file = workdir / "tokenizer.json"
        if self.side_files:
            self.tokenizer = tokenizer_files.find_tokenizer(workdir, self.ids())
        else:
            self.tokenizer = str(file) if file.exists() else experiment.data.tokenizer

    def ids(self) -> dict:
        """The ids of bos, eos and pad; eos may be a list."""
        if self.side_files:
            return special_tokens.as_json(special_tokens.stored_ids(self.side_files))
        tokenizer = tokens.tokenizer(self.tokenizer)
        return tokens.special_ids(tokenizer) if tokenizer.vocab <= self.model.vocab else dict.fromkeys(BYTE_IDS)

    def dtype(self, leaf) -> np.dtype:
        return self.arrays[leaf.path].dtype.numpy_dtype

    def read(self, files, leaf, piece) -> np.ndarray:
        return manager.read_slice(self.arrays[leaf.path], piece.index)

    def read_leaf(self, files, leaf) -> np.ndarray:
        return manager.read_slice(self.arrays[leaf.path])

    def reader(self, files, leaf):
        """A function that reads the part of a leaf at an index."""
        return functools.partial(manager.read_slice, self.arrays[leaf.path])


def open_source(path: str | Path) -> ReleasedSource | WorkdirSource:
    """Opens a workdir (its latest step), one of its checkpoints/STEP, or a Hugging Face directory, on disk or on the Hub."""
    path = Path(hub.resolve(path)).absolute()
    if not path.is_dir():
        raise ConfigError(f"checkpoint {path} is not a directory")
    found = manager.find_step(path)
    if found:
        return WorkdirSource(*found)
    if (path / "checkpoints").is_dir() and not manager.is_hugging_face(path):
        raise ConfigError(f"{path} contains no saved step: train longer than checkpoint.every")
    if (path / "config.json").exists():
        return ReleasedSource(path)
    raise ConfigError(f"{path} is neither a workdir (checkpoints/STEP) nor a Hugging Face directory (config.json)")


def find_model(path: str | Path) -> config.Model:
    """The config of a checkpoint's model. Does not read a workdir's tensors."""
    found = manager.find_step(path)
    return config.build(run_config.read_config(found[0])).model if found else open_source(path).model


def from_hf(path: str | Path, out: str | Path, dtype: str | None = None, progress: bool = True) -> Path:
    """Writes the parameters of a checkpoint as step 0 of a new workdir.

    Args:
      path: a checkpoint in either form.
      out: the new workdir.
      dtype: "float32", "bfloat16" or "float16"; None: the dtype of each array stays.
    Returns:
      `out`.
    """
    source = open_source(path)
    with _destination(out) as partial:
        leaves = hf_layout.leaves(source.model)
        dtypes = {leaf.path: find_dtype(dtype) or source.dtype(leaf) for leaf in leaves}
        arrays = manager.create_params(partial / "checkpoints" / "0", {
            leaf.path: (leaf.shape, dtypes[leaf.path], leaf.slice_shape(source.dtype(leaf).itemsize)) for leaf in leaves})

        def write(leaf, piece, slice_):
            slice_ = cast(slice_, dtypes[leaf.path], piece.name)
            with manager.storage_errors(f"{out} cannot be written"):
                arrays[leaf.path][piece.index].write(slice_).result()

        _stream(source, leaves, write, progress)
        (partial / "config.json").write_text(json.dumps({"model": source.arguments}, indent=1))
        side_files.write_list(partial, copy_side_files(source, partial))
        _write_ids(source, partial)
    return Path(out)


def to_hf(path: str | Path, out: str | Path, dialect: str = "transformers", dtype: str | None = None,
          shard_bytes: int = 4_000_000_000, progress: bool = True) -> Path:
    """Writes a checkpoint in released form.

    Args:
      path: a checkpoint in either form.
      out: the new directory.
      dialect: "released": config.json has the released keys. "transformers": it has the keys of transformers too, and if the
        number of heads is not a power of two, the files contain decay buffers, because transformers computes other decays.
      dtype: "float32", "bfloat16" or "float16"; None: the dtype of each array stays.
      shard_bytes: most bytes of tensors in one file, unless a single tensor is larger.
    Returns:
      `out`.
    """
    if dialect not in DIALECTS:
        raise ConfigError(f"dialect {dialect!r} is none of {', '.join(DIALECTS)}")
    if shard_bytes <= 0:
        raise ConfigError(f"shard-bytes {shard_bytes} must be positive")
    source = open_source(path)
    model, leaves = source.model, hf_layout.leaves(source.model)
    dtypes = {leaf.path: find_dtype(dtype) or source.dtype(leaf) for leaf in leaves}
    tensors = {name: (dtypes[leaf.path], leaf.tensor_shape) for leaf in leaves for _, name in leaf.tensors()}
    buffers = {}
    if dialect == "transformers" and model.heads & (model.heads - 1):
        prefix = hf_layout.name_root(model) + "model.layers"
        buffers = {f"{prefix}.{l}.self_attn.{name}": (l, name) for l, kind in enumerate(model.layer_kinds)
                   if kind == "L" for name in hf_layout.DECAY_BUFFERS}
        shapes = {name: value.shape for name, value in hf_layout.decay_buffers(model, 0).items()}
        tensors |= {name: (DTYPES["float32"], shapes[kind]) for name, (_, kind) in buffers.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: _sort_key(item[0])))
    text = hf_config.write_model(model, dialect, dtypes[("embed_WD",)].name, source.ids())
    with _destination(out) as partial, safetensors.Files(os.O_WRONLY) as files:
        places = safetensors.plan_files(partial, tensors, shard_bytes)

        def write(leaf, piece, slice_):
            block = leaf.to_released(cast(slice_, dtypes[leaf.path], piece.name))
            safetensors.write_piece(files, places[piece.name], leaf, piece, block)

        _stream(source, leaves, write, progress)
        for name, (layer, kind) in buffers.items():
            values = hf_layout.decay_buffers(model, layer)[kind]
            files.write(places[name].file, memoryview(values.reshape(-1).view(np.uint8)), places[name].offset)
        (partial / "config.json").write_text(json.dumps(text, indent=1))
        copy_side_files(source, partial)
        _write_ids(source, partial)
        tokenizer_files.write_tokenizer(source.tokenizer, partial, out)
    if differences := hf_config.stock_differences(model, dialect, dtypes[("embed_WD",)].name):
        notes.note(f"{out}: {differences}")
    return Path(out)


def _sort_key(name: str) -> tuple[bool, float]:
    """Sorts tensors in released order: vision, embedding, layers, final norm and head."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    first = -1 if ".embed" in name else float("inf")
    return not name.startswith(("vision", "multi", "image")), int(layer[1]) if layer else first


def _stream(source, leaves, write, progress: bool):
    """Reads each slice of the leaves and passes it to write(leaf, piece, slice), with a progress bar."""
    total = sum(np.prod(leaf.shape, dtype=np.int64) * source.dtype(leaf).itemsize for leaf in leaves)
    bar = output.bar(total=int(total), unit="B", unit_scale=True, disable=not progress)
    with safetensors.Files(os.O_RDONLY) as files, bar:
        for leaf in leaves:
            for piece in leaf.slices(source.dtype(leaf).itemsize):
                bar.set_postfix_str(piece.name, refresh=False)
                slice_ = source.read(files, leaf, piece)
                write(leaf, piece, slice_)
                bar.update(slice_.nbytes)


@contextlib.contextmanager
def _destination(out: str | Path):
    """Yields a temporary directory. Renames it to `out` at the end; removes it if the block raises."""
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; give another --out, or remove it")
    with atomic.temporary(out) as partial:
        partial.mkdir(parents=True)
        with atomic.add_filename(out):
            yield partial
        partial.replace(out)


def copy_side_files(source, out: Path) -> list[str]:
    """Copies the files beside the tensors of a source that `out` does not have; returns their names.

    The tokenizer.json of the byte tokenizer is not copied: an export gets a new one.
    """
    names = side_files.find(source.directory, isinstance(source, WorkdirSource))
    copied = side_files.copy(source.directory, names, out, ("tokenizer.json",) if source.tokenizer == "bytes" else ())
    if not (out / "tokenizer.json").exists() and config.tokenizer_file(source.tokenizer):
        (out / "tokenizer.json").write_bytes(untrusted.read_bytes(source.tokenizer, untrusted.TOKENIZER_BYTES))
    return copied


def _write_ids(source, out: Path) -> None:
    """Adds the ids of bos, eos and pad that generation_config.json lacks: a workdir has no config.json with these ids."""
    path, ids = out / "generation_config.json", source.ids()
    saved = untrusted.read_json(path) if path.exists() else {}
    if not saved or any(saved.get(key) is None and ids[key] is not None for key in ids):
        path.write_text(json.dumps(saved | ids, indent=1))


def unflatten(flat: dict[tuple[str, ...], object]) -> dict:
    """Returns a nested dict from a dict of paths."""
    tree = {}
    for (*folders, name), value in flat.items():
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[name] = value
    return tree


def load(path: str | Path, dtype=None, weights_dtype: str | None = None) -> Loaded:
    """Loads a checkpoint in either form for inference.

    The loaded model drops no tokens, and selects its kernels for the devices of this machine. On a mesh (jax.set_mesh) each
    device gets its shard. The host needs memory for one parameter array at a time: one array of the scanned layers contains a
    parameter of every repeat of the pattern.

    Args:
      path: a workdir, one of its checkpoints/STEP, or a Hugging Face directory.
      dtype: the dtype of the parameters, as a name or as NumPy and JAX accept one; None: as stored.
      weights_dtype: "int8" quantizes the matrices (`kernels.int8`), slice by slice; None: does not.
    """
    source = open_source(path)
    param_dtype = find_dtype(dtype)
    if weights_dtype not in (None, "int8"):
        raise ConfigError(f"weights_dtype {weights_dtype!r} must be int8")
    params = {}
    with safetensors.Files(os.O_RDONLY) as files:
        for leaf in hf_layout.leaves(source.model):
            name = leaf.path[-1]
            stored = source.dtype(leaf)
            # without x64, JAX would turn float64 into float32 without checking the values
            wanted = param_dtype or (DTYPES["float32"] if stored.itemsize > 4 and not jax.config.jax_enable_x64 else stored)
            if weights_dtype and leaf.path[0] != "vision" and int8.contracted_axes(name):
                w = _read_int8(source, files, leaf)
            else:
                w = cast(source.read_leaf(files, leaf), wanted, leaf.name)
            letters = name.rpartition("_")[2]
            params[leaf.path] = jax.tree.map(lambda x: jax.device_put(x, sharding.weight_sharding(letters, x.shape)), w)
    half = params[("embed_WD",)].dtype == jnp.bfloat16
    compute = "bfloat16" if half else source.model.dtype if dtype is None else "float32"
    model = dataclasses.replace(source.model.portable(), capacity=0.0, transport=0.0, dtype=compute)
    return Loaded(Model(model), unflatten(params), model, source.tokenizer)


def _read_int8(source, files, leaf) -> int8.Int8:
    """Reads a leaf and quantizes it."""
    axes = int8.contracted_axes(leaf.path[-1])
    scale_shape = [1 if axis - len(leaf.shape) in axes else n for axis, n in enumerate(leaf.shape)]
    values, scale = np.empty(leaf.shape, np.int8), np.empty(scale_shape, np.float32)
    for piece in leaf.slices(source.dtype(leaf).itemsize):      # a slice contains whole channels
        block = cast(source.read(files, leaf, piece), np.float32, piece.name)
        if not np.isfinite(block).all():
            raise ConfigError(f"tensor {piece.name} contains values that are not finite; int8 cannot represent them")
        scale_index = [*piece.index, *[slice(None)] * (len(leaf.shape) - len(piece.index))]
        for axis in axes:
            scale_index[axis] = slice(None)
        values[piece.index], scale[tuple(scale_index)] = int8.quantize(block, axes)
    return int8.Int8(values, scale)


