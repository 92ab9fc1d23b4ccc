"""The released checkpoint form (model.md section 6): config.json, tensor names and layouts, safetensors files.

One set of tables says for each leaf of the parameter tree which released tensors hold it, and with which axes; reading
and writing walk the same slices. A slice is a run of the released layout's leading axis (one contiguous run of bytes,
or one a head where q, k and v are interleaved): memory is bounded by SLICE_BYTES and not by a tensor.
"""
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mmx import untrusted
from mmx.config import ConfigError, Model, build, typed

SLICE_BYTES = 64 << 20
MOST_TENSORS, MOST_AXES, MOST_NAME = 1_000_000, 8, 256      # of a file, of a tensor, characters of a tensor's name
BLOCK = 256                                             # transformers' block_size: the extent of its decay buffers
DECAY_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


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


# ---- config.json ----

REQUIRED = {"vocab": "vocab_size", "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
            "expert_dim": "intermediate_size", "experts": "num_local_experts"}
VISION_REQUIRED = {"layers": "num_hidden_layers", "dim": "hidden_size", "heads": "num_attention_heads",
                   "hidden": "intermediate_size", "tile": "image_size", "patch": "patch_size"}
FACTORS = {     # ours: (released, transformers)
    f"{ratio}_{ours}": (f"layernorm_{released}_{ratio}", f"{stock}_{ratio}_factor")
    for ours, released, stock in (("lightning", "linear_attention", "linear_attn"),
                                  ("softmax", "full_attention", "full_attn"), ("moe", "mlp", "mlp"))
    for ratio in ("alpha", "beta")}


def read_model(config: dict, where) -> dict:
    """What a config.json in either dialect says of the function, as arguments of config.Model.

    Where one holds both, the released keys win: stock transformers' rotary_dim is always the whole head. Keys that are
    absent have the released code's defaults, except that postnorm is true, as in every released config.
    """
    try:
        model = _arguments(config) if "vision_config" not in config else _arguments_with_vision(config)
        build({"model": model})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return model


def _field(of: dict, keys: str, kind: type, default=None, null=None):
    """The value of the first of `keys` that is there: a `kind`, or null where that may stand for a default."""
    key = next((key for key in keys.split() if key in of), None)
    if key is None and default is not None:
        return default
    if key is None:
        raise ConfigError(f"{' or '.join(keys.split())} is missing")
    value = of[key]
    return null if value is None and null is not None else typed(key, value, kind)


def _arguments_with_vision(config: dict) -> dict:
    theirs = _field(config, "vision_config", dict)
    for key, value, only in (("model_type", config.get("model_type"), ("minimax_vl_01", "llava_next")),
                             ("tie_word_embeddings", config.get("tie_word_embeddings", False), (False,)),
                             ("vision_feature_layer", config.get("vision_feature_layer", -2), (-1,)),
                             ("vision_feature_select_strategy", config.get("vision_feature_select_strategy", "default"),
                              ("default",)),
                             ("projector_hidden_act", config.get("projector_hidden_act", "gelu"), ("gelu",)),
                             ("multimodal_projector_bias", config.get("multimodal_projector_bias", True), (True,)),
                             ("vision_config.hidden_act", theirs.get("hidden_act", "quick_gelu"), ("gelu",)),
                             ("vision_config.num_channels", theirs.get("num_channels", 3), (3,))):
        if value not in only:
            raise ConfigError(f"{key}={value!r} is not supported, only {' or '.join(map(repr, only))}")
    vision = {ours: _field(theirs, name, int) for ours, name in VISION_REQUIRED.items()}
    grids, tile = _field(config, "image_grid_pinpoints", list), max(vision["tile"], 1)
    if not grids or not all(isinstance(size, list) and len(size) == 2 and all(
            type(n) is int and n > 0 and n % tile == 0 for n in size) for size in grids):
        raise ConfigError(f"image_grid_pinpoints={grids!s:.200} must be pairs of heights and widths of whole tiles of {tile}")
    vision |= {"grids": [[height // tile, width // tile] for height, width in grids],
               "norm_eps": _field(theirs, "layer_norm_eps", float, 1e-5), "token": _field(config, "image_token_index", int)}
    return _arguments(_field(config, "text_config", dict)) | {"vision": vision}


def _arguments(config: dict) -> dict:
    model = {ours: _field(config, theirs, int) for ours, theirs in REQUIRED.items() if ours != "experts"}
    experts = {typed("num_local_experts", count, int) for count in _listed(config.get("num_local_experts"))}
    if len(experts) != 1:
        raise ConfigError(f"num_local_experts={sorted(experts)}: layers with different numbers of experts are not supported")
    model["experts"], = experts
    if not _field(config, "postnorm", bool, True):
        raise ConfigError("postnorm=false (the residual is the un-normed input) is not supported; the released models have "
                          "true")
    rope = _field(config, "rope_parameters", dict, {}, {})
    shared = config.get("shared_intermediate_size") or 0
    for key, value, only in (("model_type", _field(config, "model_type", str, "minimax", "minimax")[:7], "minimax"),
                             ("hidden_act", config.get("hidden_act", "silu"), "silu"),
                             ("shared_intermediate_size", shared if any(_listed(shared)) else 0, 0),
                             ("tie_word_embeddings", config.get("tie_word_embeddings", False), False),
                             ("sliding_window", config.get("sliding_window"), None),
                             ("rope_scaling", config.get("rope_scaling"), None),
                             ("rope_parameters.rope_type", rope.get("rope_type", "default"), "default"),
                             ("quantization_config", config.get("quantization_config"), None)):
        if value != only:
            raise ConfigError(f"{key}={value!r} is not supported, only {only!r}")
    kinds = {0: "L", 1: "S", "linear_attention": "L", "full_attention": "S"}
    listed = config.get("attn_type_list") or config.get("layer_types")
    if not isinstance(listed, list) or len(listed) != model["layers"] or not all(
            isinstance(kind, (int, str)) and kind in kinds for kind in listed):
        raise ConfigError(f"needs attn_type_list (0 lightning, 1 softmax) or layer_types (linear_attention, full_attention) "
                          f"for {model['layers']} layers, got {listed!s:.200}")
    letters = "".join(kinds[kind] for kind in listed)
    model["pattern"] = next(letters[:p] for p in range(1, len(letters) + 1)
                            if letters[:p] * (len(letters) // p) == letters)
    model["kv_heads"] = _field(config, "num_key_value_heads", int, model["heads"], model["heads"])
    share = model["dim"] // max(model["heads"], 1)
    model["head_dim"] = _field(config, "head_dim", int, share, share)
    part = round(_field(config | rope, "partial_rotary_factor", float, 1.0) * model["head_dim"])
    model["rotary_dim"] = _field(config, "rotary_dim", int, part, part)
    theta = _field(rope, "rope_theta", float, 10_000.0)
    model["rope_theta"] = _field(config, "rope_theta", float, theta, theta)
    model["top_k"] = _field(config, "num_experts_per_tok", int, 2)
    model["norm_eps"] = _field(config, "rms_norm_eps", float, 1e-5)
    model["context"] = _field(config, "max_position_embeddings", int, Model.context)
    model["aux"], model["aux_weight"] = "hf", _field(config, "router_aux_loss_coef", float, 0.001)
    for ours, names in FACTORS.items():
        model[ours] = _field(config, " ".join(names), float, 1.0)
        if model[ours] == 0 and ours.startswith("alpha"):
            raise ConfigError(f"{' or '.join(names)} is 0: a residual without its input is not supported")
    return model


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def write_model(model: Model, dialect: str, dtype: str, ids: dict) -> dict:
    """config.json of a model. The transformers dialect holds the released keys too, which stock transformers keeps and
    ignores: its own have no place for partial RoPE that it would honour. router_aux_loss_coef weighs transformers' form
    of the balance loss, top_k where ours is 1 or 1/experts^2 (model.md section 5): the weight is scaled to press as hard."""
    if model.head_norm_eps != 1e-6:
        raise ConfigError(f"model.head_norm_eps={model.head_norm_eps} has no place in the released form: 1e-6 is fixed")
    if not model.postnorm:
        raise ConfigError("model.postnorm=False has no place in the released form, whose residual is the normed input")
    if "W" in model.pattern:
        raise ConfigError(f"model.pattern={model.pattern!r}: layers with a window, W, have no place in the released form")
    aux_weight = model.aux_weight / {"hf": 1, "switch": model.top_k, "paper": model.top_k * model.experts**2}[model.aux]
    released = {
        "attn_type_list": ["LS".index(kind) for kind in model.layer_kinds], "rotary_dim": model.rotary_dim,
        "rope_theta": model.rope_theta, "postnorm": True, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid",
    } | {names[0]: getattr(model, ours) for ours, names in FACTORS.items()}
    stock = {
        "layer_types": [{"L": "linear_attention", "S": "full_attention"}[kind] for kind in model.layer_kinds],
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta,
                            "partial_rotary_factor": model.rotary_dim / model.head_dim}, "block_size": BLOCK,
    } | {names[1]: getattr(model, ours) for ours, names in FACTORS.items()}
    both = {theirs: getattr(model, ours) for ours, theirs in REQUIRED.items()} | {
        "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim, "num_experts_per_tok": model.top_k,
        "rms_norm_eps": model.norm_eps, "hidden_act": "silu", "max_position_embeddings": model.context,
        "router_aux_loss_coef": aux_weight, "router_jitter_noise": 0.0, "tie_word_embeddings": False,
        "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, **ids}
    if dialect == "released":
        text = {"architectures": ["MiniMaxText01ForCausalLM"], "model_type": "minimax_text_01", "torch_dtype": dtype,
                **both, **released}
    else:
        text = {"architectures": ["MiniMaxForCausalLM"], "model_type": "minimax", "dtype": dtype,
                **both, **released, **stock}
    return _around(text, model, dialect, dtype, ids) if model.vision.layers else text


def _around(text: dict, model: Model, dialect: str, dtype: str, ids: dict) -> dict:
    """config.json of a model that sees: the text model's within. Transformers' form of it is LlavaNext."""
    v = model.vision
    if not v.grids:
        raise ConfigError("model.vision.grids=() has no place in the released form, which cuts every image into tiles")
    vision = {"model_type": "clip_vision_model", "hidden_act": "gelu", "layer_norm_eps": v.norm_eps, "num_channels": 3,
              "projection_dim": model.dim, "attention_dropout": 0.0,
              **{theirs: getattr(v, ours) for ours, theirs in VISION_REQUIRED.items()}}
    name, kind, typed_as = (("MiniMaxVL01ForConditionalGeneration", "minimax_vl_01", "torch_dtype") if dialect == "released"
                            else ("LlavaNextForConditionalGeneration", "llava_next", "dtype"))
    return {"architectures": [name], "model_type": kind, typed_as: dtype, **ids, "text_config": text, "vision_config": vision,
            "image_grid_pinpoints": [[rows * v.tile, columns * v.tile] for rows, columns in v.grids],
            "image_seq_length": v.side ** 2, "image_token_index": v.token, "multimodal_projector_bias": True,
            "projector_hidden_act": "gelu", "tie_word_embeddings": False, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default"}


# ---- safetensors ----

class Tensor(NamedTuple):
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def read_json(path: Path) -> dict:
    """The object in a JSON file, within `untrusted`'s limits."""
    try:
        value = untrusted.loads(untrusted.content(path))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: an 8-byte length, a JSON header of that length, then the data."""
    if not path.is_file():
        raise ConfigError(f"{path} is no file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise ConfigError(f"{path} is truncated or no safetensors file: its header ends at byte {start} of {size}")
        if start > untrusted.JSON_BYTES:
            raise ConfigError(f"{path}: a header of {start:,} bytes is more than {untrusted.JSON_BYTES:,}: it is not read")
        try:
            header = untrusted.loads(file.read(start - 8))
            if not isinstance(header, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            raise ConfigError(f"{path} is no safetensors file: its header is not a JSON table of tensors ({error})") from None
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        if len(name) > MOST_NAME or not name.isprintable():
            raise ConfigError(f"{path} is damaged: {name[:MOST_NAME]!r} is no tensor's name")
        try:
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = type(code) is str and all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound or len(shape) > MOST_AXES:
            raise ConfigError(f"{path} is damaged: tensor {name} needs dtype, shape and data_offsets, has {entry!s:.200}")
        if start + end > size:
            raise ConfigError(f"{path} is truncated: {name} ends at byte {start + end} of {size}; fetch the file again")
        spans.append((begin, end, name))
        if name.rpartition(".")[2] in DECAY_BUFFERS:
            continue
        if code not in DTYPES:
            raise ConfigError(f"{path}: tensor {name} has dtype {code:.20}; only {', '.join(DTYPES)} are supported")
        if end - begin != math.prod(shape) * DTYPES[code].itemsize:
            raise ConfigError(f"{path} is damaged: tensor {name} of {code} {list(shape)} has {end - begin} bytes")
        tensors |= _released_names(name, Tensor(path, DTYPES[code], shape, start + begin))
        if len(tensors) > MOST_TENSORS:
            raise ConfigError(f"{path} holds more than {MOST_TENSORS:,} tensors: it is not read")
    for (_, end, name), (begin, _, after) in itertools.pairwise(sorted(spans)):
        if begin < end:
            raise ConfigError(f"{path} is damaged: the bytes of tensors {name} and {after} overlap")
    return tensors


def _released_names(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor under its released name; transformers' in-memory expert stacks become views of each expert's matrix."""
    if name.startswith(("vision_tower.", "multi_modal_projector.")):
        return {new: tensor for new in _vision_name(name)}
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


def _vision_name(name: str) -> list[str]:
    """As released; transformers leaves a part of the path out, and holds a last norm and a list of places that do nothing."""
    _, tower, tail = name.rpartition("vision_tower.")
    tail = tail.removeprefix("vision_model.")
    return [] if tail.startswith(("post_layernorm.", "embeddings.position_ids")) else [TOWER + tail if tower else name]


def find_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory with model.safetensors, or with an index of shards."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return read_header(own_file(single))
    if not index.exists():
        raise ConfigError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
    places = read_json(own_file(index)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ConfigError(f"{index} has no weight_map from tensor to file")
    tensors = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or file in ("..", ".") or not file.isprintable():
            raise ConfigError(f"{index} names the file {file[:MOST_NAME]!r}; only files in the same directory are read")
        if not (directory / file).is_file():
            raise ConfigError(f"{index} names the file {file!r}, which is not there")
        tensors |= read_header(own_file(directory / file))
        if len(tensors) > MOST_TENSORS:
            raise ConfigError(f"{index}: its files hold more than {MOST_TENSORS:,} tensors")
    listed = {new for name in places for new in _stem(name, tensors)}
    absent = sorted(listed - tensors.keys())
    if absent:
        raise ConfigError(f"{index} lists tensors that its files do not hold: {few(absent)}")
    return tensors


def own_file(path: Path) -> Path:
    """A file of a checkpoint; raises ConfigError for a link out of its directory."""
    if not untrusted.inside(path, path.parent):
        raise ConfigError(f"{path} is a link that leads out of its directory: put the file itself there")
    return path


def _stem(name: str, tensors) -> list[str]:
    """A listed name as `find_tensors` has it; stacks and derived buffers were seen to by their file's header."""
    if name.startswith(("vision_tower.", "multi_modal_projector.")):
        return _vision_name(name)
    if name.rpartition(".")[2] in DECAY_BUFFERS or name.partition(".mlp.experts.")[1]:
        return []
    return [name.replace(".mlp.", ".block_sparse_moe.")]


def few(names) -> str:
    """Up to five names, and how many more."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_tensors(tensors: dict[str, Tensor], model: Model, where) -> None:
    """Raises ConfigError unless `tensors` are those of `model`."""
    if model.checkpoint_tensors > 100_000 + len(tensors):       # more than can be listed
        raise ConfigError(f"{where} holds {len(tensors)} tensors, its config.json asks for {model.checkpoint_tensors}")
    check_shapes({name: tensor.shape for name, tensor in tensors.items()},
                 {name: leaf.tensor_shape for leaf in leaves(model) for _, name in leaf.tensors()}, where)


def check_shapes(shapes: dict[str, tuple], wanted: dict[str, tuple], where, what: str = "its config.json") -> None:
    """Raises ConfigError unless no array is missing, none extra, and all have the shape that `what` wants."""
    problems = (("misses", [name for name in wanted if name not in shapes]),
                ("has unknown", sorted(shapes.keys() - wanted.keys())),
                ("has misshapen", [f"{name} {list(shapes[name])} instead of {list(shape)}"
                                   for name, shape in wanted.items() if shapes.get(name, shape) != shape]))
    found = [f"{label} {few(names)}" for label, names in problems if names]
    if found:
        raise ConfigError(f"{where} does not hold the tensors of {what}: it {'; it '.join(found)}")


class Files:
    """Files open by path, read and written at offsets: no mapped page counts as memory."""

    def __init__(self, flags: int):
        self.flags, self.open = flags, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.open.values():
            os.close(handle)

    def handle(self, path: Path) -> int:
        if path not in self.open:
            self.open[path] = os.open(path, self.flags, 0o666)
        return self.open[path]

    def read(self, path: Path, buffer: memoryview, offset: int):
        while buffer:
            count = os.preadv(self.handle(path), [buffer], offset)
            if not count:
                raise ConfigError(f"{path} ended at byte {offset} while it was read")
            buffer, offset = buffer[count:], offset + count

    def write(self, path: Path, buffer: memoryview, offset: int):
        while buffer:
            count = os.pwrite(self.handle(path), buffer, offset)
            buffer, offset = buffer[count:], offset + count


def runs(leaf: Leaf, piece: Piece, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """(first byte in the tensor, first, last entry of the piece): one run, or one an entry where parts interleave."""
    row = math.prod(leaf.sizes(leaf.released[1:])) * itemsize
    _, _, part, parts = leaf.layout
    step = 1 if parts > 1 else piece.stop - piece.start
    for start in range(piece.start, piece.stop, step):
        yield (start * parts + part) * row, start - piece.start, start - piece.start + step


def read_piece(files: Files, tensor: Tensor, leaf: Leaf, piece: Piece) -> np.ndarray:
    """A slice of a released tensor, in its layout."""
    block = np.empty((piece.stop - piece.start, *leaf.sizes(leaf.released[1:])), tensor.dtype)
    for offset, first, last in runs(leaf, piece, tensor.dtype.itemsize):
        files.read(tensor.file, memoryview(block[first:last].reshape(-1).view(np.uint8)), tensor.offset + offset)
    return block


def write_piece(files: Files, tensor: Tensor, leaf: Leaf, piece: Piece, block: np.ndarray):
    for offset, first, last in runs(leaf, piece, tensor.dtype.itemsize):
        files.write(tensor.file, memoryview(block[first:last].reshape(-1).view(np.uint8)), tensor.offset + offset)


def plan_files(directory: Path, tensors: dict[str, tuple[np.dtype, tuple]], shard_bytes: int) -> dict[str, Tensor]:
    """Lays tensors out in safetensors files of at most `shard_bytes` of data (a larger tensor has one of its own).

    Writes headers and index, and says where each tensor goes; the data is still a hole.
    """
    shards, room = [], 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room or not shards:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, dtype, shape, size))
        room -= size
    placed = {}
    for i, shard in enumerate(shards):
        place = f"-{i + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = directory / f"model{place}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, dtype, shape, size in sorted(shard, key=lambda entry: -entry[1].itemsize):     # keeps data aligned
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
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return placed
