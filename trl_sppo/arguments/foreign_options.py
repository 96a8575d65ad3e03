"""Options of older TRL and transformers, and of other frameworks, with what to write here instead."""

from difflib import get_close_matches
from typing import Any


_FLAT = "A recipe here is one flat list of options: write those of this section at the top level, by their names here."
_NO_CUT = "Prompts are never cut: leave out long ones (docs/memory.md has a filter)."
_ENGINE = "Remove it: TRL sets up vLLM itself. With vllm_mode: server, it is an option of `vllm serve`."

# What to write here instead of options that TRL and transformers had, that recipes of alignment-handbook, open-r1 and
# the official SPPO code have, or those of other frameworks. By what to write: names that are no options here.
_BY_ADVICE = {
    # transformers, and TRL's ModelConfig and ScriptArguments
    "Write dtype.": "torch_dtype bnb_4bit_compute_dtype",
    "Write attn_implementation: flash_attention_2.": "use_flash_attention_2 flash_attention flash_attn",
    "Write use_bnb_nested_quant.": "bnb_4bit_use_double_quant",
    "Write eval_strategy.": "evaluation_strategy",
    "Write use_cpu.": "no_cuda",
    "Write warmup_steps: below 1 it is a share of all steps.": "warmup_ratio",
    "Write per_device_train_batch_size.": (
        "per_gpu_train_batch_size local_rollout_forward_batch_size mini_batch_size micro_batch_size batch_size"
    ),
    "Write per_device_eval_batch_size.": "per_gpu_eval_batch_size",
    "Write optim.": "adafactor optimizer",
    "Write lr_scheduler_type.": "lr_scheduler",
    "Write learning_rate.": "lr",
    "Write num_train_epochs.": "num_epochs epochs max_epochs",
    "Write num_train_epochs, or max_steps.": "total_episodes num_total_batches",
    "Remove it: evaluations measure win rates, and call no `compute_metrics`.": "include_inputs_for_metrics",
    "Write torch_compile_backend.": "torchdynamo",
    "Write accelerator_config, a mapping that has it.": "dispatch_batches split_batches",
    "Write gradient_checkpointing_kwargs: {use_reentrant: false}, or true.": "gradient_checkpointing_use_reentrant",
    "Write hub_model_id.": "push_to_hub_organization",
    "Write hub_revision.": "hub_model_revision",
    "Remove it, and log in with `hf auth login`.": "push_to_hub_token use_auth_token",
    "Remove it: a run writes into output_dir. resume_from_checkpoint: true continues one.": (
        "overwrite_output_dir overwrite_hub_revision"
    ),
    "Remove it: weights are always saved as safetensors.": "save_safetensors",
    "Write env: {TENSORBOARD_LOGGING_DIR: ...}.": "logging_dir",
    "Write report_to.": "log_with",
    "Write env: {WANDB_PROJECT: ...}, which transformers reads.": "wandb_project",
    "Write env: {WANDB_ENTITY: ...}, which wandb reads.": "wandb_entity",
    "Write env: {WANDB_RUN_GROUP: ...}, which wandb reads.": "wandb_run_group",
    "Remove it: a batch is made of whole groups.": "group_by_length",
    "Remove it: bf16 and fp16 say what is computed in.": "fp16_backend half_precision_backend fp16_opt_level",
    "Remove it: transformers no longer has it.": (
        "use_mps_device use_ipex jit_mode_eval tpu_num_cores tpu_metrics_debug past_index mp_parameters ray_scope "
        "use_legacy_prediction_loop include_tokens_per_second"
    ),
    # datasets
    "The column must be named prompt: rename it in the dataset, with `dataset.rename_column`.": (
        "dataset_prompt_column prompt_column prompt_key dataset_text_field text_column"
    ),
    "Write dataset_name, or a mixture as datasets: [{path: ...}].": (
        "dataset_mixer dataset_mixture dataset prompt_data"
    ),
    "Write dataset_train_split and dataset_test_split.": "dataset_splits dataset_split val_set_size val_size",
    "Write dataset_config.": "dataset_configs",
    "Remove it: prompts are tokenized when they are sampled from, not before.": (
        "preprocessing_num_workers dataset_num_proc dataset_batch_size dataset_kwargs dataset_prepared_path "
        "overwrite_cache"
    ),
    # GRPO, online DPO, RLOO and PPO
    f"Remove it. {_NO_CUT} vllm_max_model_length bounds prompt and completion together.": (
        "max_prompt_length prompt_max_len"
    ),
    f"Write max_completion_length. {_NO_CUT}": (
        "max_length max_target_length max_seq_length max_seq_len cutoff_len sequence_len maxlen"
    ),
    "Write max_completion_length.": "max_new_tokens response_length generate_max_len",
    "Write num_generations.": "rloo_k n_samples_per_prompt num_return_sequences num_completions pairs",
    "Write num_iterations.": "num_ppo_epochs ppo_epochs",
    "Write steps_per_generation.": "num_mini_batches",
    "Write log_completions: true.": "num_sample_generations",
    "Write missing_eos_penalty.": "non_eos_penalty penalty_reward_value",
    "Write reward_model_name_or_path.": "reward_model_path reward_models reward_pretrain",
    "Write preference_funcs, with the import path of a judge (docs/judges.md).": "judge ranking_model",
    "Write beta, in nats of a whole completion.": "kl_coef init_kl_coef",
    "Write eta, which is 1 / beta.": "pref_beta",
    "Write loss_type.": "pref_loss",
    "Write vllm_max_model_length.": "vllm_max_model_len",
    "Write vllm_gpu_memory_utilization.": "gpu_memory_utilization",
    "Write vllm_structured_outputs_regex.": "vllm_guided_decoding_regex",
    "Remove it: vllm_mode: colocate shares the training's GPUs, a server has its own (docs/vllm.md).": "vllm_device",
    _ENGINE: "vllm_dtype vllm_enable_prefix_caching enable_prefix_caching enforce_eager kv_cache_dtype",
    "Remove it: SPPO's loss has no Liger kernel.": "use_liger_loss use_liger enable_liger_kernel",
    "Remove it: the opponent is the policy of the last iteration.": "mixture_coef alpha",
    "Remove it: a completion ends with an EOS token of the model's generation_config.json.": (
        "stop_token stop_token_id"
    ),
    "Remove it: SPPO has no value function and clips no ratio.": (
        "cliprange cliprange_value vf_coef gamma lam target_kl adap_kl_ctrl horizon token_level_kl kl_estimator"
    ),
    "Remove it: what counts is which completion has the higher score.": (
        "whiten_rewards normalize_reward normalize_advantage normalize_advantages reward_clip_range score_clip "
        "use_score_norm use_score_scaling"
    ),
    # DPO and its kin
    "Remove it: log-ratios are those to the policy that sampled the completions.": (
        "reference_free precompute_ref_log_probs precompute_ref_batch_size force_use_ref_model ref_model_init_kwargs "
        "model_adapter_name ref_adapter_name"
    ),
    "Remove it: it is for training on given pairs, and completions are sampled here.": (
        "label_pad_token_id padding_value padding_free packing eval_packing truncation_mode is_encoder_decoder "
        "use_logits_to_keep use_num_logits_to_keep base_model_attribute_name"
    ),
    "Remove it: it varies DPO's loss. SPPO's own options are in docs/options.md.": (
        "label_smoothing rpo_alpha ld_alpha cpo_alpha simpo_gamma discopop_tau f_divergence_type "
        "f_alpha_divergence_coef use_weighting loss_weights desirable_weight undesirable_weight"
    ),
    "Remove it: an evaluation always samples.": "generate_during_eval",
    # alignment-handbook, open-r1, and the scripts of the official SPPO code
    "Write model_name_or_path.": "model base_model sft_model_path pretrain",
    "Remove it: the tokenizer is that of model_name_or_path.": "tokenizer_name_or_path tokenizer_name",
    "Set `tokenizer.chat_template`, and save the tokenizer beside the model.": "chat_template template",
    "Begin each prompt of the dataset with a system message.": "system_prompt auto_insert_empty_system_msg",
    "Remove it: it was an argument of reward functions. Write a reward function that has its value.": (
        "cosine_min_value_wrong cosine_max_value_wrong cosine_min_value_correct cosine_max_value_correct "
        "cosine_max_len repetition_n_grams repetition_max_penalty code_language code_provider soft_punish_cache"
    ),
    "Write push_to_hub and hub_revision.": "push_to_hub_revision",
    "Write num_processes.": "numgpu num_gpus n_gpus_per_node",
    "Write dataset_train_split, one split for each part of the prompts.": "frac_len data_frac",
    # LLaMA-Factory and axolotl
    "Write use_peft: true.": "finetuning_type adapter use_lora",
    "Write lora_r.": "lora_rank",
    "Write lora_target_modules.": "lora_target",
    "Write load_in_4bit or load_in_8bit.": "quantization_bit",
    "Write use_vllm: true.": "infer_backend",
    # accelerate's own file, given as a recipe
    "That is of a configuration of accelerate: name its file with accelerate_config.": (
        "compute_environment distributed_type deepspeed_config"
    ),
    # Sections of verl
    _FLAT: "actor_rollout_ref algorithm actor critic trainer custom_reward_function ray_init defaults",
}
INSTEAD = {name: advice for advice, names in _BY_ADVICE.items() for name in names.split()}
# Names of sections elsewhere, if a mapping is given, and of plain options, if not
_ALSO_SECTIONS = {"model", "optimizer", "adapter", "dataset", "judge"}


def advice(name: str, value: Any, options: set[str], mappings: set[str]) -> str:
    """What to write instead of an unknown option with this value. `mappings` are the options that take one."""
    is_section = isinstance(value, dict) and (name not in INSTEAD or name in _ALSO_SECTIONS)
    if is_section:
        options = mappings  # a misspelt one of these is no section
    elif name in INSTEAD:
        return INSTEAD[name]
    nearest = get_close_matches(name, sorted(options), n=1, cutoff=0.8 if is_section else 0.6)
    if nearest and "." not in name:
        return f"Did you mean {nearest[0]}?"
    return _FLAT if is_section or "." in name else "`trl-sppo train --help` lists all options."
