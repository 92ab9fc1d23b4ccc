"""The released checkpoint form (model.md section 6): names and layouts of its tensors.

One set of tables says for each leaf of the parameter tree which released tensors hold it, and with which axes; reading
and writing walk the same slices. A slice is a run of the released layout's leading axis (one contiguous run of bytes,
or one a head where q, k and v are interleaved): memory is bounded by SLICE_BYTES and not by a tensor.
"""
import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mmx.config import Model

SLICE_BYTES = 64 << 20
BLOCK = 256                                             # transformers' block_size: the extent of its decay buffers
DECAY_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


class Layout(NamedTuple):
    name: str           # below its layer's; {e} is the expert
    axes: str           # a space parts the tensor's own axes
    part: int = 0       # of `parts` that the leading letter interleaves: qkv_proj's rows are [q|k|v] head by head
    parts: int = 1


TOP = {"embed_WD": Layout("model.embed_tokens.weight", "W D"), "head_WD": Layout("lm_head.weight", "W D"),
       "norm_D": Layout("model.norm.weight", "D")}
MIXERS = {
    "L": {"q_DHK": Layout("self_attn.qkv_proj.weight", "HK D", 0, 3),
          "k_DHK": Layout("self_attn.qkv_proj.weight", "HK D", 1, 3),
          "v_DHV": Layout("self_attn.qkv_proj.weight", "HV D", 2, 3),
          "gate_DHV": Layout("self_attn.output_gate.weight", "HV D"),
          "norm_HV": Layout("self_attn.norm.weight", "HV"), "out_HVD": Layout("self_attn.out_proj.weight", "D HV")},
    "S": {"q_DHK": Layout("self_attn.q_proj.weight", "HK D"), "k_DGK": Layout("self_attn.k_proj.weight", "GK D"),
          "v_DGV": Layout("self_attn.v_proj.weight", "GV D"), "out_HVD": Layout("self_attn.o_proj.weight", "D HV")},
}
MIXERS["W"] = MIXERS["S"]       # within mmx alone: `write_model` refuses it
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
BLOCK_OF_VISION = {name: Layout(f"{theirs}.{kind}", axes) for theirs, weight, matrix, bias, vector in (
    ("self_attn.q_proj", "q_JAK", "AK J", "q_AK", "AK"), ("self_attn.k_proj", "k_JAK", "AK J", "k_AK", "AK"),
    ("self_attn.v_proj", "v_JAK", "AK J", "v_AK", "AK"), ("self_attn.out_proj", "out_AKJ", "J AK", "out_J", "J"),
    ("mlp.fc1", "up_JU", "U J", "up_U", "U"), ("mlp.fc2", "down_UJ", "J U", "down_J", "J"),
    ("layer_norm1", "norm_attention_J", "J", "shift_attention_J", "J"),
    ("layer_norm2", "norm_mlp_J", "J", "shift_mlp_J", "J"),
) for name, kind, axes in ((weight, "weight", matrix), (bias, "bias", vector))}


class Piece(NamedTuple):
    """A run of the leading axis of one released tensor, and where it lies in the leaf."""
    name: str
    start: int
    stop: int
    index: tuple


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of the parameter tree and the released tensors that it stacks."""
    path: tuple[str, ...]
    axes: str                   # of the array, L in front where it is stacked over groups
    layout: Layout
    extents: tuple              # ((letter, extent), ...)
    above: str = ""             # what stands before the layout's name; {l} is the layer
    first: int = 0              # layer of group 0
    period: int = 1             # layers from group to group

    def sizes(self, letters: str) -> tuple[int, ...]:
        extents = dict(self.extents)
        return tuple(extents[c] for c in letters)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes(self.axes)

    @property
    def released(self) -> str:
        """The released tensor's axes, one letter each."""
        return self.layout.axes.replace(" ", "")

    @property
    def stacked(self) -> str:
        """The leaf's axes over which released tensors are stacked."""
        return "".join(c for c in self.axes if c not in self.released)

    @property
    def own(self) -> str:
        """The leaf's axes within one released tensor: `stacked` stands in front of them."""
        return self.axes[len(self.stacked):]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of one released tensor."""
        lead, *rest = (math.prod(self.sizes(group)) for group in self.layout.axes.split())
        return (lead * self.layout.parts, *rest)

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index along the stacked axes, released name) of each tensor."""
        for index in np.ndindex(self.sizes(self.stacked)):
            place = dict(zip(self.stacked, index))
            layer = self.first + self.period * place.get("L", 0)
            yield index, (self.above + self.layout.name).format(l=layer, e=place.get("E"))

    def run(self, itemsize: int) -> int:
        """How much of the leading axis a slice takes: at most SLICE_BYTES, all slices but the last alike."""
        lead, *rest = self.sizes(self.released)
        count = max(1, SLICE_BYTES // (math.prod(rest) * itemsize))
        return -(-lead // -(-lead // count))

    def chunks(self, itemsize: int) -> tuple[int, ...]:
        """The shape of a slice in the leaf."""
        special = dict.fromkeys(self.stacked, 1) | {self.released[0]: self.run(itemsize)}
        return tuple(special.get(c, n) for c, n in zip(self.axes, self.shape))

    def pieces(self, itemsize: int) -> Iterator[Piece]:
        lead, run = self.released[0], self.run(itemsize)
        end, = self.sizes(lead)
        for index, name in self.tensors():
            for start in range(0, end, run):
                piece = slice(start, min(start + run, end))
                inside = tuple(piece if c == lead else slice(None) for c in self.own)
                yield Piece(name, piece.start, piece.stop, index + inside)

    def ours(self, block: np.ndarray) -> np.ndarray:
        """A slice in the released layout, with the leaf's axes."""
        return block.transpose([self.released.index(c) for c in self.own])

    def theirs(self, block: np.ndarray) -> np.ndarray:
        """The inverse of `ours`."""
        return np.ascontiguousarray(block.transpose([self.own.index(c) for c in self.released]))


def leaves(model: Model) -> list[Leaf]:
    """Every array of the model's parameter tree."""
    extents = (("W", model.vocab), ("D", model.dim), ("H", model.heads), ("G", model.kv_heads), ("K", model.head_dim),
               ("V", model.head_dim), ("F", model.expert_dim), ("E", model.experts), ("L", model.groups))

    def table(folder, layouts, above, extents=extents, **place):
        return [Leaf((*folder, name), "L" * ("{l}" in above) + name.rpartition("_")[2], layout, extents, above, **place)
                for name, layout in layouts.items()]

    found = table((), TOP, root(model))
    for i, kind in enumerate(model.pattern):
        at, place = ("groups", f"layer_{i}"), {"first": i, "period": len(model.pattern)}
        for folder, layouts in (((), NORMS), (("mixer",), MIXERS[kind]), (("moe",), MOE)):
            found += table((*at, *folder), layouts, f"{root(model)}model.layers.{{l}}.", **place)
    if model.vision.layers:
        extents = tuple(model.vision.extents(model.dim).items())
        found += table(("vision",), VISION, "", extents)
        found += table(("vision", "layers"), BLOCK_OF_VISION, f"{TOWER}encoder.layers.{{l}}.", extents)
    return found


def root(model: Model) -> str:
    """What stands before the text model's names."""
    return "language_model." if model.vision.layers else ""


def decay_buffers(model: Model, layer: int) -> dict[str, np.ndarray]:
    """The derived buffers that transformers has in a lightning layer, with the released decay (model.md section 3)."""
    rate = -np.array(model.log_decay[layer], np.float64)[:, None, None]
    steps = np.arange(1, BLOCK + 1, dtype=np.float64)
    apart = steps[:, None] - steps
    buffers = {"slope_rate": rate, "query_decay": np.exp(-rate * steps[:, None]),
               "key_decay": np.exp(-rate * (BLOCK - steps[:, None])),
               "diagonal_decay": np.exp(np.where(apart >= 0, -rate * apart, -np.inf))[None]}
    return {name: value.astype(np.float32) for name, value in buffers.items()}
