"""Checks of the policy before it is loaded: weights, adapters, quantization, sharding."""

import os
from pathlib import Path
from typing import Any

import transformers
from accelerate.utils import parse_flag_from_env
from packaging.version import Version
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.trainer_utils import IntervalStrategy
from trl import ModelConfig

from ..config import SPPOConfig
from ..models.adapters import check_whole_model, not_found
from ..models.weights import check_weights
from ..trust import check_safetensors, own_code_is_refused


POLICYS_OWN_CODE = "If you trust it, set trust_remote_code=True, which applies to this model only."


def policy_config(model: str, args: SPPOConfig) -> Any:
    """The policy's configuration, by its path or id."""
    kwargs: Any = args.model_init_kwargs or {}
    with own_code_is_refused(f"model {model!r}", POLICYS_OWN_CODE):
        return AutoConfig.from_pretrained(
            model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )


def check_adapter(args: ModelConfig) -> None:
    """Raise `ValueError` for invalid sizes of an adapter, or if an adapter is needed and `use_peft` is not set."""
    for name in ("lora_r", "lora_alpha"):
        if not 1 <= getattr(args, name) <= 2**16:
            raise ValueError(f"{name} must be between 1 and {2**16}, got {getattr(args, name)}.")
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), got {args.lora_dropout}: it is a probability.")
    for name in ("load_in_8bit", "load_in_4bit"):
        if getattr(args, name) and not args.use_peft:
            raise ValueError(f"{name}=True needs use_peft=True: quantized weights cannot be trained, an adapter can.")


def quantized_bits(model: str | nn.Module, args: SPPOConfig, quantization_config: Any = None) -> int | None:
    """4 or 8 if bitsandbytes quantizes the policy. `None` for an unknown path, which `check_model` reports."""
    kwargs: Any = args.model_init_kwargs or {}
    config = quantization_config or kwargs.get("quantization_config")
    if config is None and isinstance(model, str):
        config = _saved_quantization(model, args)
    if config is None:
        return next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)
    config = config if isinstance(config, dict) else config.to_dict()
    return next((bits for bits in (4, 8) if config.get(f"load_in_{bits}bit", False)), None)


def _saved_quantization(model: str, args: SPPOConfig) -> Any:
    try:
        return getattr(policy_config(model, args), "quantization_config", None)
    except OSError:
        return None


def check_quantization(
    args: SPPOConfig, model: str | nn.Module, quantization_config: Any = None, on_cpu: bool | None = None
) -> int | None:
    """The policy's bits. `ValueError` if vLLM cannot sample from it, or for evaluations in 4 bit on a CPU."""
    bits = quantized_bits(model, args, quantization_config)
    if bits is None:
        return None
    if args.use_vllm and bits == 8:
        raise ValueError(
            "use_vllm=True with a policy in 8 bit: bitsandbytes rounds activations to 8 bit too, and vLLM does not, "
            "so vLLM would sample from another policy. Set load_in_4bit=True instead, or use_vllm=False."
        )
    path = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    if args.use_vllm and path and _saved_quantization(path, args) is not None:
        raise ValueError(
            f"use_vllm=True with model {path!r}, which is saved in 4 bit: vLLM loads the checkpoint itself, without "
            "bitsandbytes. Give the checkpoint in full precision with load_in_4bit=True, or set use_vllm=False."
        )
    evaluate = IntervalStrategy(args.eval_strategy).value
    on_cpu = args.device.type == "cpu" if on_cpu is None else on_cpu
    if bits == 4 and evaluate != "no" and on_cpu:
        raise ValueError(
            f"eval_strategy={evaluate!r} with a policy in 4 bit on a CPU: bitsandbytes may pack the weights at the "
            "first evaluation so that no gradient passes afterwards. Set eval_strategy='no', or remove load_in_4bit."
        )
    return bits


def check_sharding(
    args: SPPOConfig, has_adapter: bool, bits: int | None, deepspeed: bool | None = None, fsdp: int | None = None
) -> None:
    """Raise `ValueError` for options that fail with adapters or sharded models, as accelerate shards here."""
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") if deepspeed is None else deepspeed
    fsdp = fsdp_version(args) if fsdp is None else fsdp
    if fsdp and args.use_vllm and (bits or (has_adapter and fsdp == 1)):
        what = f"a policy in {bits} bit under FSDP" if bits else "an adapter under FSDP1"
        reason = (
            "packed weights are not sharded tensors" if bits else "it has no whole matrices to merge adapters into"
        )
        raise ValueError(
            f"use_vllm=True with {what}: {reason}. Use --accelerate_config multi_gpu, or fsdp2 and a policy in "
            "bfloat16, or use_vllm=False."
        )
    lazily = parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")
    if fsdp and lazily and args.beta > 0 and not has_adapter and Version(transformers.__version__) < Version("5.23"):
        raise ValueError(
            f"beta={args.beta} needs the initial policy, which transformers {transformers.__version__} would load as "
            "zeros. Set fsdp_cpu_ram_efficient_loading: false for accelerate, or install transformers 5.23."
        )
    if args.sync_ref_model and has_adapter and args.ref_model_mixup_alpha != 1:
        raise ValueError(
            f"ref_model_mixup_alpha={args.ref_model_mixup_alpha} (TRL's default: 0.6) does not work with an adapter: "
            "an average of factors is no average of adapters. Set it to 1: the reference then becomes the policy."
        )
    if args.sync_ref_model and has_adapter and (fsdp or deepspeed):
        raise ValueError(
            "sync_ref_model=True with an adapter needs the whole adapter on each process, but DeepSpeed and FSDP "
            "shard it. Use --accelerate_config multi_gpu, or train all weights."
        )
    if deepspeed and args.reward_quantization is not None:
        raise ValueError(
            f"reward_quantization={args.reward_quantization!r} does not work under DeepSpeed. Remove it, or put the "
            "reward model behind a server and give its URL."
        )


def fsdp_version(args: SPPOConfig) -> int:
    """FSDP's version by accelerate's environment or transformers' own options, 0 without FSDP."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return int(os.environ.get("FSDP_VERSION", 1))
    config: Any = args.fsdp_config or {}
    return int(config.get("version", 2)) if args.fsdp else 0  # 2 is transformers' default


def check_trainable(model: nn.Module) -> None:
    """Raise `ValueError` if no parameter that a policy uses requires a gradient."""
    idle = set(model.peft_config) - set(model.active_adapters) if isinstance(model, PeftModel) else set()
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if not any(idle.isdisjoint(name.split(".")) for name in trained):
        raise ValueError(
            f"no parameter of the policy ({type(model).__name__}) requires a gradient, so nothing would be trained. "
            "Load an adapter with `PeftModel.from_pretrained(model, path, is_trainable=True)`, activate it with "
            "`model.set_adapter`, call `model.requires_grad_(True)`, or pass `peft_config`."
        )


def check_policy_weights(model: str, config: Any, args: SPPOConfig) -> None:
    """Raise `ValueError` if the policy's weights are pickles, or some of them are missing."""
    kwargs: Any = args.model_init_kwargs or {}
    check_safetensors("model", model, kwargs.get("subfolder") or "")
    check_whole_model("model", model)
    kind = getattr(transformers, (config.architectures or [""])[0], None)  # the config's class, like TRL
    if kind is not None:
        check_weights("model", str(Path(model, kwargs.get("subfolder") or "")), kind)


def check_model(
    model: str | nn.Module,
    args: SPPOConfig,
    has_adapter: bool,  # whether an adapter is trained, and not the whole policy
    needs_tokenizer: bool = True,  # whether the tokenizer is the one beside the model
    adapter: str | None = None,  # folder of the adapter that is continued. `model` is its base model
) -> None:
    """Raise `ValueError` if the policy, or the initial policy that `beta` needs, cannot be loaded from safetensors."""
    if not isinstance(model, str):
        if args.beta <= 0 or has_adapter:  # which is switched off for the initial policy
            return
        path = getattr(model.config, "_name_or_path", "")
        if not path:
            raise ValueError(
                f"beta={args.beta} needs the initial policy, which TRL loads again from the model's path, but this "
                "one has none. Save it, and pass the path as `model`."
            )
        check_safetensors("the initial policy that beta needs, model", path)
        check_weights("the initial policy that beta needs, model", path, type(model))
        return
    try:
        config = policy_config(model, args)
    except OSError as error:
        raise not_found("model", adapter or model, error) from error
    kwargs: Any = args.model_init_kwargs or {}
    check_policy_weights(model, config, args)
    revision = {"revision": kwargs.get("revision")}
    own_code = getattr(config, "auto_map", None) or get_tokenizer_config(model, **revision).get("auto_map")
    if needs_tokenizer and own_code and not args.trust_remote_code:  # AutoProcessor does not report it
        with own_code_is_refused(f"the tokenizer of model {model!r}", POLICYS_OWN_CODE):
            AutoTokenizer.from_pretrained(model, **revision, trust_remote_code=False)


def check_not_replaced(model: str, output_dir: str) -> None:
    """Raise `ValueError` if the run would overwrite the checkpoint that it starts from."""
    path = Path(model).resolve()
    if path.parent == Path(output_dir).resolve() and path.name.startswith("checkpoint-"):
        raise ValueError(
            f"model {model!r} is a checkpoint in output_dir={output_dir!r}, where a new run would overwrite it. Set "
            "another output_dir, or continue the run with its first model and resume_from_checkpoint=true."
        )
