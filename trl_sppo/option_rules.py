"""Checks of TRL's and transformers' options that these do not check, or whose errors name no option."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig
from transformers.integrations import integration_utils
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import GRPOConfig

from .trust import check_url


# Numbers that TRL and transformers do not check before training, or without naming the option
RANGES: list[tuple[str, Callable[[float], bool], list[str]]] = [
    (
        "at least 1",
        lambda value: value >= 1,
        [
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "num_generations_eval", "generation_batch_size", "steps_per_generation", "num_iterations",
            "max_completion_length", "pad_to_multiple_of", "ref_model_sync_steps", "eval_accumulation_steps",
            "save_total_limit", "dataloader_prefetch_factor", "vllm_tensor_parallel_size", "reward_batch_size",
            "preference_batch_size", "comparisons_per_group", "judge_token_budget", "rollouts_total_limit",
        ],
    ),
    ("at least 2", lambda value: value >= 2, ["num_generations"]),
    ("at least 1, or -1 for num_train_epochs", lambda value: value != 0, ["max_steps"]),
    (
        "positive",
        lambda value: value > 0,
        [
            "learning_rate", "num_train_epochs", "logging_steps", "save_steps", "bt_temperature",
            "missing_eos_penalty", "time_budget",
        ],
    ),
    # Below, a division by these overflows 32-bit floats
    ("at least 1e-6", lambda value: value >= 1e-6, ["temperature", "repetition_penalty"]),
    ("at least 1e-30", lambda value: value >= 1e-30, ["adam_epsilon"]),
    (
        "not negative",
        lambda value: value >= 0,
        [
            "weight_decay", "neftune_noise_alpha", "top_k", "eval_steps", "seed",
            "dataloader_num_workers", "num_completions_to_print", "max_tool_calling_iterations",
            "router_aux_loss_coef", "beta",
        ],
    ),
    ("in [0, 1]", lambda value: 0 <= value <= 1, ["min_p", "ref_model_mixup_alpha", "forward_kl_share"]),
    ("in [0.5, 1]", lambda value: 0.5 <= value <= 1, ["win_rate_threshold"]),
    ("in [0, 1), as a decay", lambda value: 0 <= value < 1, ["adam_beta1", "adam_beta2"]),
    ("above 0, and at most 1", lambda value: 0 < value <= 1, ["top_p"]),
]  # fmt: skip

# Arguments that TRL passes to a chat template
SET_BY_TRL = {
    "self", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize", "return_dict", "padding",
    "continue_final_message", "return_tensors",
}  # fmt: skip

# Beginnings of TRL's errors that do not name their options, and what to add
OPTIONS_OF_ERRORS = {
    "generation_batch_size (": "If it is not given, generation_batch_size is per_device_train_batch_size x processes "
    "x steps_per_generation (by default, gradient_accumulation_steps).",
    "The config file at ": "That is the file of accelerator_config.",
    "The global eval batch size (": "These are per_device_eval_batch_size x processes, and num_generations_eval (by "
    "default, num_generations).",
}


def find_number_problems(args: GRPOConfig) -> Iterator[str]:
    """Numbers that are not finite, too large, or out of range. Makes whole ones floats where that is meant."""
    for field_ in fields(args):
        value = getattr(args, field_.name)
        if isinstance(value, int) and abs(value) >= 2**31:
            yield f"{field_.name} must be between -2^31 and 2^31, got {value.bit_length()} bits."
            setattr(args, field_.name, math.inf)  # Python refuses to print the number, and other checks would
            continue
        if field_.type in (float, float | None) and type(value) is int:  # of which transformers refuses some
            setattr(args, field_.name, float(value))
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not abs(number) < 2**31:
                yield f"{field_.name} must be between -2^31 and 2^31, got {value}."
    if args.num_generations is None:
        yield "num_generations must be at least 2, got None."
    for rule, holds, names in RANGES:
        for name in names:
            value = getattr(args, name)
            if isinstance(value, (int, float)) and not holds(value):
                yield f"{name} must be {rule}, got {value}."


def find_mapping_problems(args: GRPOConfig) -> Iterator[str]:
    """Options that must be a mapping or JSON and are neither, and numbers in mappings that are text."""
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name)
        if isinstance(value, str) and value.startswith("{"):
            try:
                value = json.loads(value)
            except ValueError as error:
                yield f"{name} must be a mapping, or JSON, got {value!r}: {error}."
        elif isinstance(value, str) and name not in ("accelerator_config", "fsdp_config", "deepspeed"):
            yield f"{name} must be a mapping, or JSON such as '{{\"name\": 1}}', got {value!r}."
        elif isinstance(value, str) and name != "deepspeed" and not os.path.isfile(value):
            yield f"{name} must be a mapping, or JSON, or a file of JSON, got {value!r}."
        if name not in ("model_init_kwargs", "chat_template_kwargs"):  # whose texts may well look like this
            yield from find_number_texts(name, value)


# Numbers elsewhere, but text in YAML 1.1
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def find_number_texts(where: str, value: Any) -> Iterator[str]:
    """Texts in a list or mapping that were meant as numbers."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from find_number_texts(f"{where}: {key}" if ":" not in where else f"{where}.{key}", each)
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from find_number_texts(f"{where}[{i}]", each)
    elif isinstance(value, str) and _EXPONENT.fullmatch(value):
        yield (
            f"{where} must be a number, got the text {value!r}. YAML reads a number with an exponent only if it has a "
            "point and a sign: 1.0e-5, not 1e-5."
        )


# Each launcher sets one of these
_RANKS = "RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"


def find_launch_problems() -> Iterator[str]:
    """A number of processes that no launcher set: torch would wait for other processes endlessly."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and not any(name in os.environ for name in _RANKS):
        yield (
            f"WORLD_SIZE={size} is set in the environment, but no RANK is: this process would wait for others. Run "
            "`unset WORLD_SIZE`. For several processes, use `trl-sppo train --num_processes N`."
        )


def find_pair_problems(args: GRPOConfig) -> Iterator[str]:
    """Options that need another option or a package that is missing."""
    text = args.pad_to_multiple_of
    if isinstance(text, str) and text.lower() not in ("auto", "none", "null") and not text.isdecimal():
        yield f"pad_to_multiple_of must be 'auto' or a whole number, got {text!r}."
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(args, name) and args.dataloader_num_workers == 0:
            yield f"{name}={getattr(args, name)!r} needs workers: set dataloader_num_workers, or remove it."
    if args.ddp_backend is not None and args.use_cpu and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield f"ddp_backend={args.ddp_backend!r} is for several processes, but this is one. Remove it."
    for name in ("do_eval", "eval_on_start"):
        if getattr(args, name) and args.eval_strategy == "no":
            yield f"{name}=True needs an evaluation: set eval_strategy, or remove it."
    if args.sync_ref_model and args.beta == 0:
        yield "sync_ref_model=True moves the initial policy of beta, but beta is 0. Set beta, or remove it."
    known = {field_.name for field_ in fields(AcceleratorConfig)}
    if isinstance(args.accelerator_config, dict) and not args.accelerator_config.keys() <= known:
        yield f"accelerator_config must only have {', '.join(sorted(known))}, got {args.accelerator_config}."


def find_keyword_problems(args: GRPOConfig) -> Iterator[str]:
    """Problems inside mappings, after JSON has been parsed."""
    generation: Any = args.generation_kwargs or {}
    options = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation"}
    wrong = options & generation.keys()
    for name in sorted(wrong):
        yield (
            f"generation_kwargs={generation!r}: set {name} as an option of its own, so that log-probabilities match "
            "the samples."
        )
    for name in ("num_beams", "num_return_sequences"):
        if generation.get(name, 1) != 1:
            wrong.add(name)
            yield f"generation_kwargs={generation!r}: {name} must be 1, since groups are sampled."
    chunk = generation.get("prefill_chunk_size", 1)
    if type(chunk) is not int or chunk < 1:
        wrong.add("prefill_chunk_size")
        yield f"generation_kwargs: prefill_chunk_size must be a whole number of at least 1, got {chunk!r}."
    try:
        if not wrong:
            GenerationConfig(**generation)
    except Exception as error:
        yield f"generation_kwargs={generation!r} is not accepted by GenerationConfig: {error}"
    yield from find_chat_template_problems(args.chat_template_kwargs)


def find_chat_template_problems(kwargs: Any) -> Iterator[str]:
    """Arguments of a chat template that TRL sets."""
    for name in kwargs or {}:
        if name in SET_BY_TRL:
            yield f"chat_template_kwargs: {name} is set by TRL itself. Remove it."


def find_trust_problems(args: Any) -> Iterator[str]:
    """Options that would run untrusted code, and secrets that would be saved with the arguments."""
    login = "Log in with `hf auth login`, or set the environment variable HF_TOKEN, and remove the option."
    if args.hub_token is not None:
        yield "hub_token must not be given: `ps` would show it, and training_args.bin would hold it in clear. " + login
    init_kwargs: Any = args.model_init_kwargs or {}
    for name in ("token", "use_auth_token"):
        if name in init_kwargs:
            yield f"model_init_kwargs must not hold {name!r}: training_args.bin would hold it in clear. {login}"
    if init_kwargs.get("use_safetensors", True) is not True:
        yield (
            f"model_init_kwargs has use_safetensors={init_kwargs['use_safetensors']!r}, but only safetensors are "
            "loaded: other weights are pickles, which may run any code. Remove it."
        )
    if args.vllm_server_base_url is not None:
        try:
            check_url("vllm_server_base_url", args.vllm_server_base_url, "Keep the port where only the trainer is.")
        except ValueError as error:
            yield str(error)
    names = args.reward_trust_remote_code
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        yield f"reward_trust_remote_code must be a list of reward models, as given in reward_funcs, got {names!r}."


def find_tracker_problems(args: GRPOConfig) -> Iterator[str]:
    """Trackers that are unknown or not installed: transformers reports them only after loading models."""
    try:
        for tracker in integration_utils.get_reporting_integration_callbacks(args.report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        yield f"report_to={args.report_to!r}: {error}"
