"""Oracles from transformers' MiniMax: random models, and the stock classes changed to the released function.

This code does not use mmx.torch and computes RoPE and the decay slopes in another way, so that the two check each other.
"""
import contextlib
import math
from types import SimpleNamespace

import torch
import transformers
from transformers.models.llava_next import modeling_llava_next
from transformers.models.minimax import modeling_minimax

torch.set_num_threads(1)


def random_model(pattern="LLLS", hidden=32, heads=4, kv=2, head_dim=8, rotary=4, ffn=24, experts=4, top_k=2, vocab=61,
                 theta=1e4, alpha=2.0, beta=0.75, block=16, seed=0):
    """A stock MiniMaxForCausalLM with random weights, much larger than initial ones so that every part affects the output."""
    config = transformers.MiniMaxConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=len(pattern),
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=head_dim, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, num_experts_per_tok=top_k, num_local_experts=experts, block_size=block,
        layer_types=["linear_attention" if letter == "L" else "full_attention" for letter in pattern],
        rope_parameters={"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": rotary / head_dim},
        full_attn_alpha_factor=alpha + 0.5, full_attn_beta_factor=beta, linear_attn_alpha_factor=alpha,
        linear_attn_beta_factor=1.0, mlp_alpha_factor=alpha - 0.5, mlp_beta_factor=beta + 0.5,
        attn_implementation="eager")
    torch.manual_seed(seed)
    return randomise(transformers.MiniMaxForCausalLM(config).eval())


@torch.no_grad()
def randomise(model):
    for name, weight in model.named_parameters():
        weight.normal_()
        if "norm" in name and name.endswith("weight"):
            weight.mul_(0.25).add_(1)
        elif weight.ndim == 1:
            weight.mul_(0.3)
        elif "embed_tokens" not in name:
            weight.mul_(1.2 / math.sqrt(math.prod(weight.shape[1:]) if weight.ndim == 4 else weight.shape[-1]))
    return model


def random_vision_model(grids, vision, tile=24, patch=8, token=60, seed=0, **text):
    """A stock LlavaNext with random weights, the options of the released vision tower and a text model as in `random_model`.

    Args:
      grids: (rows, columns) of tiles that an image may have.
      vision: the tower's (width, hidden width, layers, heads).
    """
    inner = random_model(seed=seed, **text).config
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    vision = transformers.CLIPVisionConfig(image_size=tile, patch_size=patch, hidden_act="gelu", **dict(zip(names, vision)))
    config = transformers.LlavaNextConfig(
        vision_config=vision, text_config=inner, image_token_index=token, projector_hidden_act="gelu",
        image_grid_pinpoints=[[rows * tile, columns * tile] for rows, columns in grids], vision_feature_layer=-1,
        vision_feature_select_strategy="default", tie_word_embeddings=False)
    torch.manual_seed(seed)
    return randomise(transformers.LlavaNextForConditionalGeneration._from_config(config, attn_implementation="eager").eval())


@contextlib.contextmanager
def released_vision(model):
    """Changes the text model of a LlavaNext to the released function, and LlavaNext's cropping to integer margins.

    The text model is changed in place. The cropping is restored at the end of the `with` block.
    """
    def crop(image_DYX, size):
        (height, width), (rows, columns) = [int(n) for n in size], image_DYX.shape[1:]
        if width * rows > columns * height:
            margin = (rows - height * columns // width) // 2
            return image_DYX[:, margin:rows - margin]
        margin = (columns - width * rows // height) // 2
        return image_DYX[:, :, margin:columns - margin]

    make_released(SimpleNamespace(config=model.config.text_config, model=model.model.language_model))
    stock, modeling_llava_next.unpad_image = modeling_llava_next.unpad_image, crop
    try:
        yield model
    finally:
        modeling_llava_next.unpad_image = stock


def make_released(model):
    """Changes a stock model, in place, to compute the released function: partial RoPE and the released decay."""
    config = model.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    rotary = round(config.rope_parameters["partial_rotary_factor"] * config.head_dim)
    model.model.rotary_emb.inv_freq = torch.tensor(
        [config.rope_parameters["rope_theta"] ** (-2 * i / rotary) for i in range(rotary // 2)])
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        if config.layer_types[i] == "full_attention":
            attention.forward = partial_rope_forward(attention)
            continue
        rate = torch.tensor([s * (1 - i / (layers - 1) + 1e-5) for s in slopes]).reshape(-1, 1, 1)
        attention.slope_rate = rate
        attention.query_decay, attention.key_decay, attention.diagonal_decay = attention.decay_factors(rate)
    return model


def partial_rope_forward(attention):
    """Returns a forward of `attention` that rotates only the first dimensions of each head, eagerly."""
    def forward(hidden_states, position_embeddings, attention_mask, past_key_values=None, **_):
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)

        def heads(projection):
            return projection(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        def rotate(x):
            width = cos.shape[-1]
            low, high = x[..., :width // 2], x[..., width // 2:width]
            half_cos, half_sin = cos[..., :width // 2], sin[..., :width // 2]
            return torch.cat([low * half_cos - high * half_sin, high * half_cos + low * half_sin, x[..., width:]], -1)

        q, k, v = rotate(heads(attention.q_proj)), rotate(heads(attention.k_proj)), heads(attention.v_proj)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, attention.layer_idx)
        o, weights = modeling_minimax.eager_attention_forward(attention, q, k, v, attention_mask, attention.scaling)
        return attention.o_proj(o.flatten(-2)), weights

    return forward


@torch.no_grad()
def logits(model, tokens_BT):
    return model(torch.as_tensor(tokens_BT), use_cache=False).logits.numpy()
