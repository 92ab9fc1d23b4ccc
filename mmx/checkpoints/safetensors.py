"""Reads and writes safetensors files in slices; limits the size of their headers (docs/model.md section 6)."""
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mmx.checkpoints.hf_layout import DECAY_BUFFERS, TOWER, Leaf, Slice, leaves
from mmx.checkpoints.shapes import check_shapes, first_five
from mmx.config import ConfigError, Model
from mmx.files import notes, untrusted

MOST_TENSORS, MOST_AXES, MOST_NAME = 1_000_000, 8, 256      # tensors of a file, axes of a tensor, characters of its name
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_WEIGHTS = "[!.]*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"
LFS = b"version https://git-lfs"       # the beginning of a Git LFS pointer
EXPERT_MATRICES = ("w1", "w2", "w3")
# last parts of the names of buffers that models derive from their config; some programs save them, in any dtype
DERIVED = (*DECAY_BUFFERS, "position_ids", "inv_freq", "original_inv_freq", "cos_cached", "sin_cached")
DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """The place of a tensor in a file."""
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int         # [bytes] of its first element in the file


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by released name. Tensors that the model does not use are skipped (`_is_unused`).

    The file begins with an 8-byte length and a JSON header of that length; the data follow.

    Raises:
      ConfigError: the file is damaged or exceeds a limit, or contains a tensor under two names.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not a regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            file.seek(0)
            if file.read(len(LFS)) == LFS:
                raise ConfigError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")
            raise ConfigError(f"{path} is truncated or not a safetensors file: its header ends at byte {start} of {size}")
        if start > untrusted.JSON_BYTES:
            raise ConfigError(f"{path}: its header has {start:,} bytes; at most {untrusted.JSON_BYTES:,} are allowed")
        try:
            header = untrusted.loads(file.read(start - 8))
            if not isinstance(header, dict):
                raise ValueError("it is not a JSON object")
        except ValueError as error:
            raise ConfigError(f"{path} is not a safetensors file: its header does not list tensors ({error})") from None
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        if len(name) > MOST_NAME or not name.isprintable():
            raise ConfigError(f"{path} is damaged: {name[:MOST_NAME]!r} is not a valid tensor name")
        try:
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            valid = type(code) is str and all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid or len(shape) > MOST_AXES:
            raise ConfigError(f"{path} is damaged: tensor {name} needs dtype, shape and data_offsets, but has {entry!s:.200}")
        if start + end > size:
            raise ConfigError(f"{path} is truncated: {name} ends at byte {start + end} of {size}; fetch the file again")
        spans.append((begin, end, name))
        if _is_unused(name):
            continue
        if code not in DTYPES:
            raise ConfigError(f"{path}: tensor {name} has dtype {code:.20}; only {', '.join(DTYPES)} are supported")
        if end - begin != math.prod(shape) * DTYPES[code].itemsize:
            raise ConfigError(f"{path} is damaged: tensor {name} of {code} {list(shape)} has {end - begin} bytes")
        merge(tensors, _released_names(name, Tensor(path, DTYPES[code], shape, start + begin)))
        if len(tensors) > MOST_TENSORS:
            raise ConfigError(f"{path} has more than {MOST_TENSORS:,} tensors")
    for (_, end, name), (begin, _, next_name) in itertools.pairwise(sorted(spans)):
        if begin < end:
            raise ConfigError(f"{path} is damaged: the bytes of tensors {name} and {next_name} overlap")
    return tensors


def merge(tensors: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Adds `more` to `tensors`. Raises ConfigError for a tensor that is in both."""
    if doubled := next((name for name in more if name in tensors), None):
        first, second = tensors[doubled].file, more[doubled].file
        places = f"{first} contains" if first == second else f"{first} and {second.name} both contain"
        twice = " under two names" if first == second else ""
        raise ConfigError(f"{places} tensor {doubled}{twice}: remove one of the two")
    tensors |= more


def _is_unused(name: str) -> bool:
    """Whether the model does not use a tensor: a derived buffer, or the norm after the ViT's last layer."""
    return name.rpartition(".")[2] in DERIVED or _tower_tail(name).startswith("post_layernorm.")


def _tower_tail(name: str) -> str:
    """A tensor's name below the vision tower, "" for other tensors. transformers omits `vision_model.`."""
    return name.removeprefix("vision_tower.").removeprefix("vision_model.") if name.startswith("vision_tower.") else ""


def _released_names(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor by its released name. A stack of experts, as transformers has in memory, becomes one entry for each matrix."""
    if tail := _tower_tail(name):
        return {TOWER + tail: tensor}
    head, kind, tail = name.partition(".mlp.")
    if not kind:
        return {name: tensor}
    stacks = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}
    if tail not in stacks or len(tensor.shape) != 3 or tensor.shape[1] % len(stacks[tail]) or 0 in tensor.shape:
        return {f"{head}.block_sparse_moe.{tail}": tensor}
    names, (experts, rows, columns) = stacks[tail], tensor.shape
    if experts > MOST_TENSORS:
        raise ConfigError(f"{tensor.file}: tensor {name} stacks {experts:,} experts, more than {MOST_TENSORS:,}")
    rows //= len(names)
    size = rows * columns * tensor.dtype.itemsize
    return {f"{head}.block_sparse_moe.experts.{e}.{w}.weight": Tensor(
        tensor.file, tensor.dtype, (rows, columns), tensor.offset + (e * len(names) + i) * size)
        for e in range(experts) for i, w in enumerate(names)}


def find_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a directory that has an index of several files, or model.safetensors.

    The index is read first. Other safetensors files are ignored; a line on stderr says so.
    """
    single, index = directory / SINGLE, directory / INDEX
    if index.exists():
        files = _read_index(index)
    elif single.exists():
        files = {single.name: ()}
    else:
        raise ConfigError(f"{directory} has neither {SINGLE} nor {INDEX}{_other_weights(directory)}")
    tensors = {}
    for file in sorted(files):
        merge(tensors, read_header(untrusted.check_link(directory / file)))
        if len(tensors) > MOST_TENSORS:
            raise ConfigError(f"{index}: its files contain more than {MOST_TENSORS:,} tensors")
    listed = {released for names in files.values() for name in names for released in _listed_names(name)}
    if absent := sorted(listed - tensors.keys()):
        raise ConfigError(f"{index} lists tensors that its files do not contain: {first_five(absent)}")
    if ignored := sorted(path.name for path in directory.glob("[!.]*.safetensors") if path.name not in files):
        source = index.name if index.exists() else single.name
        notes.note(f"{directory}: the tensors are read from {source}; ignored are {first_five(ignored)}")
    return tensors


def _other_weights(directory: Path) -> str:
    """What a directory has in their place, for a message."""
    names = sorted(path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern))
    if parts := [name for name in names if name.endswith(".safetensors")]:
        return f": it has {first_five(parts)}, but no index of them"
    return f": it has {first_five(names)}, but mmx reads safetensors only" if names else ""


def _read_index(index: Path) -> dict[str, list[str]]:
    """The names of the tensors in each file of an index."""
    places = untrusted.read_json(untrusted.check_link(index)).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ConfigError(f"{index} has no weight_map from tensor to file")
    files = {}
    for name, file in places.items():
        files.setdefault(file, []).append(name)
    for file in files:
        if Path(file).name != file or file in ("..", ".") or not file.isprintable():
            raise ConfigError(f"{index} names the file {file[:MOST_NAME]!r}; only files in the same directory are read")
        if not (index.parent / file).is_file():
            raise ConfigError(f"{index} names the file {file!r}, which does not exist")
    return files


def _listed_names(name: str) -> list[str]:
    """The released name of a tensor in an index, in a list; [] for tensors that are not used and for stacks of experts."""
    if _is_unused(name) or name.partition(".mlp.experts.")[1]:
        return []
    tail = _tower_tail(name)
    return [TOWER + tail if tail else name.replace(".mlp.", ".block_sparse_moe.")]


def check_tensors(tensors: dict[str, Tensor], model: Model, where) -> None:
    """Raises ConfigError unless `tensors` have the names and shapes that `model` needs."""
    count = model.layers * model.experts * len(EXPERT_MATRICES)
    if count > 10_000 + len(tensors):       # too many to list all that are missing
        raise ConfigError(f"{where} has {len(tensors)} tensors, but its config.json needs more than {count}")
    check_shapes({name: tensor.shape for name, tensor in tensors.items()},
                 {name: leaf.tensor_shape for leaf in leaves(model) for _, name in leaf.tensors()}, where)


class Files:
    """Keeps files open, and reads and writes them at offsets (mapped files would count as memory of the process)."""

    def __init__(self, flags: int):
        self.flags, self.open = flags, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.open.values():
            os.close(handle)

    def handle(self, path: Path) -> int:
        """The file descriptor of a path, which is opened at the first call."""
        if path not in self.open:
            self.open[path] = os.open(path, self.flags, 0o666)
        return self.open[path]

    def read(self, path: Path, buffer: memoryview, offset: int):
        """Fills a buffer from a file. Raises ConfigError if the file is too short."""
        while buffer:
            count = os.preadv(self.handle(path), [buffer], offset)
            if not count:
                raise ConfigError(f"{path} ended at byte {offset} before the tensor was complete")
            buffer, offset = buffer[count:], offset + count

    def write(self, path: Path, buffer: memoryview, offset: int):
        """Writes all of a buffer."""
        while buffer:
            count = os.pwrite(self.handle(path), buffer, offset)
            buffer, offset = buffer[count:], offset + count


def byte_ranges(leaf: Leaf, piece: Slice, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """The contiguous parts of a slice in the file.

    There is one part, or one for each entry of the first axis if the tensor interleaves several arrays, such as q, k and v.

    Yields:
      (offset in the tensor [bytes], start, stop); start and stop are indices of the slice's first axis.
    """
    row = math.prod(leaf.sizes(leaf.released_axes[1:])) * itemsize
    _, _, part, parts = leaf.layout
    step = 1 if parts > 1 else piece.stop - piece.start
    for start in range(piece.start, piece.stop, step):
        yield (start * parts + part) * row, start - piece.start, start - piece.start + step


def read_piece(files: Files, tensor: Tensor, leaf: Leaf, piece: Slice) -> np.ndarray:
    """Reads a slice of a released tensor, in the released layout."""
    block = np.empty((piece.stop - piece.start, *leaf.sizes(leaf.released_axes[1:])), tensor.dtype)
    for offset, start, stop in byte_ranges(leaf, piece, tensor.dtype.itemsize):
        files.read(tensor.file, memoryview(block[start:stop].reshape(-1).view(np.uint8)), tensor.offset + offset)
    return block


def write_piece(files: Files, tensor: Tensor, leaf: Leaf, piece: Slice, block: np.ndarray):
    """Writes a slice of a released tensor; `block` has the released layout."""
    for offset, start, stop in byte_ranges(leaf, piece, tensor.dtype.itemsize):
        files.write(tensor.file, memoryview(block[start:stop].reshape(-1).view(np.uint8)), tensor.offset + offset)


def plan_files(directory: Path, tensors: dict[str, tuple[np.dtype, tuple]], shard_bytes: int) -> dict[str, Tensor]:
    """Creates safetensors files with headers and, for now, empty space for the data. Writes an index if there are several.

    Args:
      tensors: (dtype, shape) by name, in the order of the files.
      shard_bytes: most bytes of data in a file. A larger tensor gets a separate file.
    Returns:
      The place of each tensor.
    """
    shards, free = [], 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if size > free or not shards:
            shards.append([])
            free = shard_bytes
        shards[-1].append((name, dtype, shape, size))
        free -= size
    placed = {}
    for i, shard in enumerate(shards):
        suffix = f"-{i + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = directory / f"model{suffix}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, dtype, shape, size in sorted(shard, key=lambda entry: -entry[1].itemsize):     # keeps the data aligned
            header[name] = {"dtype": DTYPE_CODES[dtype], "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
        for name, dtype, shape, _ in shard:
            placed[name] = Tensor(file, dtype, shape, 8 + len(text) + header[name]["data_offsets"][0])
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size for shard in shards for *_, size in shard)},
                 "weight_map": {name: tensor.file.name for name, tensor in placed.items()}}
        (directory / INDEX).write_text(json.dumps(index, indent=1))
    return placed
