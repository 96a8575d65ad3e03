"""Checks of the options that come from TRL and transformers, where these do not look or speak of no option."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

from transformers import GenerationConfig
from transformers.utils import is_liger_kernel_available
from trl import GRPOConfig

from .trust import check_url


# What numbers of `GRPOConfig` may be where it does not check that itself, or only in the middle of training
RANGES: list[tuple[str, Callable[[float], bool], list[str]]] = [
    (
        "at least 1",
        lambda value: value >= 1,
        [
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "num_generations_eval", "generation_batch_size", "steps_per_generation", "num_iterations",
            "max_completion_length", "pad_to_multiple_of", "ref_model_sync_steps", "eval_accumulation_steps",
            "save_total_limit", "dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout",
            "vllm_max_model_length", "vllm_tensor_parallel_size",
        ],
    ),
    (
        "positive",
        lambda value: value > 0,
        ["num_train_epochs", "logging_steps", "save_steps", "vllm_server_timeout"],
    ),
    # Below, 32-bit floats overflow in what is divided by these
    ("at least 0.001", lambda value: value >= 1e-3, ["temperature", "repetition_penalty"]),
    ("in [0, 1000]", lambda value: 0 <= value <= 1000, ["neftune_noise_alpha"]),
    ("at least 1e-30", lambda value: value >= 1e-30, ["adam_epsilon"]),
    (
        "not negative",
        lambda value: value >= 0,
        [
            "max_grad_norm", "top_k", "eval_steps", "eval_delay",
            "warmup_steps", "seed", "data_seed", "dataloader_num_workers", "num_completions_to_print",
            "max_tool_calling_iterations", "router_aux_loss_coef",
        ],
    ),
    (
        "in [0, 1]",
        lambda value: 0 <= value <= 1,
        ["weight_decay", "min_p", "label_smoothing_factor", "ref_model_mixup_alpha"],
    ),
    ("in [0, 1), as a decay", lambda value: 0 <= value < 1, ["adam_beta1", "adam_beta2"]),
    (
        "above 0, and at most 1",
        lambda value: 0 < value <= 1,
        ["learning_rate", "top_p", "vllm_gpu_memory_utilization"],
    ),
]  # fmt: skip

# What TRL gives to a chat template
SET_BY_TRL = {
    "self", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize", "return_dict", "padding",
}  # fmt: skip

# How errors of TRL begin that do not say which options they are about
OPTIONS_OF_ERRORS = {
    "generation_batch_size (": "If it is not given, generation_batch_size is per_device_train_batch_size x processes "
    "x steps_per_generation (by default, gradient_accumulation_steps).",
    "The config file at ": "That is the file of accelerator_config.",
    "The global eval batch size (": "These are per_device_eval_batch_size x processes, and num_generations_eval (by "
    "default, num_generations).",
}


def check_numbers(args: GRPOConfig) -> None:
    """Raise `ValueError` if a number is not finite, or out of range. Make whole ones floats where that is meant."""
    for field_ in fields(args):
        value = getattr(args, field_.name)
        if isinstance(value, int) and abs(value) >= 2**31:
            raise ValueError(f"{field_.name} must be between -2^31 and 2^31, got {value.bit_length()} bits.")
        if field_.type in (float, float | None) and type(value) is int:  # of which transformers refuses some
            setattr(args, field_.name, float(value))
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number) and field_.name != "eta":
                raise ValueError(f"{field_.name} must be finite, got {value}.")
    for rule, holds, names in RANGES:
        for name in names:
            value = getattr(args, name)
            if isinstance(value, (int, float)) and not holds(value):
                raise ValueError(f"{name} must be {rule}, got {value}.")


def check_mappings(args: GRPOConfig) -> None:
    """Raise `ValueError` if what should be a mapping is neither one nor JSON."""
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name)
        if not isinstance(value, str) or name == "deepspeed":
            continue
        if value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise ValueError(f"{name} must be a mapping, or JSON, got {value!r}: {error}.") from error
        elif name not in ("accelerator_config", "fsdp_config"):
            raise ValueError(f"{name} must be a mapping, or JSON such as '{{\"name\": 1}}', got {value!r}.")
        elif not os.path.isfile(value):
            raise ValueError(f"{name} must be a mapping, or JSON, or a file of JSON, got {value!r}.")


def check_pairs(args: GRPOConfig) -> None:
    """Raise `ValueError` or `ImportError` if an option needs another one, or a package, that is not there."""
    text = args.pad_to_multiple_of
    if isinstance(text, str) and text.lower() not in ("auto", "none", "null") and not text.isdecimal():
        raise ValueError(f"pad_to_multiple_of must be 'auto' or a whole number, got {text!r}.")
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(args, name) and args.dataloader_num_workers == 0:
            raise ValueError(
                f"{name}={getattr(args, name)!r} needs workers: set dataloader_num_workers, or remove it."
            )
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError(
            "use_liger_kernel=True needs liger-kernel, which is not installed. TRL has deprecated it: use "
            'model_init_kwargs={"use_kernels": True}.'
        )
    if args.ddp_backend is not None and args.use_cpu and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise ValueError(f"ddp_backend={args.ddp_backend!r} is for several processes, but this is one. Remove it.")
    if args.eval_on_start and args.eval_strategy == "no":
        raise ValueError("eval_on_start=True needs an evaluation: set eval_strategy, or remove it.")


def check_keywords(args: GRPOConfig) -> None:
    """What mappings hold, once those that came as JSON have been read."""
    generation: Any = args.generation_kwargs or {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation"):
        if name in generation:
            raise ValueError(
                f"generation_kwargs={generation!r}: set {name} as an option of its own, so that log-probabilities "
                "are those of what is sampled."
            )
    for name in ("num_beams", "num_return_sequences"):
        if generation.get(name, 1) != 1:
            raise ValueError(f"generation_kwargs={generation!r}: {name} must be 1, since groups are sampled.")
    try:
        GenerationConfig(**generation)
    except Exception as error:
        raise ValueError(f"generation_kwargs={generation!r} is not what GenerationConfig takes: {error}") from error
    check_chat_template_kwargs(cast(Any, args.chat_template_kwargs))


def check_chat_template_kwargs(kwargs: dict[str, Any] | None) -> None:
    """Raise `ValueError` if these hold what is said elsewhere."""
    for name in kwargs or {}:
        if name in SET_BY_TRL:
            raise ValueError(f"chat_template_kwargs: {name} is set by TRL itself. Remove it.")


def check_trust(args: Any) -> None:
    """Whose code may run, and what must not be saved with the arguments."""
    login = "Log in with `hf auth login`, or set the environment variable HF_TOKEN, and remove the option."
    if args.hub_token is not None:
        raise ValueError(
            "hub_token must not be given: `ps` would show it, and training_args.bin hold it in clear. " + login
        )
    init_kwargs: Any = args.model_init_kwargs or {}
    for name in ("token", "use_auth_token"):
        if name in init_kwargs:
            raise ValueError(
                f"model_init_kwargs must not hold {name!r}: training_args.bin would hold it in clear. {login}"
            )
    if init_kwargs.get("use_safetensors", True) is not True:
        raise ValueError(
            f"model_init_kwargs has use_safetensors={init_kwargs['use_safetensors']!r}, but only safetensors are "
            "loaded: other weights are pickles, which may run any code. Remove it."
        )
    if args.vllm_server_base_url is not None:
        check_url("vllm_server_base_url", args.vllm_server_base_url, "Keep the port where only the trainer is.")
    names = args.reward_trust_remote_code
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"reward_trust_remote_code must be a list of reward models, as given in reward_funcs, got {names!r}: "
            "each whose own code may run is named."
        )
