"""The released function in transformers: MiniMaxForCausalLM with partial RoPE and the released decay.

Stock transformers (5.23.0, model.md section 7) turns whole heads, and has other slopes where the number of heads is no
power of two. `load` mends one model and leaves the library as it is. Stock RoPE pairs dimension i with i + K/2; the
released one pairs i with i + r/2 inside the first r = rotary_dim. Scores do not change when q and k are permuted alike,
so hooks on q_proj and k_proj bring the released pairs into stock places; the frequencies of the other places are zero.
Stock lightning attention also holds its decays and states in the model's dtype, where the released one, and mmx, have
float32: in bfloat16 the smallest slopes would round away.
"""
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
    """A Hugging Face directory, in either dialect, as a transformers model that computes the released function."""
    directory = Path(directory)
    if manager.find_step(directory):
        raise ConfigError(f"{directory} is an mmx workdir: first mmx convert to-hf --checkpoint {directory} --out DIR")
    where = directory / "config.json"
    config = untrusted.read_json(untrusted.own_file(where))
    model = build({"model": hf_config.read_model(config, where)}).model
    if model.vision.layers:
        raise ConfigError(f"{directory} holds a model that sees: mmx.torch has the function of the text model alone")
    safetensors.check_tensors(safetensors.find_tensors(directory), model, directory)
    ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    stock = hf_config.write_model(model, "transformers", str(dtype).removeprefix("torch."), ids)
    stock["block_size"] = config.get("block_size", hf_layout.BLOCK)
    stock["router_aux_loss_coef"] = config.get("router_aux_loss_coef", stock["router_aux_loss_coef"])
    return mend(load_stock(directory, config=MiniMaxConfig(**stock), dtype=dtype, **options), model)


def load_stock(directory: str | Path, **options) -> MiniMaxForCausalLM:
    """The directory as stock transformers reads it, which computes another function."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()       # its report calls decay buffers that are not in the file newly initialized
    try:
        return MiniMaxForCausalLM.from_pretrained(directory, use_safetensors=True, trust_remote_code=False, **options)
    finally:
        logging.set_verbosity(verbosity)


@torch.no_grad()
def mend(stock: MiniMaxForCausalLM, model: Model) -> MiniMaxForCausalLM:
    """Gives a stock model, in place, the partial RoPE and the decay of `model`."""
    half, turned = model.head_dim // 2, model.rotary_dim // 2
    order = torch.tensor([*range(turned), *range(2 * turned, half + turned), *range(turned, 2 * turned),
                          *range(half + turned, model.head_dim)])

    def reorder(module, inputs, heads_BTGK):
        return heads_BTGK.unflatten(-1, (-1, model.head_dim))[..., order.to(heads_BTGK.device)].flatten(-2)

    def to_float32(module, inputs, activated):
        return activated.float()

    def to_model_dtype(module, inputs):
        return tuple(x.to(module.weight.dtype) for x in inputs)

    rotary = stock.model.rotary_emb
    frequencies = torch.zeros_like(rotary.inv_freq)
    if turned:
        frequencies[:turned] = 1.0 / model.rope_theta ** (torch.arange(turned).to(frequencies) / turned)
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
    """float32 logits as numpy, without a cache."""
    return model(torch.as_tensor(tokens_BT), use_cache=False).logits.float().numpy()
