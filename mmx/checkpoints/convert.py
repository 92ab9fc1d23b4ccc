"""Conversion between mmx checkpoints and the released form, both ways and in slices; loading and comparing of either.

A source gives slices of leaves, a conversion writes them: both walk `released.leaves`. Memory is a few slices of
`released.SLICE_BYTES`, whatever the size of the model. What is written stands beside its destination until it is whole.
"""
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from mmx import config
from mmx.checkpoints import hf_config, hf_layout, manager, safetensors
from mmx.checkpoints.shapes import check_shapes
from mmx.config import ConfigError
from mmx.data import tokens
from mmx.files import atomic, untrusted
from mmx.kernels import int8
from mmx.layers.kinds import KINDS, kind_of
from mmx.model import Model
from mmx.parallel import sharding

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
DIALECTS = ("transformers", "released")
BYTE_IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}      # the byte tokenizer's
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class Loaded(NamedTuple):
    model: object           # the Flax module
    params: dict            # plain nested dict
    config: config.Model
    tokenizer: str          # "bytes", the path of a tokenizer.json, or empty where the checkpoint has none

    def __repr__(self):
        count = sum(x.size for x in jax.tree.leaves(self.params))
        return f"Loaded({count:,} parameters, {self.config}, tokenizer={self.tokenizer!r})"


class ReleasedSource:
    """A Hugging Face directory, checked whole before the first slice is read."""

    def __init__(self, directory: Path):
        where = directory / "config.json"
        self.beside, self.json = directory, untrusted.read_json(untrusted.check_link(where))
        self.arguments = hf_config.read_model(self.json, where)
        self.model = config.build({"model": self.arguments}).model
        self.tensors = safetensors.find_tensors(directory)
        safetensors.check_tensors(self.tensors, self.model, directory)
        self.tokenizer = _tokenizer(directory, self.ids())

    def ids(self) -> dict:
        generation = self.beside / "generation_config.json"
        inner = self.json["text_config"] if self.model.vision.layers else {}
        return _ids(inner | self.json | (untrusted.read_json(untrusted.check_link(generation)) if generation.exists() else {}))

    def dtype(self, leaf) -> np.dtype:
        found = {self.tensors[name].dtype for _, name in leaf.tensors()}
        return found.pop() if len(found) == 1 else DTYPES["float32"]

    def read(self, files, leaf, piece) -> np.ndarray:
        return leaf.from_released(safetensors.read_piece(files, self.tensors[piece.name], leaf, piece))

    def read_leaf(self, files, leaf) -> np.ndarray:
        dtype = self.dtype(leaf)
        array = np.empty(leaf.shape, dtype)
        for piece in leaf.slices(dtype.itemsize):
            array[piece.index] = self.read(files, leaf, piece)
        return array

    def slices(self, files, leaf):
        """A function of an index; the whole leaf stands in memory meanwhile."""
        return self.read_leaf(files, leaf).__getitem__


class WorkdirSource:
    """The params of a committed step of a workdir; one that nobody has trained yet has the side files of its origin."""

    def __init__(self, workdir: Path, step: Path):
        text = manager.read_config(workdir)
        experiment = config.build(text)
        self.model, self.arguments = experiment.model, text["model"]
        manager.verify_item(step, "params")
        self.arrays = manager.open_arrays(step)
        check_shapes({"/".join(path): array.shape for path, array in self.arrays.items()},
                              {"/".join(leaf.path): leaf.shape for leaf in hf_layout.leaves(self.model)}, step)
        for path, array in self.arrays.items():
            if array.dtype.numpy_dtype not in safetensors.DTYPE_CODES:
                raise ConfigError(f"{step}: tensor {'.'.join(path)} is of {array.dtype.name}; parameters are of "
                                  f"{', '.join(map(str, safetensors.DTYPE_CODES))}")
        self.beside = None if "data" in text else workdir
        own = workdir / "tokenizer.json"
        if self.beside:
            self.tokenizer = _tokenizer(workdir, self.ids())
        else:
            self.tokenizer = str(own) if own.exists() else experiment.data.tokenizer

    def ids(self) -> dict:
        """bos, eos and pad."""
        if self.beside:
            return _ids(untrusted.read_json(untrusted.check_link(self.beside / "generation_config.json")))
        known = tokens.tokenizer(self.tokenizer)
        values = (known.bos, known.eos, known.pad) if known.vocab <= self.model.vocab else (None,) * 3
        return dict(zip(BYTE_IDS, values))

    def dtype(self, leaf) -> np.dtype:
        return self.arrays[leaf.path].dtype.numpy_dtype

    def read(self, files, leaf, piece) -> np.ndarray:
        return manager.read_slice(self.arrays[leaf.path], piece.index)

    def read_leaf(self, files, leaf) -> np.ndarray:
        return manager.read_slice(self.arrays[leaf.path])

    def slices(self, files, leaf):
        return functools.partial(manager.read_slice, self.arrays[leaf.path])


def open_source(path: str | Path) -> ReleasedSource | WorkdirSource:
    """A workdir (its latest step), one of its checkpoints/STEP, or a Hugging Face directory."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise ConfigError(f"checkpoint {path} is no directory")
    found = manager.find_step(path)
    if found:
        return WorkdirSource(*found)
    if (path / "checkpoints").is_dir() or path.parent.name == "checkpoints":
        raise ConfigError(f"{path} holds no committed step: train longer than checkpoint.every")
    if (path / "config.json").exists():
        return ReleasedSource(path)
    raise ConfigError(f"{path} is neither a workdir (checkpoints/STEP) nor a Hugging Face directory (config.json)")


def find_model(path: str | Path) -> config.Model:
    """A checkpoint's model, of its config and no tensor."""
    found = manager.find_step(path)
    return config.build(manager.read_config(found[0])).model if found else open_source(path).model


def from_hf(path: str | Path, out: str | Path, dtype: str | None = None, progress: bool = True) -> Path:
    """Writes a workdir whose step 0 has the parameters of a checkpoint in released form; returns it."""
    source = open_source(path)
    with _destination(out) as partial:
        leaves = hf_layout.leaves(source.model)
        dtypes = {leaf.path: _dtype(dtype) or source.dtype(leaf) for leaf in leaves}
        arrays = manager.create_params(partial / "checkpoints" / "0", {
            leaf.path: (leaf.shape, dtypes[leaf.path], leaf.chunks(source.dtype(leaf).itemsize)) for leaf in leaves})

        def write(leaf, piece, slice_):
            with manager.storage_errors(f"{out} cannot be written"):
                arrays[leaf.path][piece.index].write(slice_.astype(dtypes[leaf.path], copy=False)).result()

        _stream(source, leaves, write, progress)
        (partial / "config.json").write_text(json.dumps({"model": source.arguments}, indent=1))
        _side_files(source, partial)
    return Path(out)


def to_hf(path: str | Path, out: str | Path, dialect: str = "transformers", dtype: str | None = None,
          shard_bytes: int = 4_000_000_000, progress: bool = True) -> Path:
    """Writes a directory in released form: tensors under their released names, config.json in the dialect given.

    "transformers" (the default, for it loads anywhere) also holds the released keys, and the decay buffers where stock
    transformers would build other ones: where the number of heads is no power of two.
    """
    if dialect not in DIALECTS:
        raise ConfigError(f"dialect {dialect!r} is none of {', '.join(DIALECTS)}")
    if shard_bytes <= 0:
        raise ConfigError(f"shard-bytes {shard_bytes} must be positive")
    source = open_source(path)
    model, leaves = source.model, hf_layout.leaves(source.model)
    dtypes = {leaf.path: _dtype(dtype) or source.dtype(leaf) for leaf in leaves}
    tensors = {name: (dtypes[leaf.path], leaf.tensor_shape) for leaf in leaves for _, name in leaf.tensors()}
    buffers = {}
    if dialect == "transformers" and model.heads & (model.heads - 1):
        above = hf_layout.name_root(model) + "model.layers"
        buffers = {f"{above}.{l}.self_attn.{name}": (l, name) for l, kind in enumerate(model.layer_kinds)
                   if kind == "L" for name in hf_layout.DECAY_BUFFERS}
        shapes = {name: value.shape for name, value in hf_layout.decay_buffers(model, 0).items()}
        tensors |= {name: (DTYPES["float32"], shapes[kind]) for name, (_, kind) in buffers.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: _order(item[0])))
    text = hf_config.write_model(model, dialect, dtypes[("embed_WD",)].name, source.ids())
    with _destination(out) as partial, safetensors.Files(os.O_WRONLY) as files:
        places = safetensors.plan_files(partial, tensors, shard_bytes)

        def write(leaf, piece, slice_):
            block = leaf.to_released(slice_.astype(dtypes[leaf.path], copy=False))
            safetensors.write_piece(files, places[piece.name], leaf, piece, block)

        _stream(source, leaves, write, progress)
        for name, (layer, kind) in buffers.items():
            values = hf_layout.decay_buffers(model, layer)[kind]
            files.write(places[name].file, memoryview(values.reshape(-1).view(np.uint8)), places[name].offset)
        (partial / "config.json").write_text(json.dumps(text, indent=1))
        _side_files(source, partial)
    return Path(out)


def _order(name: str) -> tuple[bool, float]:
    """Released order: embedding, layers, final norm and head; what sees comes first."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    first = -1 if ".embed" in name else float("inf")
    return not name.startswith(("vision", "multi", "image")), int(layer[1]) if layer else first


def _dtype(name) -> np.dtype | None:
    name = name if name is None or isinstance(name, str) else np.dtype(name).name
    if name is not None and name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is none of {', '.join(DTYPES)}")
    return DTYPES.get(name)


def _stream(source, leaves, write, progress: bool):
    total = sum(np.prod(leaf.shape, dtype=np.int64) * source.dtype(leaf).itemsize for leaf in leaves)
    bar = tqdm(total=int(total), unit="B", unit_scale=True, disable=not progress)
    with safetensors.Files(os.O_RDONLY) as files, bar:
        for leaf in leaves:
            for piece in leaf.slices(source.dtype(leaf).itemsize):
                bar.set_postfix_str(piece.name, refresh=False)
                slice_ = source.read(files, leaf, piece)
                write(leaf, piece, slice_)
                bar.update(slice_.nbytes)


@contextlib.contextmanager
def _destination(out: str | Path):
    """A new directory beside `out`, renamed to it at the end and removed if anything fails."""
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; give another --out, or remove it")
    partial = atomic.temporary_path(out)
    partial.mkdir(parents=True)
    try:
        with atomic.add_filename(out):
            yield partial
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _ids(config_json: dict) -> dict:
    return {key: config_json.get(key) for key in BYTE_IDS}


def _tokenizer(directory: Path, ids: dict) -> str:
    file = directory / "tokenizer.json"
    return str(untrusted.check_link(file)) if file.exists() else "bytes" if ids == BYTE_IDS else ""


def _side_files(source, out: Path):
    for name in SIDE_FILES:
        if source.beside and (source.beside / name).exists():
            file = untrusted.check_link(source.beside / name)
            (out / name).write_bytes(untrusted.read_bytes(file, untrusted.TOKENIZER_BYTES))
    if not (out / "tokenizer.json").exists() and config.tokenizer_file(source.tokenizer):
        (out / "tokenizer.json").write_bytes(untrusted.read_bytes(source.tokenizer, untrusted.TOKENIZER_BYTES))
    if not (out / "generation_config.json").exists():
        (out / "generation_config.json").write_text(json.dumps(source.ids(), indent=1))


def _nest(flat: dict[tuple[str, ...], object]) -> dict:
    tree = {}
    for path, value in flat.items():
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value
    return tree


def open_initial(path: str | Path, model: config.Model) -> ReleasedSource | WorkdirSource:
    """A checkpoint in either form that `model` can start from: one with tensors of its shapes, or of its text's alone."""
    source = open_source(path)
    if not source.model.vision.layers:
        model = dataclasses.replace(model, vision=config.Vision())
    there, wanted = ({"/".join(leaf.path): leaf.shape for leaf in hf_layout.leaves(m)} for m in (source.model, model))
    check_shapes(there, wanted, f"train.init_from={str(path)!r}", "this model")
    return source


def differing_settings(there: config.Model, here: config.Model) -> list[str]:
    """The keys that make two models of the same shapes two functions, with both values."""
    free = {*config.IMPLEMENTATION_KEYS, "capacity", "transport", "aux", "aux_weight", "z_weight", "context", "init",
            "embed_std", "dtype", "vision"}
    used = {key for letter in there.pattern + here.pattern for key in kind_of(letter).keys}
    free |= {key for kind in KINDS.values() for key in kind.keys} - used
    values = ((f.name, getattr(there, f.name), getattr(here, f.name)) for f in dataclasses.fields(config.Model))
    return [f"model.{name} is {old} there, {new} here" for name, old, new in values if name not in free and old != new]


def load_initial(source: ReleasedSource | WorkdirSource, params: dict) -> dict:
    """Its parameters in the place, type and sharding of the abstract leaves of `params`. A workdir is read in slices; of a
    Hugging Face directory a stacked leaf at a time stands in memory."""
    made = {}
    with safetensors.Files(os.O_RDONLY) as files, jax.transfer_guard_host_to_device("allow"):
        for leaf in hf_layout.leaves(source.model):
            want, read = functools.reduce(dict.get, leaf.path, params), source.slices(files, leaf)
            made[leaf.path] = jax.make_array_from_callback(want.shape, want.sharding, lambda at: read(at).astype(want.dtype))
    return _nest(made)


def open_initial_vision(path: str | Path, model: config.Model) -> ReleasedSource | WorkdirSource:
    """A checkpoint in either form whose ViT `model` can start from; its tiles may have another size."""
    if not model.vision.layers:
        raise ConfigError(f"train.init_vision={str(path)!r}: this model reads text alone; set model.vision.layers")
    source = open_source(path)
    for name in ("layers", "dim", "heads", "hidden", "patch"):
        there, wanted = (getattr(m.vision, name) for m in (source.model, model))
        if there != wanted:
            raise ConfigError(f"train.init_vision={str(path)!r} has model.vision.{name}={there}, this model {wanted}")
    return source


def load_initial_vision(source: ReleasedSource | WorkdirSource, vision: dict) -> dict:
    """`vision` with the ViT of a checkpoint, but for the projector and the newline, which are of its text's width; places of
    tiles of another size are interpolated (bicubic)."""
    made = jax.tree.map(lambda x: x, vision)
    with safetensors.Files(os.O_RDONLY) as files, jax.transfer_guard_host_to_device("allow"):
        for leaf in hf_layout.leaves(source.model):
            *above, name = leaf.path
            if above[:1] == ["vision"] and not set("DO") & set(name.rpartition("_")[2]):
                part = functools.reduce(dict.get, above[1:], made)
                w = source.read_leaf(files, leaf).astype(part[name].dtype)
                w = _interpolated(w, len(part[name])) if name == "place_PJ" else w
                part[name] = jax.make_array_from_callback(w.shape, part[name].sharding, lambda at, w=w: w[at])
    return made


def _interpolated(place_PJ, places: int) -> np.ndarray:
    """The class token's, then those of a square of patches."""
    old, new = (math.isqrt(P - 1) for P in (len(place_PJ), places))
    grid = jax.image.resize(place_PJ[1:].reshape(old, old, -1), (new, new, place_PJ.shape[1]), "bicubic")
    return place_PJ if old == new else np.concatenate([place_PJ[:1], np.asarray(grid).reshape(new * new, -1)])


def load(path: str | Path, dtype=None, weights_dtype: str | None = None) -> Loaded:
    """A checkpoint in either form, ready to run here: no tokens are dropped, kernels are picked anew; parameters in `dtype` (a
    name, or what NumPy and JAX take for one), or as stored. `weights_dtype` "int8": matrices as `kernels.int8` has them, made
    slice by slice. On a mesh (jax.set_mesh) each device gets its part; a stacked leaf at a time stands in the host's memory."""
    source = open_source(path)
    kind = _dtype(dtype)
    if weights_dtype not in (None, "int8"):
        raise ConfigError(f"weights_dtype {weights_dtype!r} is not int8")
    params = {}
    with safetensors.Files(os.O_RDONLY) as files:
        for leaf in hf_layout.leaves(source.model):
            name = leaf.path[-1]
            if weights_dtype and leaf.path[0] != "vision" and int8.contracted_axes(name):
                w = _read_int8(source, files, leaf)
            else:
                w = source.read_leaf(files, leaf).astype(kind or source.dtype(leaf), copy=False)
            letters = name.rpartition("_")[2]
            params[leaf.path] = jax.tree.map(lambda x: jax.device_put(x, sharding.weight_sharding(letters, x.shape)), w)
    half = params[("embed_WD",)].dtype == jnp.bfloat16
    compute = "bfloat16" if half else source.model.dtype if dtype is None else "float32"
    model = dataclasses.replace(source.model.portable(), capacity=0.0, transport=0.0, dtype=compute)
    return Loaded(Model(model), _nest(params), model, source.tokenizer)


def _read_int8(source, files, leaf) -> int8.Int8:
    axes = int8.contracted_axes(leaf.path[-1])
    scale_shape = [1 if at - len(leaf.shape) in axes else n for at, n in enumerate(leaf.shape)]
    whole, scale = np.empty(leaf.shape, np.int8), np.empty(scale_shape, np.float32)
    for piece in leaf.slices(source.dtype(leaf).itemsize):      # a slice cuts none of the axes: a channel is whole
        at = [*piece.index, *[slice(None)] * (len(leaf.shape) - len(piece.index))]
        for axis in axes:
            at[axis] = slice(None)
        whole[piece.index], scale[tuple(at)] = int8.quantize(source.read(files, leaf, piece), axes)
    return int8.Int8(whole, scale)


