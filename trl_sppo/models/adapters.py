"""Adapters given by path: their base model and its tokenizer, and how a run continues them."""

import copy
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError, safe_open
from torch.nn import Parameter
from transformers import AutoProcessor, TrainerCallback
from trl import ModelConfig
from trl.trainer.utils import disable_dropout_in_model

from ..config import SPPOConfig
from ..trust import check_safetensors, own_code_is_refused


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Options of TRL's ModelConfig, and their names in the configuration of an adapter
OPTIONS = {
    "lora_task_type": "task_type", "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules", "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save", "use_rslora": "use_rslora", "use_dora": "use_dora",
}  # fmt: skip


def is_adapter(path: str) -> bool:
    """Whether a path is a folder with an adapter. A folder with a config.json is a whole model."""
    return Path(path, CONFIG).is_file() and not Path(path, "config.json").is_file()


def check_whole_model(what: str, path: str) -> None:
    """Raise `ValueError` if there is an adapter beside a whole model: transformers would load that, on its base."""
    if Path(path, CONFIG).is_file() and Path(path, "config.json").is_file():
        raise ValueError(
            f"{what} {path!r} has both the config.json of a whole model and an {CONFIG}. transformers would load the "
            f"adapter. Move {CONFIG} and {WEIGHTS}, or the whole model, to another folder."
        )


def config_of(path: str) -> PeftConfig:
    """The configuration of an adapter. Raises `ValueError` if it cannot be read, or names no base model."""
    try:
        config = PeftConfig.from_pretrained(path)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"adapter {path!r} has an {CONFIG} that PEFT cannot read: {error}.") from error
    if not config.base_model_name_or_path:
        raise ValueError(
            f"adapter {path!r} does not name the model it belongs to. Write base_model_name_or_path into its {CONFIG}."
        )
    return config


def kind_of(config: PeftConfig) -> str:
    """The name of an adapter's kind, such as LORA."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def base_of(path: str) -> str:
    """The base model of an adapter. A path of anything else is returned as it is."""
    return str(config_of(path).base_model_name_or_path) if is_adapter(path) else path


def tokenizer_of(path: str) -> str:
    """Where the tokenizer of a model or an adapter is: with the adapter if it was saved there, else with its base."""
    return base_of(path) if not Path(path, "tokenizer_config.json").is_file() else path


def not_found(what: str, path: str, error: Exception) -> ValueError:
    """The error for a missing model, or a missing base model of an adapter."""
    base = base_of(path)
    adapter, place = "", f"--{what.replace(' ', '_')}_name_or_path"
    if base != path:
        adapter, place = f"an adapter of {base!r}, which is ", f"base_model_name_or_path in {path}/{CONFIG}"
    return ValueError(
        f"{what} {path!r} is {adapter}neither a folder with a config.json nor a model that is available on the "
        f"Hugging Face hub. Check {place}. ({error})"
    )


def weights_of(what: str, path: str) -> dict[str, tuple[list[int], str]]:
    """Shapes and dtypes of an adapter's weights, by name in the base model. Raises `ValueError` if unreadable."""
    check_safetensors(what, path)
    try:
        with safe_open(Path(path, WEIGHTS), framework="pt") as file:
            slices = {name.removeprefix("base_model.model."): file.get_slice(name) for name in file.keys()}
            return {name: (values.get_shape(), values.get_dtype()) for name, values in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{what} {path!r} is an adapter, but its {WEIGHTS} cannot be read: {error}.") from error


def load_weights(what: str, model: PeftModel, path: str) -> None:
    """Load an adapter's weights into a model made by its configuration. Raises `ValueError` if they do not fit."""
    options: dict[str, Any] = {"is_trainable": model.training, "torch_device": "cpu", "autocast_adapter_dtype": False}
    try:
        missing, unknown = misfits(model, path, model.load_adapter(path, "default", **options))
        if not missing and not unknown:
            return
        problem = (
            f"{WEIGHTS} lacks {some(missing)}" if missing else f"{WEIGHTS} has {some(unknown)}, which has no place"
        )
    except KeyError as error:  # for a module that is saved whole
        problem = f"{WEIGHTS} lacks {error.args[0]}"
    except RuntimeError as error:  # other shapes
        problem = " ".join(str(error).split())
    raise ValueError(
        f"{what} {path!r} is an adapter that does not fit its base model {base_of(path)!r}: {problem}. Correct "
        f"base_model_name_or_path in its {CONFIG}, or give another adapter."
    )


def misfits(model: PeftModel, path: str, found: Any) -> tuple[set[str], set[str]]:
    """Weights that an adapter lacks, and weights that its model lacks, of which loading has `found` some."""
    expected = set(get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False))
    # `found` is right about missing weights of LoRA only
    others = {name for name in expected if ".lora_" not in name} - set(load_peft_weights(path, "cpu"))
    return {*others, *(name for name in found.missing_keys if ".lora_" in name)}, set(found.unexpected_keys) - expected


def some(names: Collection[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_policy(path: str) -> PeftConfig:
    """The configuration of a policy's adapter. Raises `ValueError` if it cannot be trained further."""
    config = config_of(path)
    weights_of("model", path)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"model {path!r} is an adapter with task_type={config.task_type!r}, but a policy's is 'CAUSAL_LM'. Pass a "
            "reward model's adapter in reward_funcs."
        )
    config.inference_mode = False  # as it is saved, PEFT would freeze it
    return config


def continue_adapter(
    path: str, args: SPPOConfig, peft_config: PeftConfig | None, processing_class: Any
) -> tuple[str, PeftConfig, Any]:
    """
    Base model, configuration and tokenizer of an adapter, from which TRL builds the policy before `load_weights`. The
    tokenizer is `processing_class`, or else the one saved with it. Sets the base model's revision in `args`.
    """
    if peft_config is not None:
        raise ValueError(
            f"model={path!r} is an adapter, which has a configuration of its own, but peft_config is given too. Leave "
            "peft_config out, or merge this adapter first (docs/reliability.md)."
        )
    config = check_policy(path)
    kwargs: Any = args.model_init_kwargs or {}
    if config.revision and kwargs.get("revision") in (None, "main"):
        args.model_init_kwargs = {**kwargs, "revision": config.revision}
    if processing_class is None and tokenizer_of(path) == path:
        cure = f"Remove tokenizer_config.json from {path!r} to use the base model's, or pass `processing_class`."
        with own_code_is_refused(f"the tokenizer of adapter {path!r}", cure):
            processing_class = AutoProcessor.from_pretrained(path, truncation_side="left", padding_side="left")
    return base_of(path), config, processing_class


def adopt_options(args: ModelConfig) -> None:
    """Set LoRA options to the continued adapter's values. Raises `ValueError` if one has another value."""
    path = str(args.model_name_or_path)
    if not is_adapter(path):
        return
    config = check_policy(path)
    defaults = ModelConfig()
    for option, name in OPTIONS.items():
        asked, given = getattr(args, option), getattr(config, name, None)
        if asked != getattr(defaults, option) and asked != "all-linear" and _plain(asked) != _plain(given):
            raise ValueError(
                f"{option}={asked!r}, but model_name_or_path={path!r} is an adapter ({kind_of(config)}) with "
                f"{name}={given!r}. Leave out {option}, or merge this adapter first (docs/reliability.md)."
            )
        if hasattr(config, name):
            setattr(args, option, given)
    args.use_peft = True


def _plain(value: Any) -> Any:
    return {value} if isinstance(value, str) else set(value) if isinstance(value, (list, tuple, set)) else value


def keep_reference(model: PeftModel, disable_dropout: bool) -> None:
    """Keep a frozen copy of the adapter, "ref", as TRL's initial policy. TRL's own copy lacks weights of IA3, say."""
    if "ref" not in model.peft_config:
        config = copy.deepcopy(model.peft_config["default"])
        config.inference_mode = True
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # some kinds (PiSSA, OLoRA) would subtract the new adapter from the base
        model.add_adapter("ref", config)
        if disable_dropout:
            disable_dropout_in_model(model)
    for parameter, kept in _copies(model):
        kept.data = parameter.data.clone()


def _copies(model: PeftModel) -> Iterator[tuple[Parameter, Parameter]]:
    """The adapter's parameters, each with its copy in "ref"."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        copied = ".".join("ref" if part == "default" else part for part in name.split("."))
        if copied != name:
            yield parameter, parameters[copied]


class MovingReference(TrainerCallback):
    """`sync_ref_model` for adapters: the copy that is the initial policy becomes the adapter of now."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            for parameter, kept in _copies(extract_model_from_parallel(model)):
                kept.data.copy_(parameter.data)
