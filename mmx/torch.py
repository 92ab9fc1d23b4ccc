"""Loads checkpoints as transformers models that give the logits of the released code.

The MiniMaxForCausalLM of transformers 5.23.0 gives other logits (docs/model.md section 7). `load` changes the loaded model,
not the library:

    config      transformers does not read the released keys of the layer kinds and residual factors. `load` adds its keys.
    RoPE        The stock model rotates all K dimensions of a head, in pairs (i, i + K/2). The released model rotates only the
                first r = rotary_dim, in pairs (i, i + r/2). Hooks on q_proj and k_proj permute the dimensions of q and k in the
                same way, which does not change attention scores, so that each released pair (i, i + r/2) is at (i, i + K/2).
                The remaining stock pairs get frequency zero.
    decay       The slopes differ if the number of heads is not a power of two, and the factor of each layer differs slightly.
    dtype       The stock model keeps decays and states of lightning attention in its own dtype. The released model and
                mmx keep them in float32; in bfloat16 the smallest slopes would be lost to rounding.
"""
import copy
from pathlib import Path

from mmx.checkpoints import hf_config, hf_layout, manager, safetensors
from mmx.config import ConfigError, Model, build
from mmx.files import untrusted
from mmx.layers.lightning import log_decay

try:
    import torch
    from transformers import MiniMaxConfig, MiniMaxForCausalLM
    from transformers.utils import logging
except ImportError as error:
    raise ImportError(f"mmx.torch needs torch and transformers ({error}): pip install 'mmx[torch]'") from None


def load(directory: str | Path, dtype: torch.dtype = torch.float32, **options) -> MiniMaxForCausalLM:
    """Reads a Hugging Face directory as a transformers model that gives the logits of the released code.

    Args:
      directory: contains safetensors files and a config.json with the released keys or with those of transformers.
      options: passed to `from_pretrained`.
    """
    directory = Path(directory)
    if manager.find_step(directory):
        raise ConfigError(f"{directory} is an mmx workdir: export it first, by mmx convert to-hf --checkpoint {directory} "
                          "--out DIR")
    config_file = directory / "config.json"
    config = untrusted.read_json(untrusted.check_link(config_file))
    model = build({"model": hf_config.read_model(config, config_file)}).model
    if model.vision.layers:
        raise ConfigError(f"{directory} contains a vision model: mmx.torch supports text models only")
    safetensors.check_tensors(safetensors.find_tensors(directory), model, directory)
    ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    stock = hf_config.write_model(model, "transformers", str(dtype).removeprefix("torch."), ids)
    stock["block_size"] = config.get("block_size", hf_layout.BLOCK)
    stock["router_aux_loss_coef"] = config.get("router_aux_loss_coef", stock["router_aux_loss_coef"])
    loaded = load_stock(directory, config=MiniMaxConfig(**stock), dtype=dtype, **options)
    for name, parameter in loaded.named_parameters() if dtype == torch.float16 else ():
        if parameter.isinf().any():
            raise ConfigError(f"{directory}: tensor {name} contains values too large for {dtype}: use bfloat16 or float32")
    return make_faithful(loaded, model)


def load_stock(directory: str | Path, **options) -> MiniMaxForCausalLM:
    """Reads a directory with unchanged transformers, which gives other logits."""
    index = Path(directory) / safetensors.INDEX
    if index.exists():      # otherwise transformers would read a stray model.safetensors
        if not isinstance(untrusted.read_json(index).get("metadata"), dict):
            raise ConfigError(f"{index} has no metadata, which transformers needs: rewrite it by mmx convert to-hf")
        stored = untrusted.read_json(untrusted.check_link(Path(directory) / "config.json"))
        options["config"] = copy.copy(options.get("config") or MiniMaxConfig.from_dict(stored))
        options["config"].transformers_weights = safetensors.INDEX
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()       # it would report the decay buffers, which are not in the file, as newly initialized
    try:
        return MiniMaxForCausalLM.from_pretrained(directory, use_safetensors=True, trust_remote_code=False, **options)
    finally:
        logging.set_verbosity(verbosity)


@torch.no_grad()
def make_faithful(stock: MiniMaxForCausalLM, model: Model) -> MiniMaxForCausalLM:
    """Changes a stock model in place, so that it has the partial RoPE and the decay of `model`. Returns it."""
    half, pairs = model.head_dim // 2, model.rotary_dim // 2
    order = torch.tensor([*range(pairs), *range(2 * pairs, half + pairs), *range(pairs, 2 * pairs),
                          *range(half + pairs, model.head_dim)])

    def reorder(module, inputs, heads_BTGK):
        return heads_BTGK.unflatten(-1, (-1, model.head_dim))[..., order.to(heads_BTGK.device)].flatten(-2)

    def to_float32(module, inputs, activated):
        return activated.float()

    def to_model_dtype(module, inputs):
        return tuple(x.to(module.weight.dtype) for x in inputs)

    rotary = stock.model.rotary_emb
    frequencies = torch.zeros_like(rotary.inv_freq)
    if pairs:
        frequencies[:pairs] = 1.0 / model.rope_theta ** (torch.arange(pairs).to(frequencies) / pairs)
    rotary.inv_freq.copy_(frequencies)
    rotary.original_inv_freq.copy_(frequencies)
    for layer, kind in enumerate(model.layer_kinds):
        attention = stock.model.layers[layer].self_attn
        if kind == "S":
            attention.q_proj.register_forward_hook(reorder)
            attention.k_proj.register_forward_hook(reorder)
            continue
        rate = -torch.tensor(log_decay(model, layer), dtype=torch.float32, device=attention.slope_rate.device)[:, None, None]
        for name, value in zip(hf_layout.DECAY_BUFFERS, (rate, *attention.decay_factors(rate))):
            setattr(attention, name, value)
        attention.act_fn.register_forward_hook(to_float32)
        attention.out_proj.register_forward_pre_hook(to_model_dtype)
    return stock


@torch.no_grad()
def logits(model: MiniMaxForCausalLM, tokens_BT):
    """Logits of whole sequences, as a float32 NumPy array."""
    return model(torch.as_tensor(tokens_BT), use_cache=False).logits.float().numpy()
