"""`trl-sppo check`: what a recipe would do, what it would need, and what looks wrong, without weights and a GPU."""

import importlib.util
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from trl import ModelConfig, get_peft_config

from .checks import check_adapter, check_datasets, check_sources
from .config import SPPOConfig
from .memory import BYTES, ModelSize, Placement, budget, dtype_of, peak, size_of
from .objectives import select_completions
from .preferences import win_rates_from_scores
from .rewards import check_config, check_tokenizer
from .train import SPPOScriptArguments, fail, launch_arguments, load_data, make_parser, split_config
from .trust import is_url


ROOM = (
    0.9  # of a GPU's memory that may be planned: the rest is for the CUDA context, buffers, and holes between blocks
)
SLOW_LORA, FAST_FULL = 1e-6, 5e-6  # learning rates beyond which adapters hardly move, and whole policies fall apart


@dataclass
class Plan:
    """A training as a recipe describes it, and what was found out about it."""

    script: SPPOScriptArguments
    args: SPPOConfig
    model_args: ModelConfig
    dataset_args: Any
    place: Placement
    unknown: list[str] = field(default_factory=list)
    policy: ModelSize | None = None
    rows: dict[str, float] | None = None  # bytes on each GPU, by what takes them
    num_prompts: int | None = None
    conversational: bool | None = None
    hub_is_away: bool = False


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
    options, rest = parser.parse_known_args(argv)
    try:
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
        print("\nNothing looks wrong.")
    return 1 if wrong else 0


def read(recipe: str, argv: list[str], gpu: float = 80e9, prompt_length: int = 1024) -> Plan:
    """
    Read a recipe, and what of its models and data can be had: configurations, tokenizers, a dataset in a folder.

    Args:
        recipe (`str`):
            A YAML file.
        argv (`list[str]`):
            Options that override it.
        gpu (`float`, *optional*, defaults to 80e9):
            Bytes of memory of each GPU.
        prompt_length (`int`, *optional*, defaults to `1024`):
            Longest prompt in tokens, where vLLM does not bound it.

    Returns:
        [`Plan`]

    Raises:
        `ValueError`: if the training would be refused.
    """
    argv = ["--config", recipe, *split_config(argv)]
    launch = launch_arguments(make_parser("trl-sppo check"), argv)
    processes, sharding = _processes(launch)
    # A GPU's bf16 can only be asked for where there is one
    argv += [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    script, args, model_args, dataset_args = _parse(argv, processes)
    check_adapter(model_args)
    plan = Plan(script, args, model_args, dataset_args, Placement(gpu, processes, sharding, prompt_length))
    _look_at_data(plan)
    _look_at_models(plan)
    return plan


def _processes(launch: list[str]) -> tuple[int, str | None]:
    """How many processes `accelerate launch` would be asked for, and how they divide the policy."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args([*launch, "--module", "trl_sppo.train"])
    file: Any = load_config_from_file(options.config_file) if options.config_file else None
    kind = getattr(getattr(file, "distributed_type", None), "value", getattr(file, "distributed_type", None))
    sharding = None
    if kind == "FSDP":
        sharding = "fsdp2"
    elif kind == "DEEPSPEED":
        stage = (file.deepspeed_config or {}).get("zero_stage", 0)
        sharding = {2: "zero2", 3: "zero3"}.get(stage)
    return options.num_processes or getattr(file, "num_processes", None) or 1, sharding


def _parse(argv: list[str], processes: int) -> Any:
    class Options(SPPOConfig):
        """Reckons with the processes that would be started, of which this is none."""

        world_size = property(lambda self: processes)

    parser = make_parser("trl-sppo check", Options)
    return parser.parse_args_and_config(argv, return_remaining_strings=True)[:4]


def _look_at_data(plan: Plan) -> None:
    script, args = plan.script, plan.args
    if plan.dataset_args.datasets:
        plan.unknown.append("How many prompts the mixture of datasets has: it was not loaded.")
    elif script.dataset_name and not os.path.isdir(script.dataset_name):
        plan.unknown.append(f"How many prompts {script.dataset_name} has, and how long they are: it was not loaded.")
    elif args.rollouts is None:
        train, test = load_data(script, plan.dataset_args, args.eval_strategy != "no")
        plan.conversational = check_datasets(args, train, test)
        with suppress(TypeError):  # a stream has no length
            plan.num_prompts = len(train)


def _look_at_models(plan: Plan) -> None:
    """Configurations and tokenizers, of those models whose files are at hand or can be had from the hub."""
    script, args, model_args = plan.script, plan.args, plan.model_args
    policy = model_args.model_name_or_path
    if not policy:
        raise ValueError("no model: give model_name_or_path, a folder or an id on the hub.")
    functions = [*(script.reward_funcs or []), *(script.eval_reward_funcs or [])]
    for name in [*functions, *(script.preference_funcs or []), *(script.eval_preference_funcs or [])]:
        _check_importable(name)
    models = script.reward_model_name_or_path or []
    sources: Any = [*models, *(_stand_in(name) for name in script.reward_funcs or [])]
    oracles = [_stand_in(name) for name in script.preference_funcs or []]
    check_sources(
        args, sources, [None] * len(sources), oracles, has_environment=False, judged=args.rollouts is not None
    )

    config, tokenizer = _files(plan, "model", policy, args.trust_remote_code)
    if config is not None:
        plan.policy = size_of(config, get_peft_config(model_args))
    if tokenizer is not None and plan.conversational and tokenizer.chat_template is None:
        raise ValueError(
            f"the prompts are conversational, but the tokenizer of model {policy!r} has no chat template. Use an "
            "instruction-tuned model, or prompts that are text."
        )
    trusted = args.reward_trust_remote_code or []
    rewards = []
    loaded = [model for model in [*models, *(script.eval_reward_model_name_or_path or [])] if not is_url(model)]
    for model in loaded:
        config, tokenizer = _files(plan, "reward model", model, model in trusted)
        if config is not None:
            check_config(model, model in trusted)
            check_tokenizer(model, tokenizer, bool(plan.conversational))
            rewards.append(size_of(config, is_reward_model=True))
    if plan.policy is not None and len(rewards) == len(loaded):
        plan.rows = budget(args, model_args, plan.policy, rewards, plan.place)


def _files(plan: Plan, what: str, name: str, trusted: bool) -> tuple[PreTrainedConfig | None, Any]:
    """Configuration and tokenizer, or None for what cannot be had from the hub, which `plan.unknown` then says."""
    if plan.hub_is_away and not os.path.isdir(name):
        plan.unknown.append(f"Anything about {what} {name}: the hub cannot be reached.")
        return None, None
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
        return config, AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
    except OSError as error:
        if os.path.isdir(name) or "connect" not in str(error):
            raise ValueError(
                f"{what} {name!r} is neither a folder with its files nor a model that can be had from the hub: {error}"
            ) from error
        plan.hub_is_away = True
        return _files(plan, what, name, trusted)


def _check_importable(name: str) -> None:
    """Raise `ValueError` if there is no module of that name. It is not imported: a judge may load a model."""
    module = name.rpartition(".")[0] or "trl.rewards"
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:
        found = False
    if not found:
        raise ValueError(
            f"{name!r} could not be imported: there is no module {module!r}. Give a dotted path: my_rewards.brevity "
            "is `brevity` in my_rewards.py, in the folder from which you start the training."
        )


def _stand_in(name: str) -> Callable:
    """For a function that is not imported."""

    def function(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"{name} is not called here")

    function.__name__ = name
    return function


def kept_per_group(args: SPPOConfig) -> int | None:
    """How many completions of a group are trained on if no two have the same score. None: that depends on them."""
    assert args.num_generations is not None
    if args.train_on == "all" and args.win_rate_threshold is None:
        return args.num_generations
    if args.train_on != "best_and_worst" and args.comparison != "hard":
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

    what = f"{model_args.model_name_or_path}"
    if plan.policy is not None:
        what += f" ({plan.policy.parameters:,} parameters)"
    if model_args.use_peft:
        bits = "in 4 bit, the rest " if model_args.load_in_4bit else ""
        bits = "in 8 bit, the rest " if model_args.load_in_8bit else bits
        trained = f", {plan.policy.adapter:,} parameters" if plan.policy is not None else ""
        how = f"Train an adapter (LoRA, r = {model_args.lora_r}{trained}) on {what}, frozen {bits}in {_dtype(plan)}"
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
    sources = [
        *(script.reward_model_name_or_path or []),
        *(script.reward_funcs or []),
        *(script.preference_funcs or []),
    ]
    if sources:
        lines.append(f"Win rates in each group of {group} come from {', '.join(sources)}.")
    kept = kept_per_group(args)
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
        iterations = int(plan.num_prompts // prompts * args.num_train_epochs)
        all_steps = iterations * steps
    else:
        return [f"In all {args.num_train_epochs:g} epoch{'s' * (args.num_train_epochs != 1)} of the dataset."]
    sampled = iterations * (args.generation_batch_size or 0)
    return [f"In all {iterations:,} iterations, {all_steps:,} optimizer steps, {sampled:,} completions."]


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
    low_precision = BYTES.get(_dtype(plan), 2) == 2
    if not model_args.use_peft and low_precision and plan.place.sharding is None:
        wrong.append(
            f"dtype={_dtype(plan)!r} without an adapter: a step of {args.learning_rate:g} is lost in the rounding of "
            "16-bit weights. Set dtype: float32 (bf16: true still computes in bfloat16), or shard with FSDP2 or ZeRO, "
            "which keep float32 weights."
        )
    if model_args.use_peft and args.learning_rate < SLOW_LORA:
        notes.append(
            f"learning_rate={args.learning_rate:g} is a rate for full fine-tuning: an adapter hardly moves. Ten to a "
            "thousand times as much is usual."
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
