"""Advice on a recipe: a description, and a list of what looks wrong."""

import math

import torch

from ..arguments.options import path_and_arguments
from ..models.adapters import base_of, config_of, is_adapter, kind_of
from ..objectives import select_completions
from ..preferences import win_rates_from_scores
from .memory import BYTES, dtype_of, longest_text, peak
from .plan import Plan


ROOM = 0.9  # share of a GPU's memory to plan with. The rest is for the CUDA context, buffers and fragmentation
SLOW_LORA, FAST_FULL = 1e-6, 5e-6  # learning rates: 2 and 10 times the paper's, which is for full fine-tuning

# Fixes if a phase needs too much memory
CURES = {
    "generating": "Lower vllm_gpu_memory_utilization, or without vLLM per_device_train_batch_size or "
    "steps_per_generation.",
    "reading prompts": "Lower per_device_train_batch_size or steps_per_generation, or shorten the longest prompts.",
    "scoring": "Lower reward_batch_size, or serve the reward model (docs/judges.md).",
    "training": "Lower per_device_train_batch_size (and raise gradient_accumulation_steps and steps_per_generation as "
    "much), set gradient_checkpointing: true, or train an adapter (use_peft: true).",
}


def kept_per_group(plan: Plan) -> int | None:
    """Completions of a group that are trained on if no two have the same score. `None` if that depends on them."""
    args, script = plan.args, plan.script
    assert args.num_generations is not None
    if args.train_on == "all" and args.win_rate_threshold is None:
        return args.num_generations
    voters = len(script.reward_model_name_or_path or []) + len(script.reward_funcs or [])
    summed = voters == 1 or args.reward_aggregation == "sum"
    by_rank = args.comparison == "hard" and not script.preference_funcs and summed
    if args.train_on != "best_and_worst" and not by_rank:
        return None
    ranks = torch.arange(args.num_generations, dtype=torch.float32).unsqueeze(0)
    rates = win_rates_from_scores(ranks, include_self=args.include_self)
    return int(select_completions(rates, args.train_on, args.win_rate_threshold).sum())


def describe(plan: Plan) -> list[str]:
    """Describe a training, one or two sentences per line."""
    script, args, model_args, place = plan.script, plan.args, plan.model_args, plan.place
    assert args.generation_batch_size is not None and args.num_generations is not None
    assert args.steps_per_generation is not None
    batch, group = args.generation_batch_size, args.num_generations
    steps = args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
    prompts = batch // group

    policy, size, dtype = str(model_args.model_name_or_path), plan.policy, dtype_of(args, model_args)
    what = base_of(policy) + (f" ({size.parameters:,} parameters)" if size is not None else "")
    how = f"Train all of {what} in {dtype}"
    if model_args.use_peft:
        bits = "".join(f"in {n} bit, the rest " for n in (4, 8) if getattr(model_args, f"load_in_{n}bit"))
        kind = f"LoRA, r = {model_args.lora_r}"
        if is_adapter(policy):
            kind = f"{kind_of(config_of(policy))}, continued from {policy}"
        trained = f", {size.adapter:,} parameters" if size is not None else ""
        how = f"Train an adapter ({kind}{trained}) on {what}, frozen {bits}in {dtype}"
    where = f"{place.processes} process{'es' * (place.processes > 1)}"
    lines = [f"{how}, in {where}{f' ({place.sharding})' if place.sharding else ''}."]

    if args.rollouts is not None:
        lines.append(f"Train on the rollouts in {args.rollouts}. Nothing is sampled.")
    else:
        sampler = f"vLLM ({args.vllm_mode})" if args.use_vllm else "transformers"
        lines.append(
            f"An iteration: {prompts:,} prompts x {group} completions = {batch:,}, sampled by {sampler}, of at most "
            f"{args.max_completion_length:,} tokens, at temperature {args.temperature:g}."
        )
    sources = [*(script.reward_model_name_or_path or []), *(script.reward_funcs or [])]
    oracles = [path_and_arguments(each, "preference_funcs")[0] for each in script.preference_funcs or []]
    weights = [*(args.reward_weights or [1.0] * len(sources)), *(args.preference_weights or [1.0] * len(oracles))]
    if weights:
        voters = (f"{name} (weight {weight:g})" for name, weight in zip([*sources, *oracles], weights, strict=True))
        lines.append(f"Win rates in each group of {group} come from {', '.join(voters)}.")
    kept = kept_per_group(plan)
    per_step = batch * args.num_iterations // steps
    trained = "all of them trained on"
    if kept is None:
        trained = "trained on if the threshold keeps them"
    elif kept != group:
        trained = f"{per_step * kept // group:,} of them trained on if no two tie"
    lines.append(
        f"Then {_count(steps, 'optimizer step')} on them, of {per_step:,} completions each, {trained}. The next "
        "iteration plays against the resulting policy."
    )
    all_steps = args.max_steps
    if all_steps <= 0 and plan.num_prompts is None:
        return [*lines, f"Epochs of the dataset: {args.num_train_epochs:g}."]
    if all_steps <= 0:
        all_steps = math.ceil((plan.num_prompts or 0) // prompts * steps * args.num_train_epochs)
    iterations = -(-all_steps // steps)
    return [
        *lines,
        f"In all {_count(iterations, 'iteration')}, {_count(all_steps, 'optimizer step')}, {iterations * batch:,} "
        "completions.",
    ]


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def advise(plan: Plan) -> tuple[list[str], list[str]]:
    """Problems of a training, and notes on it."""
    args, model_args, script, gpu = plan.args, plan.model_args, plan.script, plan.place.gpu
    wrong = []
    if plan.rows is not None:
        value, phase = peak(plan.rows)
        if value > ROOM * gpu:
            wrong.append(
                f"{phase} needs {value / 1e9:.1f} GB. Plan with at most {ROOM * gpu / 1e9:.1f} of {gpu / 1e9:g} GB. "
                f"{CURES[phase]}"
            )
    completion, longest = args.max_completion_length or 0, args.vllm_max_model_length
    if args.use_vllm and longest is not None and longest <= completion:
        wrong.append(
            f"vllm_max_model_length={longest} bounds prompt and completion together, so max_completion_length="
            f"{completion} leaves no room for a prompt."
        )
    if args.use_vllm and args.vllm_mode == "colocate" and plan.policy is not None and not args.use_cpu:
        text = longest_text(args, plan.place)
        needed = plan.policy.parameters * 2 / args.vllm_tensor_parallel_size + text * plan.policy.cache
        share = args.vllm_gpu_memory_utilization * gpu
        if needed > share:
            wrong.append(
                f"vllm_gpu_memory_utilization={args.vllm_gpu_memory_utilization:g} gives vLLM {share / 1e9:.1f} GB, "
                f"but the weights and the cache of one text of {text:,} tokens take {needed / 1e9:.1f}. Raise it."
            )
    dtype = dtype_of(args, model_args)
    if not model_args.use_peft and BYTES[dtype] == 2 and plan.place.sharding is None:
        wrong.append(
            f"dtype={dtype!r} without an adapter: steps of learning_rate={args.learning_rate:g} are lost in the "
            "rounding of 16-bit weights. Set dtype: float32 (bf16: true still computes in bfloat16), or shard with "
            "FSDP2 or ZeRO, which keep float32 weights."
        )
    notes = (
        (
            args.learning_rate < SLOW_LORA if model_args.use_peft else args.learning_rate > FAST_FULL,
            f"learning_rate={args.learning_rate:g} is unusual {'for' if model_args.use_peft else 'without'} an "
            "adapter. The paper has 5e-7 for full fine-tuning, recipes with LoRA begin with 1e-5.",
        ),
        (
            not (script.eval_reward_model_name_or_path or script.eval_reward_funcs or script.eval_preference_funcs),
            "No evaluation has a judge that is not trained on. Set eval_strategy and eval_reward_funcs or "
            "eval_reward_model_name_or_path, or use `trl-sppo eval` afterwards.",
        ),
        (
            script.preference_funcs or script.reward_funcs,
            "Functions and judges are not imported here. A misspelt name in a module is found when training starts, "
            "and their memory and time are not counted.",
        ),
    )
    return wrong, [words for applies, words in notes if applies]
