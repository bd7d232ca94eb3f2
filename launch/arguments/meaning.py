"""What each of Megatron's options means here: it takes effect, has no meaning, or is refused with the alternative.

Every option of both parsers (``options.json``) falls under one of the three, looked for in that order: taking effect,
refused, without meaning; a test holds that. Entries are names of attributes (argparse's dest), or patterns of them.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

_EFFECT = """
    num_layers encoder_num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention
    num_query_groups num_key_value_heads seq_length encoder_seq_length max_position_embeddings
    position_embedding_type add_position_embedding use_rotary_position_embeddings rotary_base rope_theta
    rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor
    normalization layernorm_epsilon apply_residual_connection_post_layernorm qk_layernorm openai_gelu squared_relu
    swiglu quick_geglu mlp_type add_bias_linear add_qkv_bias untie_embeddings_and_output_weights attention_dropout
    hidden_dropout init_method_std init_method_xavier_uniform embedding_init_method_std
    attention_softmax_in_fp32 fp16_lm_cross_entropy transformer_impl make_vocab_size_divisible_by
    vocab_size padded_vocab_size micro_batch_size global_batch_size rampup_batch_size train_iters train_samples
    train_tokens exit_interval exit_duration_in_mins exit_signal_handler exit_signal seed recompute_granularity
    recompute_method recompute_num_layers recompute_activations checkpoint_activations checkpoint_num_layers
    deepspeed_activation_checkpointing optimizer lr min_lr lr_decay_style lr_decay_iters lr_decay_samples
    lr_decay_tokens lr_warmup_fraction lr_warmup_iters lr_warmup_samples lr_warmup_tokens lr_warmup_init
    lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples weight_decay start_weight_decay end_weight_decay
    weight_decay_incr_style clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum override_opt_param_scheduler
    use_checkpoint_opt_param_scheduler fp16 bf16 loss_scale initial_loss_scale min_loss_scale loss_scale_window
    hysteresis accumulate_allreduce_grads_in_fp32 tensor_model_parallel_size pipeline_model_parallel_size
    use_distributed_optimizer zero_stage no_pipeline_parallel distributed_backend distributed_timeout_minutes
    local_rank deepspeed deepspeed_config data_path train_data_path valid_data_path test_data_path split
    data_cache_path mock_data data_args_path per_split_data_args_path data_impl dataloader_type num_workers
    reset_position_ids reset_attention_mask eod_mask_loss mmap_bin_files eval_iters eval_interval skip_train
    tokenizer_type tokenizer_model vocab_file merge_file vocab_extra_ids trust_remote_code save load save_interval
    no_save_rng no_load_optim no_load_rng finetune ckpt_step load_tag exit_on_missing_checkpoint
    pretrained_checkpoint log_interval tensorboard_dir tensorboard_log_interval tensorboard_queue_size
    log_timers_to_tensorboard log_validation_ppl_to_tensorboard log_memory_to_tensorboard
    log_world_size_to_tensorboard  log_learning_rate_to_tensorboard
    log_loss_scale_to_tensorboard log_throughput wandb_project wandb_exp_name wandb_save_dir wandb_entity
"""
EFFECT = frozenset(_EFFECT.split())

# Of these, what is so whether it is said or not: launchers and scripts give them, and nothing has to read them.
SO_ANYWAY = frozenset({"deepspeed", "local_rank"})

# Refused, but not at 1, which is as good as none.
_ONE_IS_NONE = """
    num_experts expert_tensor_parallel_size expert_model_parallel_size moe_expert_parallel_size context_parallel_size
    hierarchical_context_parallel_sizes ds_sequence_parallel_size
"""
ONE_IS_NONE = frozenset(_ONE_IS_NONE.split())

# Neither parser's any more, but in example scripts that were not kept up.
OLDER = {
    "--activations-checkpoint-method": "it was renamed: use --recompute-granularity full --recompute-method",
    "--activations-checkpoint-num-layers": "it was renamed: use --recompute-num-layers",
}

# No meaning here, or none for the result: accepted, and named once in a warning.
NO_MEANING = {
    "speed and memory of Megatron's own kernels, buffers and communication": """
        use_flash_attn use_flash_attn_* deprecated_use_mcore_models use_cpu_initialization
        sequence_parallel attention_backend bias_gelu_fusion bias_swiglu_fusion bias_dropout_fusion
        masked_softmax_fusion gradient_accumulation_fusion no_persist_layer_norm mem_efficient_ln apply_rope_fusion
        cross_entropy_loss_fusion cross_entropy_fusion_impl disable_jit_fuser async_tensor_model_parallel_allreduce
        overlap_* align_* ddp_* DDP_impl use_contiguous_buffers_in_local_ddp contigious_checkpointing
        checkpoint_in_cpu partition_activations split_transformers synchronize_each_layer profile_backward
        scatter_gather_tensors_in_pipeline use_ring_exchange_p2p empty_unused_memory_level nccl_* use_sharp sharp_*
        high_priority_stream_groups create_all_gather_group tp_comm_* delay_wgrad_compute
        defer_embedding_wgrad_compute wgrad_deferral_limit clone_scatter_output_in_embedding
        ep_overlap_early_attn_memory_release barrier_with_L1_time gradient_reduce_div_fusion manual_gc manual_gc_*
        symmetric_ar_type disable_symmetric_registration use_pin_memory mmap_warmup zero_allgather_bucket_size
        zero_reduce_bucket_size zero_contigious_gradients zero_reduce_scatter pin_cpu_* cpu_optimizer cpu_torch_adam
        ds_fused_adam use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d use_te_activation_func
        te_rng_tracker inference_rng_tracker use_persistent_ckpt_worker memory_centric_tiled_linear tile_factor
        remote_device init_model_with_meta_device distribute_saved_activations distribute_checkpointed_activations
        scattered_embeddings standalone_embedding_stage disable_bf16_reduced_precision_matmul recompute_modules
        suggested_communication_unit_size pipeline_model_parallel_comm_backend use_fused_weighted_squared_relu
        enable_gloo_process_groups use_tp_pp_dp_mapping lazy_mpu_init onnx_safe num_distributed_optimizer_instances
        force_ds_sequence_parallel min_offloaded_tensor_size cpu_offloading_num_layers offload_modules
        fine_grained_activation_offloading use_dataset_only distributed_timeout_seconds_after_init train_sync_interval
        deterministic_mode bias_*_fusion perform_initialization
        """,
    "attention: its scores are float32 within the kernel, scaled by the layer or not": "apply_query_key_layer_scaling",
    "Megatron's own schedules: there is no bubble to hide, nor a flush to shape": """
        num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank microbatch_group_size_per_vp_stage
        enable_zbh1_*
        """,
    "Megatron's checkpoint formats: checkpoints here are DeepSpeed's": """
        no_save_optim save_retain_interval ckpt_format ckpt_fully_parallel_* ckpt_assume_constant_structure async_save
        use_dist_ckpt_deprecated dist_ckpt_* auto_detect_ckpt_format use_mp_args_from_checkpoint_args
        use_tokenizer_model_from_checkpoint_args strict_fsdp_dtensor_load replication replication_*
        universal_checkpoint save_dgrads_interval save_wgrads_interval dump_param_to_param_group_map
        load_main_params_from_ckpt non_persistent_* distrib_optim_fully_reshardable_mem_efficient
        """,
    "Megatron's own logging, profiling and supervision": """
        log_params_norm log_progress test_mode log_num_zeros_in_grad log_energy log_straggler log_memory_interval
        log_device_memory_used log_max_attention_logit log_optimizer_states_to_tensorboard
        log_batch_size_to_tensorboard logging_level timing_log_* one_logger_* enable_one_logger app_tag_* profile
        profile_* record_memory_history memory_snapshot_path use_pytorch_profiler straggler_*
        disable_straggler_on_startup calc_ft_timeouts enable_ft_package ft_* inprocess_* enable_msc config_logger_dir
        error_injection_* rerun_mode result_rejected_tracker_filename run_workload_inspector_server
        check_for_nan_in_loss_and_grad check_for_large_grads check_for_spiky_loss
        check_weight_hash_across_dp_replicas_interval adlr_autoresume adlr_autoresume_interval kill_switch_file
        exit_signal_handler_for_dataloader fake_process_group wandb_* ds_inference
        """,
    "Megatron's data plumbing": """
        num_dataset_builder_threads mid_level_dataset_surplus dataloader_defer_npy_index_mmap
        dataloader_fast_cache_load object_storage_cache_path create_attention_mask_in_dataloader
        allow_ambiguous_pad_tokens per_dataset_sequences_path repeated_dataloader tokenizer_hf_use_fast
        legacy_tokenizer tokenizer_sentencepiece_legacy tokenizer_metadata
        """,
    "inference": "inference* flash_decode decode_only_cuda_graphs max_tokens_to_oom use_legacy_static_engine "
    "mlp_chunks_for_prefill disable_chunked_prefill nccl_all_reduce_for_prefill output_bert_embeddings "
    "cuda_graph* enable_cuda_graph external_cuda_graph batch_invariant_mode",
    "models other than GPT": """
        bert_* biencoder_* block_data_path classes_fraction data_per_class_fraction decoder_seq_length dino_*
        embedding_path evidence_data_path ict_* head_lr_mult img_h img_w indexer_* iter_per_epoch mask_factor
        mask_prob mask_type num_channels num_classes patch_dim query_in_block_prob retriever_* sample_rate
        short_seq_prob swin_backbone_type titles_data_path use_one_sent_docs vision_* data_sharding retro_* mamba_*
        is_hybrid_model use_mamba_mem_eff_path rl_* grpo_* langrl_* perform_rl_step sft_* moe_* num_experts_switch
        expert_interval use_tutel topk create_moe_param_group enable_expert_tensor_parallelism mtp_loss_scaling_factor
        mtp_standalone muon_* dsa_* kitchen_* relative_attention_* qk_clip_* ckpt_convert_* fp8_* fp4_*
        heterogeneous_* linear_key_* linear_num_* linear_conv_* linear_value_* q_lora_rank kv_lora_rank qk_head_dim
        qk_pos_emb_head_dim v_head_dim rotary_scaling_factor mscale mscale_all_dim rope_type cache_mla_latents fim_*
        tiktoken_* tokenizer_special_tokens tokenizer_hf_include_special_tokens aml_data_download_path
        deepscale_config *_teacher kd_* mos embedding_weights_in_fp32 refit_method
        """,
}

# They would change the result. Mere settings of a feature refused here are without meaning above.
REFUSED = {
    "num_experts expert_model_parallel_size expert_tensor_parallel_size moe_expert_parallel_size moe_use_upcycling "
    "moe_extended_tp": "mixture of experts is not supported; leave it out for a dense model",
    "context_parallel_size hierarchical_context_parallel_sizes hybrid_context_parallel cp_comm_type "
    "ds_sequence_parallel_size ds_sequence_parallel_fpdt ds_sequence_parallel_fpdt_* max_seqlen_per_dp_cp_rank": (
        "sequences are not split over ranks; use size 1, and tensor parallelism for long sequences"
    ),
    "fp8 fp8_e4m3 fp8_hybrid fp4 fp8_param_gather fp4_param first_last_layers_bf16 "
    "num_layers_at_*_in_bf16 te_precision_config_file keep_fp8_transpose_cache reuse_grad_buf_for_mxfp8_param_ag": (
        "fp8 and fp4 are not supported; use --bf16"
    ),
    "use_torch_fsdp2 use_megatron_fsdp fsdp_* torch_fsdp2_* data_parallel_sharding_strategy "
    "outer_dp_sharding_strategy enable_full_sharding_in_hsdp": (
        "fully sharded weights cannot be stashed by version; use --use-distributed-optimizer (ZeRO-1)"
    ),
    "use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype "
    "grad_reduce_in_bf16": (
        "set these in ds_config.json: data_types.grad_accum_dtype, communication_data_type, and the optimizer's "
        '"moments": "bf16"'
    ),
    "optimizer_cpu_offload optimizer_offload_fraction": "the next version is written on the device; leave it out",
    "decoder_num_layers pipeline_model_parallel_split_rank": "encoder-decoder models are not supported; train a GPT",
    "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers pipeline_model_parallel_layout "
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split": (
        "stages get the same number of layers, embedding first and head last; leave it out"
    ),
    "multi_latent_attention experimental_attention_variant linear_attention_freq window_size window_attn_skip_freq "
    "softmax_type attention_output_gate qk_l2_norm qk_clip use_kitchen_attention no_rope_freq": (
        "attention here is multi-head or grouped-query, causal over the whole sequence; leave it out"
    ),
    "layernorm_zero_centered_gamma glu_linear_offset activation_func_clamp_value": (
        "needs kernels of Transformer Engine that megatron-core's local layers lack; leave it out"
    ),
    "spec heterogeneous_layers_config_* hybrid_* mtp_num_layers": (
        "layers are megatron-core's GPT layers, all alike; leave it out"
    ),
    "fp32_residual_connection": "activations travel between stages in the model's dtype; leave it out",
    "decoupled_lr decoupled_min_lr no_weight_decay_cond_type apply_wd_to_qk_layernorm": (
        "all parameters share one learning rate, and biases and one-dimensional weights are not decayed; leave it out"
    ),
    "calculate_per_token_loss": ("the loss is the mean over micro-batches of their mean over tokens; leave it out"),
    "data_parallel_random_init": "replicas start from one set of weights; leave it out",
    "iterations_to_skip phase_transition_iterations": "every batch is trained on; leave it out",
    "multiple_validation_sets": "one validation set is evaluated; give one --valid-data-path or --split",
    "fim_data sft": "data is plain text here; preprocess it accordingly and leave the option out",
    "train_doc_idx_path train_sample_idx_path train_shuffle_idx_path train_desc_path train_idx_path "
    "train_data_exact_num_epochs return_data_index random_ltd data_efficiency_curriculum_learning deepscale": (
        "Megatron-DeepSpeed's data efficiency library is not supported; leave it out"
    ),
    "kd load_teacher": "distillation is not supported; leave it out",
    "decrease_batch_size_if_needed": "make the global batch size a multiple of micro-batch size x data-parallel size",
    "full_validation": "validation runs --eval-iters batches; set that",
    "use_checkpoint_args": "give the model's arguments; they are compared with the checkpoint's",
    "yaml_cfg": "give the same settings as options",
    "use_legacy_models": "models are built from megatron-core; leave it out",
    "batch_size": "it was renamed: use --micro-batch-size",
    "model_parallel_size": "it was renamed: use --tensor-model-parallel-size",
    "warmup": "it was renamed: use --lr-warmup-fraction",
    "reset_iteration no_load_lr_state": "to start anew from a checkpoint's weights use --finetune",
    "enable_experimental": "nothing here is behind it; leave it out",
    "mrope_section": "positions are those of text: use --position-embedding-type rope",
    "inference": "generate text with noflush.launch.generate",
    "keep_*": "leave it out",
}


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def alternative(dest: str) -> str | None:
    """Why an option is refused and what to do instead; None if it is not."""
    if dest in EFFECT:
        return None
    return next((text for patterns, text in REFUSED.items() if _matches(dest, patterns)), None)


def no_meaning(dest: str) -> str | None:
    """What kind of thing an option without meaning here is about; None if it has meaning."""
    if dest in EFFECT or alternative(dest):
        return None
    return next((kind for kind, patterns in NO_MEANING.items() if _matches(dest, patterns)), None)
