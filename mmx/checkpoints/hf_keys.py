"""Keys of a released config.json that mmx does not use: which are harmless, which are refused (docs/model.md section 6)."""
from mmx.config import ConfigError

# They do not change the logits of a text: identifiers, training-time settings, settings of generation, of outputs and of speed.
HARMLESS = frozenset("""
    architectures auto_map model_type torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id tokenizer_class
    use_cache output_attentions output_hidden_states output_router_logits output_scores return_dict return_dict_in_generate
    attention_dropout initializer_range initializer_factor router_jitter_noise router_aux_loss_coef router_z_loss_coef
    max_position_embeddings max_model_len model_max_length block_size shared_moe_mode pretraining_tp gradient_checkpointing
    attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset
    _experts_implementation experts_implementation _experts_implementation_internal
    chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    problem_type id2label label2id num_labels finetuning_task task_specific_params prefix torchscript tf_legacy_loss
    use_bfloat16 pruned_heads keys_to_ignore_at_inference language
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind
    image_seq_length ignore_index projection_dim vocab_size
""".split())
# keys of other models, with the values for which they compute what mmx computes
NEUTRAL = {
    "attention_bias": False, "qkv_bias": False, "use_bias": False, "mlp_bias": False, "use_qk_norm": False, "qk_norm": False,
    "norm_topk_prob": True, "use_sliding_window": False, "n_shared_experts": 0, "num_shared_experts": 0,
    "rope_interleave": False, "rope_interleaved": False,
}
# An unknown key whose name contains one of these may change the function. "scal" is part of scale and scaling.
CHANGING = ("rope", "rotary", "scal", "norm", "window", "attention", "attn", "bias", "router", "expert", "quant")


def check_keys(table: dict, used, prefix: str = "") -> list[str]:
    """The keys of a table that are neither used nor known to be harmless. A key with null has no effect.

    Raises ConfigError for one that may change the function of the model.

    Args:
      used: the keys that the reader uses.
      prefix: of the keys in messages, for a table inside config.json, such as "vision_config.".
    """
    unknown = []
    for key, value in table.items():
        if key in used or key in HARMLESS or value is None or (key in NEUTRAL and value == NEUTRAL[key]):
            continue
        if prefix.startswith("rope") or any(part in key.lower() for part in CHANGING):
            raise ConfigError(f"{prefix}{key:.100}={value!r:.100} is not supported: mmx does not know this key, and it may "
                              "change what the model computes; remove it if it does not")
        unknown.append(f"{prefix}{key}")
    return unknown
