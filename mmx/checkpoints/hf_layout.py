"""Names and layouts of the tensors of the released checkpoint form (docs/model.md section 6).

`leaves` lists the arrays of a model's parameter tree; each array stacks one or more released tensors. Files are read and
written in slices. A slice is a range of a released tensor's first axis, of at most SLICE_BYTES: one contiguous range of bytes,
or one for each head if the tensor interleaves q, k and v.
"""
import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mmx.config import ConfigError, Model
from mmx.dims import axes_of
from mmx.layers.common import Layout
from mmx.layers.kinds import kind_of
from mmx.layers.lightning import log_decay
from mmx.model import abstract_params

SLICE_BYTES = 64 << 20
BLOCK = 256                                             # transformers' block_size: the extent of its decay buffers
DECAY_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
TOP = {"embed_WD": Layout("model.embed_tokens.weight", "W D"), "head_WD": Layout("lm_head.weight", "W D"),
       "norm_D": Layout("model.norm.weight", "D")}
MOE = {"router_DE": Layout("block_sparse_moe.gate.weight", "E D"),
       "w1_EDF": Layout("block_sparse_moe.experts.{e}.w1.weight", "F D"),
       "w3_EDF": Layout("block_sparse_moe.experts.{e}.w3.weight", "F D"),
       "w2_EFD": Layout("block_sparse_moe.experts.{e}.w2.weight", "D F")}
NORMS = {"norm_mixer_D": Layout("input_layernorm.weight", "D"),
         "norm_moe_D": Layout("post_attention_layernorm.weight", "D")}
TOWER = "vision_tower.vision_model."
VISION = {"patch_YXZJ": Layout(f"{TOWER}embeddings.patch_embedding.weight", "J Z Y X"),
          "class_J": Layout(f"{TOWER}embeddings.class_embedding", "J"),
          "place_PJ": Layout(f"{TOWER}embeddings.position_embedding.weight", "P J"),
          "norm_J": Layout(f"{TOWER}pre_layrnorm.weight", "J"), "shift_J": Layout(f"{TOWER}pre_layrnorm.bias", "J"),
          "in_JO": Layout("multi_modal_projector.linear_1.weight", "O J"),
          "in_O": Layout("multi_modal_projector.linear_1.bias", "O"),
          "out_OD": Layout("multi_modal_projector.linear_2.weight", "D O"),
          "out_D": Layout("multi_modal_projector.linear_2.bias", "D"), "newline_D": Layout("image_newline", "D")}
VISION_LAYER = {name: Layout(f"{theirs}.{part}", axes) for theirs, weight, matrix, bias, vector in (
    ("self_attn.q_proj", "q_JAK", "AK J", "q_AK", "AK"), ("self_attn.k_proj", "k_JAK", "AK J", "k_AK", "AK"),
    ("self_attn.v_proj", "v_JAK", "AK J", "v_AK", "AK"), ("self_attn.out_proj", "out_AKJ", "J AK", "out_J", "J"),
    ("mlp.fc1", "up_JU", "U J", "up_U", "U"), ("mlp.fc2", "down_UJ", "J U", "down_J", "J"),
    ("layer_norm1", "norm_attention_J", "J", "shift_attention_J", "J"),
    ("layer_norm2", "norm_mlp_J", "J", "shift_mlp_J", "J"),
) for name, part, axes in ((weight, "weight", matrix), (bias, "bias", vector))}


class Slice(NamedTuple):
    """A range of the first axis of one released tensor, and its index in the leaf."""
    name: str
    start: int
    stop: int
    index: tuple


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of the parameter tree and the released tensors that it stacks."""
    path: tuple[str, ...]
    axes: str                   # of the array; L comes first if it stacks layers
    shape: tuple[int, ...]
    layout: Layout
    prefix: str = ""            # precedes layout.name; {l} is replaced by the number of the layer
    first: int = 0              # layer of group 0
    period: int = 1             # layers from one group to the next

    def sizes(self, letters: str) -> tuple[int, ...]:
        """The extents of the axes `letters`."""
        extents = dict(zip(self.axes, self.shape))
        return tuple(extents[letter] for letter in letters)

    @property
    def released_axes(self) -> str:
        """The axes of one released tensor in their order in the file, one letter each."""
        return self.layout.axes.replace(" ", "")

    @property
    def stacked(self) -> str:
        """The leaf's axes over which released tensors are stacked; they come first."""
        return "".join(letter for letter in self.axes if letter not in self.released_axes)

    @property
    def tensor_axes(self) -> str:
        """The axes of one released tensor in their order in the leaf."""
        return self.axes[len(self.stacked):]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of one released tensor."""
        first, *rest = (math.prod(self.sizes(group)) for group in self.layout.axes.split())
        return (first * self.layout.parts, *rest)

    @property
    def name(self) -> str:
        """The leaf's path, for messages."""
        return ".".join(self.path)

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index along the stacked axes, released name) of each tensor."""
        for index in np.ndindex(self.sizes(self.stacked)):
            place = dict(zip(self.stacked, index))
            layer = self.first + self.period * place.get("L", 0)
            yield index, (self.prefix + self.layout.name).format(l=layer, e=place.get("E"))

    def slice_length(self, itemsize: int) -> int:
        """Entries of the first axis in a slice of at most SLICE_BYTES; all slices but the last have the same length."""
        first, *rest = self.sizes(self.released_axes)
        count = max(1, SLICE_BYTES // (math.prod(rest) * itemsize))
        return -(-first // -(-first // count))

    def slice_shape(self, itemsize: int) -> tuple[int, ...]:
        """The shape of a slice in the leaf."""
        special = dict.fromkeys(self.stacked, 1) | {self.released_axes[0]: self.slice_length(itemsize)}
        return tuple(special.get(letter, size) for letter, size in zip(self.axes, self.shape))

    def slices(self, itemsize: int) -> Iterator[Slice]:
        """All slices of the leaf, tensor by tensor."""
        first, length = self.released_axes[0], self.slice_length(itemsize)
        end, = self.sizes(first)
        for index, name in self.tensors():
            for start in range(0, end, length):
                span = slice(start, min(start + length, end))
                inside = tuple(span if letter == first else slice(None) for letter in self.tensor_axes)
                yield Slice(name, span.start, span.stop, index + inside)

    def from_released(self, block: np.ndarray) -> np.ndarray:
        """A slice in the released layout, transposed to the leaf's axes."""
        return block.transpose([self.released_axes.index(letter) for letter in self.tensor_axes])

    def to_released(self, block: np.ndarray) -> np.ndarray:
        """The inverse of `from_released`."""
        return np.ascontiguousarray(block.transpose([self.tensor_axes.index(letter) for letter in self.released_axes]))


def leaves(model: Model) -> list[Leaf]:
    """Every array of the model's parameter tree.

    Arrays of a kind without a released form get a layout too, so that workdirs load in slices; `check_released` refuses their
    conversion.
    """
    params, root, found = abstract_params(model), name_root(model), []

    def add(params, folder, layouts, prefix, **place):
        arrays = {name: x for name, x in params.items() if not isinstance(x, dict)}
        for name in (*layouts, *(sorted(arrays.keys() - layouts.keys()))):
            axes = "L" * ("{l}" in prefix) + axes_of(name)
            layout = layouts.get(name) or _default_layout(name)
            found.append(Leaf((*folder, name), axes, arrays[name].shape, layout, prefix, **place))

    add(params, (), TOP, root)
    for i, letter in enumerate(model.pattern):
        folder, place = ("groups", f"layer_{i}"), {"first": i, "period": len(model.pattern)}
        released = kind_of(letter).released
        tables = (((), NORMS), (("mixer",), released.tensors if released else {}), (("moe",), MOE))
        for part, layouts in tables:
            layer = params["groups"][f"layer_{i}"]
            add(layer[part[0]] if part else layer, (*folder, *part), layouts, f"{root}model.layers.{{l}}.", **place)
    if model.vision.layers:
        add(params["vision"], ("vision",), VISION, "")
        add(params["vision"]["layers"], ("vision", "layers"), VISION_LAYER, f"{TOWER}encoder.layers.{{l}}.")
    return found


def _default_layout(name: str) -> Layout:
    """A layout for a parameter without a released tensor: a matrix is [outputs, inputs], as in PyTorch."""
    axes = axes_of(name)
    if len(axes) > 1 and axes[0] == "D":
        return Layout(f"mixer.{name}", f"{axes[1:]} D")
    if len(axes) > 1 and axes[-1] == "D":
        return Layout(f"mixer.{name}", f"D {axes[:-1]}")
    return Layout(f"mixer.{name}", " ".join(axes))


def check_released(model: Model) -> None:
    """Raises ConfigError if a layer kind of the model has no released form."""
    for letter in model.pattern:
        if not kind_of(letter).released:
            raise ConfigError(f"model.pattern={model.pattern!r}: layers of kind {letter} ({kind_of(letter).name}) have no "
                              "released form and cannot be converted")


def tensor_count(model: Model) -> int:
    """The number of tensors in the released form."""
    check_released(model)
    # arrays that one tensor interleaves are counted once
    return sum(math.prod(leaf.sizes(leaf.stacked)) for leaf in leaves(model) if leaf.layout.part == 0)


def name_root(model: Model) -> str:
    """The prefix of the text model's tensor names."""
    return "language_model." if model.vision.layers else ""


def decay_buffers(model: Model, layer: int) -> dict[str, np.ndarray]:
    """The buffers that transformers derives in a lightning layer, here with the released decay (docs/model.md section 3)."""
    rate = -np.array(log_decay(model, layer), np.float64)[:, None, None]
    steps = np.arange(1, BLOCK + 1, dtype=np.float64)
    distance = steps[:, None] - steps
    buffers = {"slope_rate": rate, "query_decay": np.exp(-rate * steps[:, None]),
               "key_decay": np.exp(-rate * (BLOCK - steps[:, None])),
               "diagonal_decay": np.exp(np.where(distance >= 0, -rate * distance, -np.inf))[None]}
    return {name: value.astype(np.float32) for name, value in buffers.items()}
