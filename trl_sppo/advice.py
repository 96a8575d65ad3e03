"""`trl-sppo check`: what a recipe would do, what it would need, and what looks wrong, without weights and a GPU."""

import math
from argparse import ArgumentParser

import torch

from .adapters import base_of, config_of, is_adapter, kind_of
from .config import SPPOConfig
from .memory import BYTES, dtype_of, peak
from .objectives import select_completions
from .plan import Plan, read
from .preferences import win_rates_from_scores
from .train import fail


ROOM = 0.9  # of a GPU's memory that may be planned: the rest is for the CUDA context, buffers, holes between blocks
SLOW_LORA, FAST_FULL = 1e-6, 5e-6  # learning rates: twice and ten times the paper's, which is for whole policies


def main(argv: list[str]) -> int:
    """Run `trl-sppo check` and return its exit status: 1 if something looks wrong."""
    parser = ArgumentParser(
        prog="trl-sppo check",
        usage="%(prog)s RECIPE [--gpu_memory GB] [--prompt_length TOKENS] [options of `trl-sppo train`]",
        description="Says what a recipe would do and need, and what looks wrong, without weights and without a GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="A YAML file of options.")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="Memory of each GPU, in GB of 10^9 bytes.")
    parser.add_argument(
        "--prompt_length", type=int, default=1024, help="Longest prompt, in tokens, where vLLM does not bound it."
    )
    argv = argv[1:] if argv[:1] == ["--config"] else argv  # as `trl-sppo train` has it
    try:
        if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
            raise ValueError("give the recipe first: trl-sppo check RECIPE.")
        options, rest = parser.parse_known_args(argv)
        if not options.gpu_memory > 0:
            raise ValueError(f"gpu_memory must be positive, got {options.gpu_memory}: it is in GB.")
        if options.prompt_length < 1:
            raise ValueError(f"prompt_length must be at least 1, got {options.prompt_length}: it is in tokens.")
        plan = read(options.recipe, rest, options.gpu_memory * 1e9, options.prompt_length)
        wrong, notes = judge(plan)
    except (ValueError, TypeError, ImportError, OSError) as error:
        fail(error)
    print("\n".join(describe(plan)))
    for heading, lines in (("Looks wrong", wrong), ("Worth knowing", notes), ("Not known here", plan.unknown)):
        if lines:
            print(f"\n{heading}")
            print("\n".join(f"  - {line}" for line in lines))
    if not wrong:
        print(f"\nNothing looks wrong{' in what could be looked at' * plan.hub_is_away}.")
    return 1 if wrong else 0


def kept_per_group(plan: Plan) -> int | None:
    """How many completions of a group are trained on if no two have the same score. None: that depends on them."""
    args, script = plan.args, plan.script
    assert args.num_generations is not None
    if args.train_on == "all" and args.win_rate_threshold is None:
        return args.num_generations
    voters = len(script.reward_model_name_or_path or []) + len(script.reward_funcs or [])
    by_rank = args.comparison == "hard" and not script.preference_funcs
    by_rank = by_rank and (voters == 1 or args.reward_aggregation == "sum")
    if args.train_on != "best_and_worst" and not by_rank:
        return None
    ranks = torch.arange(args.num_generations, dtype=torch.float32).unsqueeze(0)
    rates = win_rates_from_scores(ranks, include_self=args.include_self)
    return int(select_completions(rates, args.train_on, args.win_rate_threshold).sum())


def steps_per_iteration(args: SPPOConfig) -> int:
    assert args.steps_per_generation is not None
    return args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps


def describe(plan: Plan) -> list[str]:
    """Say in words and in a table what a training would do, and what it would need."""
    script, args, model_args, place = plan.script, plan.args, plan.model_args, plan.place
    assert args.generation_batch_size is not None and args.num_generations is not None
    batch, group, steps = args.generation_batch_size, args.num_generations, steps_per_iteration(args)
    prompts = batch // group
    lines = ["What it will do"]

    policy = str(model_args.model_name_or_path)
    what = base_of(policy)
    if plan.policy is not None:
        what += f" ({plan.policy.parameters:,} parameters)"
    if model_args.use_peft:
        bits = "in 4 bit, the rest " if model_args.load_in_4bit else ""
        bits = "in 8 bit, the rest " if model_args.load_in_8bit else bits
        trained = f", {plan.policy.adapter:,} parameters" if plan.policy is not None else ""
        train, kind = "Train an adapter", "LoRA"
        if is_adapter(policy):
            train, kind = f"Continue the adapter {policy}", kind_of(config_of(policy)).replace("LORA", "LoRA")
        rank = f", r = {model_args.lora_r}" if kind == "LoRA" else ""
        how = f"{train} ({kind}{rank}{trained}) on {what}, frozen {bits}in {_dtype(plan)}"
    else:
        how = f"Train all of {what} in {_dtype(plan)}"
    where = f"{place.processes} process{'es' * (place.processes > 1)}"
    lines.append(f"{how}, in {where}{f' ({place.sharding})' if place.sharding else ''}.")

    if args.rollouts is not None:
        lines.append(f"Train on the rollouts in {args.rollouts}: nothing is sampled.")
    else:
        sampler = f"vLLM ({args.vllm_mode})" if args.use_vllm else "transformers"
        lines.append(
            f"An iteration: {prompts:,} prompts x {group} completions = {batch:,}, sampled by {sampler}, of at most "
            f"{args.max_completion_length:,} tokens, at temperature {args.temperature:g}."
        )
    sources = [*(script.reward_model_name_or_path or []), *(script.reward_funcs or [])]
    oracles = script.preference_funcs or []
    weights = [*(args.reward_weights or [1.0] * len(sources)), *(args.preference_weights or [1.0] * len(oracles))]
    voters = [*sources, *oracles]
    if len(set(weights)) > 1:
        voters = [f"{name} (weight {weight:g})" for name, weight in zip(voters, weights, strict=True)]
    if voters:
        lines.append(f"Win rates in each group of {group} come from {', '.join(voters)}.")
    kept = kept_per_group(plan)
    per_step = batch * args.num_iterations // steps
    trained = "as many as the threshold leaves" if kept is None else f"{per_step * kept // group:,}"
    if kept != group:
        trained += " of them trained on" + (" if no two tie" if kept is not None else "")
    else:
        trained = "all of them trained on"
    lines.append(
        f"Then {steps} optimizer step{'s' * (steps > 1)} on them, of {per_step:,} completions each, {trained}. The "
        "next iteration plays against the policy that this one has made."
    )
    lines += _length(plan, prompts, steps)
    table = ["", *_table(plan)] if plan.rows is not None else []
    return [*lines[:1], *(f"  {line}" for line in lines[1:]), *table]


def _length(plan: Plan, prompts: int, steps: int) -> list[str]:
    """How long it lasts, if that is known."""
    args = plan.args
    if args.max_steps > 0:
        iterations, all_steps = -(-args.max_steps // steps), args.max_steps
    elif plan.num_prompts is not None:
        all_steps = math.ceil(plan.num_prompts // prompts * steps * args.num_train_epochs)
        iterations = -(-all_steps // steps)
    else:
        return [f"In all {args.num_train_epochs:g} epoch{'s' * (args.num_train_epochs != 1)} of the dataset."]
    sampled = iterations * (args.generation_batch_size or 0)
    return [
        f"In all {_count(iterations, 'iteration')}, {_count(all_steps, 'optimizer step')}, {sampled:,} completions."
    ]


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _dtype(plan: Plan) -> str:
    return dtype_of(plan.args, plan.model_args)


def _table(plan: Plan) -> list[str]:
    rows = plan.rows
    assert rows is not None
    value, phase = peak(rows)
    gpu = plan.place.gpu / 1e9
    width = max(map(len, rows))
    head = f"Memory on {'the GPU' if plan.place.processes == 1 else 'each GPU'}, by arithmetic (docs/memory.md), in GB"
    lines = [head, *(f"  {name:<{width}}  {size / 1e9:6.2f}" for name, size in rows.items())]
    return [*lines, f"  {f'at most, while {phase}':<{width}}  {value / 1e9:6.1f}  of {gpu:g}"]


def judge(plan: Plan) -> tuple[list[str], list[str]]:
    """What looks wrong about a training, and what is worth knowing."""
    args, model_args, script = plan.args, plan.model_args, plan.script
    wrong, notes = [], []
    if plan.rows is not None:
        value, phase = peak(plan.rows)
        if value > ROOM * plan.place.gpu:
            wrong.append(
                f"{value / 1e9:.1f} GB while {phase}, and no more than {ROOM * plan.place.gpu / 1e9:.1f} of "
                f"{plan.place.gpu / 1e9:g} should be planned. {_cure(plan, phase)}"
            )
    completion, longest = args.max_completion_length or 0, args.vllm_max_model_length
    if args.use_vllm and longest is not None and longest <= completion:
        wrong.append(
            f"vllm_max_model_length={longest} holds prompt and completion together, so max_completion_length="
            f"{completion} leaves no room for a prompt."
        )
    wrong += _too_small_for_vllm(plan)
    if not model_args.use_peft and BYTES[_dtype(plan)] == 2 and plan.place.sharding is None:
        wrong.append(
            f"dtype={_dtype(plan)!r} without an adapter: a step of {args.learning_rate:g} is lost in the rounding of "
            "16-bit weights. Set dtype: float32 (bf16: true still computes in bfloat16), or shard with FSDP2 or ZeRO, "
            "which keep float32 weights."
        )
    if model_args.use_peft and args.learning_rate < SLOW_LORA:
        notes.append(
            f"learning_rate={args.learning_rate:g} is a rate for full fine-tuning, at which an adapter hardly "
            "moves. The recipes with LoRA begin with 1e-5, the quickstart has 4e-4."
        )
    if not model_args.use_peft and args.learning_rate > FAST_FULL:
        notes.append(f"learning_rate={args.learning_rate:g} is high without an adapter: the paper has 5e-7.")
    judges = [script.eval_reward_model_name_or_path, script.eval_reward_funcs, script.eval_preference_funcs]
    if args.eval_strategy == "no":
        notes.append(
            "Nothing is evaluated: set eval_strategy and a judge that nothing is trained on (eval_reward_funcs, "
            "eval_reward_model_name_or_path), or use `trl-sppo eval` afterwards."
        )
    elif not any(judges):
        notes.append(
            "Evaluations are judged by what the policy is trained on alone, which proves little: add "
            "eval_reward_funcs or eval_reward_model_name_or_path."
        )
    prompts = (args.generation_batch_size or 0) // (args.num_generations or 1)
    if plan.num_prompts is not None and plan.num_prompts % prompts:
        notes.append(
            f"The last {plan.num_prompts % prompts} prompts of each epoch fill no iteration, and are left out."
        )
    if script.preference_funcs or script.reward_funcs:
        notes.append("What functions and judges need, in memory and time, is not counted.")
    return wrong, notes


def _too_small_for_vllm(plan: Plan) -> list[str]:
    """vLLM's share of a GPU has to hold the weights, and one text of the largest length."""
    args, policy = plan.args, plan.policy
    if not args.use_vllm or args.vllm_mode != "colocate" or policy is None or args.use_cpu:
        return []
    longest = args.vllm_max_model_length or plan.place.prompt_length + (args.max_completion_length or 0)
    needed = policy.parameters * 2 / args.vllm_tensor_parallel_size + longest * policy.cache
    share = args.vllm_gpu_memory_utilization * plan.place.gpu
    if needed <= share:
        return []
    return [
        f"vllm_gpu_memory_utilization={args.vllm_gpu_memory_utilization:g} gives vLLM {share / 1e9:.1f} GB, but "
        f"weights and the cache of one text of {longest:,} tokens take {needed / 1e9:.1f}. Raise it."
    ]


def _cure(plan: Plan, phase: str) -> str:
    """What to change if a phase needs too much."""
    cures = {
        "generating": "Lower vllm_gpu_memory_utilization."
        if plan.args.use_vllm
        else "Lower per_device_train_batch_size or steps_per_generation.",
        "reading prompts": "Set generation_kwargs: {prefill_chunk_size: 256}, or lower per_device_train_batch_size or "
        "steps_per_generation.",
        "scoring": "Lower reward_batch_size, or serve the reward model (docs/judges.md).",
        "training": "Lower per_device_train_batch_size (and raise gradient_accumulation_steps and "
        "steps_per_generation as much)"
        + ("." if plan.args.gradient_checkpointing else ", or set gradient_checkpointing: true."),
    }
    less = "" if plan.model_args.use_peft else " An adapter (use_peft: true) needs far less than full fine-tuning."
    return cures[phase] + less
