"""Config fields that published checkpoints carry and transformers ignores: older names, other tools' notes.

Named one by one, because any other undeclared field is refused. transformers reads none of them, so neither does the
model that vlmcut compares with.
"""

LEFTOVERS = frozenset(
    (
        # of every config
        "architectures auto_map bos_token_id dtype eos_token_id id2label label2id model_type name_or_path "
        "_name_or_path pad_token_id torch_dtype transformers_version _attn_implementation_autoset "
        "transformers.js_config "
        "unsloth_fixed vision_start_token_id vision_end_token_id "
        # LLaVA and what followed it
        "ignore_index vocab_size projection_dim hidden_size use_image_newline_parameter mm_vision_tower mm_hidden_size "
        # Qwen
        "in_chans spatial_patch_size vision_token_id "
        # Idefics 3, SmolVLM
        "max_image_size size use_base_siglip is_llama_config neftune_noise_alpha perceiver_config qk_layer_norms "
        "rope_interleaved use_resampler pixel_shuffle_factor "
        # PaliGemma
        "num_image_tokens "
        # LFM2-VL
        "block_dim block_ff_dim block_multiple_of block_mlp_init_scale block_out_init_scale block_use_swiglu "
        "block_use_xavier_init block_norm_eps block_auto_adjust_ff_dim block_ffn_dim_multiplier conv_dim conv_dim_out "
        "conv_use_xavier_init num_heads theta use_pos_enc do_image_splitting encoder_patch_size max_image_tokens "
        "min_image_tokens max_num_patches max_pixels_tolerance max_tiles min_tiles tile_size use_thumbnail "
        "use_image_special_tokens"
    ).split()
)
