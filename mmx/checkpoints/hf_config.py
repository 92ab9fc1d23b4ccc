"""config.json of the released checkpoint form, in its two dialects (docs/model.md section 6)."""
from mmx.checkpoints.hf_layout import BLOCK, check_released
from mmx.config import ConfigError, Model, build, typed
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


def read_model(config: dict, where) -> dict:
    """The arguments of config.Model that a config.json in either dialect describes. Raises ConfigError.

    Released keys take precedence over those of transformers. Missing keys get the defaults of the released code, except
    postnorm: it is true, as in every released config.

    Args:
      where: the file, for messages.
    """
    try:
        model = _arguments(config) if "vision_config" not in config else _arguments_with_vision(config)
        build({"model": model})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
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


def _arguments_with_vision(config: dict) -> dict:
    """The arguments of a model that reads images: config.json contains its text model as text_config."""
    vision_config = _field(config, "vision_config", dict)
    for key, value, only in (("model_type", config.get("model_type"), ("minimax_vl_01", "llava_next")),
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
               "token": _field(config, "image_token_index", int)}
    return _arguments(_field(config, "text_config", dict)) | {"vision": vision}


def _arguments(config: dict) -> dict:
    """The arguments of a text model."""
    model = {ours: _field(config, theirs, int) for ours, theirs in REQUIRED.items() if ours != "experts"}
    experts = {typed("num_local_experts", count, int) for count in _as_list(config.get("num_local_experts"))}
    if len(experts) != 1:
        raise ConfigError(f"num_local_experts={sorted(experts)}: layers with different numbers of experts are not supported")
    model["experts"], = experts
    if not _field(config, "postnorm", bool, True):
        raise ConfigError("postnorm=false (the residual is the input before its norm) is not supported; the released "
                          "models have true")
    rope = _field(config, "rope_parameters", dict, {}, {})
    shared = config.get("shared_intermediate_size") or 0
    for key, value, only in (("model_type", _field(config, "model_type", str, "minimax", "minimax")[:7], "minimax"),
                             ("hidden_act", config.get("hidden_act", "silu"), "silu"),
                             ("shared_intermediate_size", shared if any(_as_list(shared)) else 0, 0),
                             ("tie_word_embeddings", config.get("tie_word_embeddings", False), False),
                             ("sliding_window", config.get("sliding_window"), None),
                             ("rope_scaling", config.get("rope_scaling"), None),
                             ("rope_parameters.rope_type", rope.get("rope_type", "default"), "default"),
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
            raise ConfigError(f"{' or '.join(names)} is 0: a layer without its residual is not supported")
    return model


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
