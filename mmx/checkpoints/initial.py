"""Starting points of a run: the parameters of train.init_from and train.init_vision, and what they must share with the run."""
import dataclasses
import functools
import math
import os
from pathlib import Path

import jax
import numpy as np

from mmx import config
from mmx.checkpoints import convert, hf_layout, safetensors
from mmx.checkpoints.casts import cast
from mmx.checkpoints.shapes import check_shapes
from mmx.checkpoints.tokenizer_files import fingerprint
from mmx.config import ConfigError
from mmx.data import tokens
from mmx.files import notes
from mmx.layers.kinds import KINDS, kind_of

# files of tokenizers that mmx cannot read
OTHER_TOKENIZERS = ("tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
                    "tiktoken.model")
VISION_KEYS = ("norm_eps", "token", "grids")        # of model.vision: they change the function and no shape
Source = convert.ReleasedSource | convert.WorkdirSource


def open_initial(path: str | Path, model: config.Model, tokenizer: str = "") -> Source:
    """Opens a checkpoint from which `model` can start (train.init_from).

    Raises ConfigError unless the checkpoint has all parameters of the model, or all of its text part, with the same shapes, and
    was trained with the same tokenizer.

    Args:
      tokenizer: of the new run (data.tokenizer); "": not compared.
    """
    source = convert.open_source(path)
    if not source.model.vision.layers:
        model = dataclasses.replace(model, vision=config.Vision())
    found, wanted = ({"/".join(leaf.path): leaf.shape for leaf in hf_layout.leaves(m)} for m in (source.model, model))
    check_shapes(found, wanted, f"train.init_from={str(path)!r}", "this model")
    if tokenizer:
        _check_tokenizer(source, path, tokenizer)
    return source


def _check_tokenizer(source: Source, path, tokenizer: str) -> None:
    """Raises ConfigError if a checkpoint was trained with another tokenizer than the new run's."""
    where = f"train.init_from={str(path)!r}"
    if not source.tokenizer:
        others = [name for name in OTHER_TOKENIZERS if (source.directory / name).exists()]
        if others and not config.tokenizer_file(tokenizer):
            raise ConfigError(f"{where} has a tokenizer that mmx cannot read ({', '.join(others)}), but "
                              f"data.tokenizer={tokenizer!r}: save it as tokenizer.json with transformers' AutoTokenizer, and "
                              "give --config.data.tokenizer=FILE")
        notes.note(f"{where} has no tokenizer.json: mmx cannot check that it was trained with data.tokenizer={tokenizer!r}")
    elif (fingerprint(source.tokenizer) != fingerprint(tokenizer)
            or _special_ids(source.tokenizer) != _special_ids(tokenizer)):
        raise ConfigError(f"{where} was trained with another tokenizer than data.tokenizer={tokenizer!r}: give "
                          f"--config.data.tokenizer={source.tokenizer}")


def _special_ids(tokenizer: str) -> dict:
    """The ids of bos, eos and pad, which files beside a tokenizer.json may decide."""
    return tokens.special_ids(tokens.tokenizer(tokenizer))


def differing_settings(saved: config.Model, new: config.Model, with_capacity: bool = False) -> list[str]:
    """Describes the keys, with both values, that make two models of the same shapes compute different functions.

    Args:
      with_capacity: also the keys that let experts drop tokens in training, which only a run of mmx records.
    """
    ignored = {*config.IMPLEMENTATION_KEYS, "aux", "aux_weight", "z_weight", "context", "init", "embed_std", "dtype", "vision"}
    ignored |= set() if with_capacity else {"capacity", "transport"}
    used = {key for letter in saved.pattern + new.pattern for key in kind_of(letter).config_keys}
    ignored |= {key for kind in KINDS.values() for key in kind.config_keys} - used
    values = ((f.name, getattr(saved, f.name), getattr(new, f.name)) for f in dataclasses.fields(config.Model))
    found = [f"model.{name} is {old} there, {value} here" for name, old, value in values
             if name not in ignored and old != value]
    return found + (differing_vision_settings(saved, new, VISION_KEYS) if saved.vision.layers and new.vision.layers else [])


def differing_vision_settings(saved: config.Model, new: config.Model, keys=("norm_eps",)) -> list[str]:
    """The same for the keys of model.vision that do not change the shapes. The default is those that the ViT alone uses."""
    values = ((name, getattr(saved.vision, name), getattr(new.vision, name)) for name in keys)
    return [f"model.vision.{name} is {old!s:.50} there, {value!s:.50} here" for name, old, value in values if old != value]


def load_initial(source: Source, params: dict) -> dict:
    """Loads the parameters of a source from `open_initial`.

    A workdir is read in slices. For a Hugging Face directory, the host needs memory for one leaf at a time.

    Args:
      params: abstract parameters of the new model, with dtypes and shardings. Those that the source lacks are ignored.
    """
    loaded = {}
    with safetensors.Files(os.O_RDONLY) as files, jax.transfer_guard_host_to_device("allow"):
        for leaf in hf_layout.leaves(source.model):
            want, read = functools.reduce(dict.get, leaf.path, params), source.reader(files, leaf)
            loaded[leaf.path] = jax.make_array_from_callback(
                want.shape, want.sharding, lambda index: _usable(read(index), want.dtype, leaf.name))
    return convert.unflatten(loaded)


def _usable(array: np.ndarray, dtype, name: str) -> np.ndarray:
    """The array in another dtype. Raises ConfigError if a value is not finite, before or after the cast."""
    if not np.isfinite(array).all():
        raise ConfigError(f"tensor {name} of the initial checkpoint contains values that are not finite: start from an "
                          "earlier checkpoint")
    return cast(array, dtype, name)


def open_initial_vision(path: str | Path, model: config.Model) -> Source:
    """Opens a checkpoint from whose ViT `model` can start (train.init_vision). Its tiles may have another size."""
    if not model.vision.layers:
        raise ConfigError(f"train.init_vision={str(path)!r}: this is a text model; set model.vision.layers")
    source = convert.open_source(path)
    for name in ("layers", "dim", "heads", "hidden", "patch"):
        found, wanted = (getattr(m.vision, name) for m in (source.model, model))
        if found != wanted:
            raise ConfigError(f"train.init_vision={str(path)!r} has model.vision.{name}={found}, this model {wanted}")
    return source


def load_initial_vision(source: Source, vision: dict) -> dict:
    """Replaces the ViT in `vision`, the vision parameters of a model, by the ViT of a source from `open_initial_vision`.

    The projector and the image newline stay, because their shapes depend on the text model. Position embeddings of tiles of
    another size are interpolated (bicubic).
    """
    loaded = jax.tree.map(lambda x: x, vision)
    with safetensors.Files(os.O_RDONLY) as files, jax.transfer_guard_host_to_device("allow"):
        for leaf in hf_layout.leaves(source.model):
            *folders, name = leaf.path
            if folders[:1] == ["vision"] and not set("DO") & set(name.rpartition("_")[2]):
                part = functools.reduce(dict.get, folders[1:], loaded)
                w = _usable(source.read_leaf(files, leaf), part[name].dtype, leaf.name)
                w = _resize_positions(w, len(part[name])) if name == "place_PJ" else w
                part[name] = jax.make_array_from_callback(w.shape, part[name].sharding, lambda index, w=w: w[index])
    return loaded


def _resize_positions(place_PJ, count: int) -> np.ndarray:
    """Position embeddings for another number of positions: the class token, then a square of patches."""
    old, new = (math.isqrt(n - 1) for n in (len(place_PJ), count))
    grid = jax.image.resize(place_PJ[1:].reshape(old, old, -1), (new, new, place_PJ.shape[1]), "bicubic")
    return place_PJ if old == new else np.concatenate([place_PJ[:1], np.asarray(grid).reshape(new * new, -1)])
