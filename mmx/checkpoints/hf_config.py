"""config.json of the released checkpoint form, in its two dialects (docs/model.md section 6)."""
import re

from mmx.checkpoints.hf_keys import check_keys
from mmx.checkpoints.hf_layout import BLOCK, check_released
from mmx.checkpoints.shapes import first_five
from mmx.config import ConfigError, Model, build, typed
from mmx.files import notes
from mmx.layers.kinds import KINDS, kind_of

REQUIRED = {"vocab": "vocab_size", "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
            "expert_dim": "intermediate_size", "experts": "num_local_experts"}
VISION_REQUIRED = {"layers": "num_hidden_layers", "dim": "hidden_size", "heads": "num_attention_heads",
                   "hidden": "intermediate_size", "tile": "image_size", "patch": "patch_size"}
FACTORS = {     # key of mmx: (key of the released dialect, key of transformers)
    f"{ratio}_{ours}": (f"layernorm_{released}_{ratio}", f"{stock}_{ratio}_factor")
    for ours, released, stock in (("lightning", "linear_attention", "linear_attn"),
                                  ("softmax", "full_attention", "full_attn"), ("moe", "mlp", "mlp"))
    for ratio in ("alpha", "beta")}
USED = {*REQUIRED.values(), *(key for keys in FACTORS.values() for key in keys), "num_key_value_heads", "head_dim",
        "rotary_dim", "partial_rotary_factor", "rope_theta", "rope_parameters", "rope_scaling", "num_experts_per_tok",
        "rms_norm_eps", "attn_type_list", "layer_types", "postnorm", "hidden_act", "shared_intermediate_size",
        "tie_word_embeddings", "sliding_window", "quantization_config"}
VISION_USED = {*VISION_REQUIRED.values(), "layer_norm_eps", "hidden_act", "num_channels"}
OUTER_USED = {"text_config", "vision_config", "image_grid_pinpoints", "image_token_index", "image_token_id",
              "tie_word_embeddings", "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act",
              "multimodal_projector_bias", "quantization_config"}
DEFAULT_KV_HEADS, DEFAULT_ROPE_THETA = 8, 1e6       # of the released code and of transformers, for absent keys
# Model types and architectures, in lower case without separators. Whole names are compared: MiniMax-M2 is another model.
TEXT_TYPES = ("minimax", "minimaxtext01", "minimaxm1", "minimaxvl01text")
VISION_TYPES = ("minimaxvl01", "llavanext")


def read_model(config: dict, where) -> dict:
    """The arguments of config.Model that a config.json in either dialect describes. Raises ConfigError.

    Released keys take precedence over those of transformers. Missing keys get the defaults of the released code, except
    postnorm: it is true, as in every released config. One line on stderr names keys that mmx does not know; those that may
    change the function are refused (`hf_keys`).

    Args:
      where: the file, for messages.
    """
    unknown = []
    try:
        read = _arguments_with_vision if "vision_config" in config else _arguments
        model = read(config, unknown)
        build({"model": model})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if unknown:
        notes.note(f"{where}: keys that mmx does not know are ignored: {first_five(unknown)}")
    return model


def _field(table: dict, keys: str, kind: type, default=None, null=None):
    """The value of the first of `keys` that `table` has. Raises ConfigError if it is not a `kind`.

    Args:
      keys: separated by spaces.
      default: the value if there is no key; None: the key is required.
      null: the value if the key has null; None: null is refused.
    """
    key = next((key for key in keys.split() if key in table), None)
    if key is None and default is not None:
        return default
    if key is None:
        raise ConfigError(f"{' or '.join(keys.split())} is missing")
    value = table[key]
    return null if value is None and null is not None else typed(key, value, kind)


def _check_type(config: dict, types: tuple, examples: str) -> None:
    """Raises ConfigError unless model_type is one of `types`, or architectures if there is no model_type."""
    key = "architectures" if config.get("model_type") is None else "model_type"
    names = _as_list([] if config.get(key) is None else config[key])
    for name in names:
        if re.sub("(for[a-z]+|model)$", "", _plain(name)) not in types:
            raise ConfigError(f"{key}={name!r:.200} is not supported, only {examples}")


def _plain(name) -> str:
    """A name in lower case without separators: minimaxtext01 for minimax_text_01, MiniMaxText01 and MiniMax-Text-01."""
    return re.sub(r"[-_.\s]", "", str(name)).lower()


def _arguments_with_vision(config: dict, unknown: list) -> dict:
    """The arguments of a model that reads images: config.json contains its text model as text_config."""
    vision_config, text_config = (_field(config, key, dict) for key in ("vision_config", "text_config"))
    _check_type(config, VISION_TYPES, "'minimax_vl_01' or 'llava_next'")
    for key, value, only in (("quantization_config", config.get("quantization_config"), (None,)),
                             ("tie_word_embeddings", config.get("tie_word_embeddings", False), (False,)),
                             ("vision_feature_layer", config.get("vision_feature_layer", -2), (-1,)),
                             ("vision_feature_select_strategy", config.get("vision_feature_select_strategy", "default"),
                              ("default",)),
                             ("projector_hidden_act", config.get("projector_hidden_act", "gelu"), ("gelu",)),
                             ("multimodal_projector_bias", config.get("multimodal_projector_bias", True), (True,)),
                             ("vision_config.hidden_act", vision_config.get("hidden_act", "quick_gelu"), ("gelu",)),
                             ("vision_config.num_channels", vision_config.get("num_channels", 3), (3,))):
        if value not in only:
            raise ConfigError(f"{key}={value!r} is not supported, only {' or '.join(map(repr, only))}")
    vision = {ours: _field(vision_config, name, int) for ours, name in VISION_REQUIRED.items()}
    grids, tile = _field(config, "image_grid_pinpoints", list), max(vision["tile"], 1)
    if not grids or not all(isinstance(size, list) and len(size) == 2 and all(
            type(n) is int and n > 0 and n % tile == 0 for n in size) for size in grids):
        raise ConfigError(f"image_grid_pinpoints={grids!s:.200} must be pairs of height and width, multiples of {tile}")
    vision |= {"grids": [[height // tile, width // tile] for height, width in grids],
               "norm_eps": _field(vision_config, "layer_norm_eps", float, 1e-5),
               "token": _field(config, "image_token_index image_token_id", int)}
    unknown += check_keys(config, OUTER_USED) + check_keys(vision_config, VISION_USED, "vision_config.")
    return _arguments(text_config, unknown, "text_config.") | {"vision": vision}


def _arguments(config: dict, unknown: list, prefix: str = "") -> dict:
    """The arguments of a text model. The keys that mmx does not know are added to `unknown`, with `prefix`."""
    _check_type(config, TEXT_TYPES, "'minimax', 'minimax_text_01' or 'minimax_m1'")
    model = {ours: _field(config, theirs, int) for ours, theirs in REQUIRED.items() if ours != "experts"}
    experts = {typed("num_local_experts", count, int) for count in _as_list(config.get("num_local_experts"))}
    if len(experts) != 1:
        raise ConfigError(f"num_local_experts={sorted(experts)}: layers with different numbers of experts are not supported")
    model["experts"], = experts
    if not _field(config, "postnorm", bool, True):
        raise ConfigError("postnorm=false (the residual is the input before its norm) is not supported; the released "
                          "models have true")
    rope = _rope(config)
    shared = config.get("shared_intermediate_size") or 0
    for key, value, only in (("hidden_act", config.get("hidden_act", "silu"), "silu"),
                             ("shared_intermediate_size", shared if any(_as_list(shared)) else 0, 0),
                             ("tie_word_embeddings", config.get("tie_word_embeddings", False), False),
                             ("sliding_window", config.get("sliding_window"), None),
                             ("quantization_config", config.get("quantization_config"), None)):
        if value != only:
            raise ConfigError(f"{key}={value!r} is not supported, only {only!r}")
    kinds = {name: letter for letter, kind in KINDS.items() if (form := kind.released) for name in (form.code, form.layer_type)}
    listed = config.get("attn_type_list") or config.get("layer_types")
    if not isinstance(listed, list) or len(listed) != model["layers"] or not all(
            isinstance(kind, (int, str)) and kind in kinds for kind in listed):
        raise ConfigError(f"needs attn_type_list (0 lightning, 1 softmax) or layer_types (linear_attention, full_attention) "
                          f"for {model['layers']} layers, got {listed!s:.200}")
    letters = "".join(kinds[kind] for kind in listed)
    model["pattern"] = next(letters[:p] for p in range(1, len(letters) + 1)
                            if letters[:p] * (len(letters) // p) == letters)
    model["kv_heads"] = _field(config, "num_key_value_heads", int, DEFAULT_KV_HEADS, model["heads"])
    share = model["dim"] // max(model["heads"], 1)
    model["head_dim"] = _field(config, "head_dim", int, share, share)
    parts = {name: round(share * model["head_dim"])
             for name, share in _given("partial_rotary_factor", float, config, rope).items()}
    model["rotary_dim"] = _one_value(_given("rotary_dim", int, config, rope) | parts, model["head_dim"])
    model["rope_theta"] = _one_value(_given("rope_theta", float, config, rope), DEFAULT_ROPE_THETA)
    model["top_k"] = _field(config, "num_experts_per_tok", int, 2)
    model["norm_eps"] = _field(config, "rms_norm_eps", float, 1e-5)
    model["context"] = _field(config, "max_position_embeddings", int, Model.context)
    model["aux"], model["aux_weight"] = "hf", _field(config, "router_aux_loss_coef", float, 0.001)
    for ours, names in FACTORS.items():
        model[ours] = _field(config, " ".join(names), float, 1.0)
        if model[ours] == 0 and ours.startswith("alpha"):
            raise ConfigError(f"{' or '.join(names)} is 0: a layer without its residual is not supported")
    unknown += check_keys(config, USED, prefix)
    return model


def _given(key: str, kind: type, config: dict, rope: dict) -> dict:
    """The values of a key of RoPE, by their places: config.json itself, as in the released file, and rope_parameters."""
    tables = {key: config, f"rope_parameters.{key}": rope}
    return {name: _field(table, key, kind) for name, table in tables.items() if table.get(key) is not None}


def _one_value(given: dict[str, float], default: float):
    """The value that one or several keys give. Raises ConfigError if two of them differ."""
    if len(set(given.values())) > 1:
        raise ConfigError(f"{' and '.join(f'{name} (gives {value:g})' for name, value in given.items())} contradict each other")
    return next(iter(given.values()), default)


def _rope(config: dict) -> dict:
    """rope_parameters. Raises ConfigError unless it, and rope_scaling of older files, describe RoPE without scaling."""
    tables = {key: _field(config, key, dict, {}, {}) for key in ("rope_parameters", "rope_scaling")}
    for name, table in tables.items():
        for key in ("rope_type", "type"):       # transformers called it "type" before version 4.45
            if table.get(key, "default") != "default":
                raise ConfigError(f"{name}.{key}={table[key]!r:.200} is not supported, only 'default': mmx computes RoPE "
                                  "without scaling")
        used = {"rope_theta", "partial_rotary_factor"} if name == "rope_parameters" else set()
        check_keys(table, used | {"rope_type", "type"}, f"{name}.")
    return tables["rope_parameters"]


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def write_model(model: Model, dialect: str, dtype: str, ids: dict) -> dict:
    """config.json of a model, as a dict.

    The transformers dialect contains the released keys too. transformers ignores them, and keeps them if it writes the file
    again. It also ignores its own key for partial RoPE. router_aux_loss_coef is scaled so that transformers' form of the
    balance loss has the same effect as the model's (docs/model.md section 5).

    Args:
      dialect: "released" or "transformers".
      dtype: of the tensors.
      ids: bos_token_id, eos_token_id and pad_token_id.
    """
    check_released(model)
    if model.head_norm_eps != 1e-6:
        raise ConfigError(f"model.head_norm_eps={model.head_norm_eps} cannot be expressed in the released form, where it is "
                          "always 1e-6")
    if not model.postnorm:
        raise ConfigError("model.postnorm=False cannot be expressed in the released form, whose residual is the normed input")
    aux_weight = model.aux_weight / {"hf": 1, "switch": model.top_k, "paper": model.top_k * model.experts**2}[model.aux]
    released = {
        "attn_type_list": [kind_of(letter).released.code for letter in model.layer_kinds], "rotary_dim": model.rotary_dim,
        "rope_theta": model.rope_theta, "postnorm": True, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid",
    } | {names[0]: getattr(model, ours) for ours, names in FACTORS.items()}
    stock = {
        "layer_types": [kind_of(letter).released.layer_type for letter in model.layer_kinds],
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
    return _with_vision(text, model, dialect, dtype, ids) if model.vision.layers else text


def stock_differences(model: Model, dialect: str, dtype: str) -> str:
    """Says in one line where stock transformers computes another function than the model, and what to use instead; or "".

    The reasons are listed in docs/model.md section 7.
    """
    remedy = "run it with mmx" if model.vision.layers else "load it with mmx.torch.load"
    if dialect == "released":
        return f"transformers needs remote code for the released dialect; {remedy}, or give --dialect transformers"
    found = []
    if "S" in model.pattern and model.rotary_dim < model.head_dim:
        found.append(f"it rotates all {model.head_dim} dimensions of a head, not the first {model.rotary_dim} (partial RoPE)")
    if "L" in model.pattern and dtype != "float32":
        found.append(f"it keeps decays and states of lightning attention in {dtype} instead of float32")
    if "L" in model.pattern and model.heads & (model.heads - 1):
        found.append(f"its decays for {model.heads} heads (not a power of two) are right only with the decay buffers in this "
                     "export")
    return f"stock transformers computes another function: {'; '.join(found)}; {remedy}" if found else ""


def _with_vision(text: dict, model: Model, dialect: str, dtype: str, ids: dict) -> dict:
    """config.json of a model that reads images. `text` becomes its text_config; in transformers the model is LlavaNext."""
    v = model.vision
    if not v.grids:
        raise ConfigError("model.vision.grids=() cannot be expressed in the released form, which cuts every image into tiles")
    vision = {"model_type": "clip_vision_model", "hidden_act": "gelu", "layer_norm_eps": v.norm_eps, "num_channels": 3,
              "projection_dim": model.dim, "attention_dropout": 0.0,
              **{theirs: getattr(v, ours) for ours, theirs in VISION_REQUIRED.items()}}
    name, kind, dtype_key = (("MiniMaxVL01ForConditionalGeneration", "minimax_vl_01", "torch_dtype") if dialect == "released"
                            else ("LlavaNextForConditionalGeneration", "llava_next", "dtype"))
    return {"architectures": [name], "model_type": kind, dtype_key: dtype, **ids, "text_config": text, "vision_config": vision,
            "image_grid_pinpoints": [[rows * v.tile, columns * v.tile] for rows, columns in v.grids],
            "image_seq_length": v.patches_per_side ** 2, "image_token_index": v.token, "multimodal_projector_bias": True,
            "projector_hidden_act": "gelu", "tie_word_embeddings": False, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default"}
