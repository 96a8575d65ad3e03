"""Memory of a training on a GPU, estimated from the models' configurations, without their weights."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.training_args import OptimizerNames
from trl import ModelConfig
from trl.trainer.utils import disable_dropout_in_model

from ..config import SPPOConfig
from ..oracles.reward_models import HEADS


# Bytes per weight: 4 bits, and per 64 weights a scale of 32 bits, or (nested) of 8 bits and 32 more per 256 scales
NF4 = {False: 1 / 2 + 4 / 64, True: 1 / 2 + 1 / 64 + 4 / (64 * 256)}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LENGTH = 24  # tokens that a layer is measured with. No dimension of a model has this size


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model from which its memory is computed."""

    # Numbers of parameters
    parameters: int
    matrices: int  # of all layers: what bitsandbytes quantizes
    layer: int
    embedding: int
    widest: int  # the largest matrix
    # Sizes of the model
    layers: int
    hidden: int
    cache: int  # bytes of keys and values per token, of all layers, in 16 bits
    heads: int  # size of the queries of all heads of a layer
    # Bytes that one layer keeps for its backward pass in bf16
    kept: int  # per token
    kept_of_pairs: int  # per pair of positions. 0 if attention makes no matrix of pairs
    adapter: int = 0  # parameters


def size_of(
    config: PreTrainedConfig,
    peft_config: PeftConfig | None = None,
    is_reward_model: bool = False,
    attention: str | None = None,
) -> ModelSize:
    """Measure a model without loading it: on the meta device, and one layer on the CPU."""
    config = config.get_text_config()
    with torch.device("meta"):
        if is_reward_model:
            config.num_labels = 1
            model: Any = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
        linear = [
            module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.split(".")[-1] not in ("lm_head", *HEADS)
        ]
        parameters, adapter = model.num_parameters(), 0
        if peft_config is not None:
            adapter = get_peft_model(model, peft_config).get_nb_trainable_parameters()[0]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    one, two = (_first_layers(config, peft_config, number, attention) for number in (1, 2))
    layer, linear_of_layer, squared_of_layer = (more - less for less, more in zip(one, two, strict=True))
    return ModelSize(
        parameters=parameters,
        matrices=sum(linear),
        layer=layer,
        embedding=config.vocab_size * config.hidden_size,
        widest=max(linear),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        cache=config.num_hidden_layers * 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim * 2,
        heads=heads * head_dim,
        kept=linear_of_layer // LENGTH,
        kept_of_pairs=squared_of_layer // LENGTH**2,
        adapter=adapter,
    )


def _first_layers(
    config: PreTrainedConfig, peft_config: PeftConfig | None, number: int, attention: str | None
) -> tuple[int, int, int]:
    """Parameters of the first layers, and bytes kept for a backward pass: linear in the length, and quadratic."""
    values = config.to_dict() | {"num_hidden_layers": number, "vocab_size": 8}
    values |= {name: values[name][:number] for name in ("layer_types", "no_rope_layers") if values.get(name)}
    values |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    kind = AutoModel if peft_config is None else AutoModelForCausalLM
    # Kernels for GPUs keep no matrix of pairs, unlike what replaces them here
    on_gpus = attention is not None and attention not in ("eager", "sdpa")
    chosen = {} if attention is None or on_gpus else {"attn_implementation": attention}
    with torch.device("meta"):
        model: Any = kind.from_config(config.__class__(**values), dtype=torch.bfloat16, **chosen)
        parameters = model.num_parameters()
        if peft_config is not None:
            get_peft_model(model, peft_config)  # in place
    disable_dropout_in_model(model)  # as SPPOConfig does
    model = model.base_model.to_empty(device="cpu").train()
    for buffer in model.buffers():  # some hold positions, which must be valid
        buffer.zero_()
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    linear: dict[int, int] = {}
    squared: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_square = tensor.shape[-2:] == (LENGTH, LENGTH)
        # Weights, also those that autocast has cast, are counted elsewhere, and so is the mask, the same for all heads
        is_counted = storage.data_ptr() in shared or (is_square and tensor.numel() == LENGTH**2)
        if LENGTH in tensor.shape and not is_counted:
            (squared if is_square else linear)[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.zeros(1, LENGTH, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, 0] = 0  # as in a padded batch: without padding attention may keep less
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(inputs_embeds=hidden, attention_mask=mask)
    return parameters, sum(linear.values()), 0 if on_gpus else sum(squared.values())


@dataclass(frozen=True)
class Placement:
    """Where a training runs."""

    gpu: float  # bytes of memory of each
    processes: int = 1  # one on each GPU
    sharding: str | None = None  # of the policy: fsdp1, fsdp2, or zero0 to zero3
    prompt_length: int = 1024  # of the longest, in tokens, where vLLM does not bound it


def budget(
    args: SPPOConfig, model_args: ModelConfig, policy: ModelSize, rewards: list[ModelSize], place: Placement
) -> dict[str, float]:
    """Bytes on each GPU by what takes them, in one phase (`phase: what`) or in the whole training."""
    return {
        **_weights(args, model_args, policy, rewards, place),
        **_generating(args, policy, place),
        **_scoring(args, rewards, place),
        **_training(args, model_args, policy, place),
    }


def peak(rows: dict[str, float]) -> tuple[float, str]:
    """The bytes of the phase that needs most, and the name of that phase."""
    phases: dict[str, float] = {}
    for name, value in rows.items():
        phase, colon, _ = name.partition(": ")
        if colon:
            phases[phase] = phases.get(phase, 0) + value
    phase = max(phases, key=phases.__getitem__)
    return sum(value for name, value in rows.items() if ": " not in name) + phases[phase], phase


def _weights(
    args: SPPOConfig, model_args: ModelConfig, policy: ModelSize, rewards: list[ModelSize], place: Placement
) -> dict[str, float]:
    """Weights, gradients and states of the optimizer."""
    dtype = dtype_of(args, model_args)
    rows: dict[str, float] = {}
    is_quantized = model_args.load_in_4bit or model_args.load_in_8bit
    if is_quantized:
        matrix = NF4[model_args.use_bnb_nested_quant] if model_args.load_in_4bit else 1
        rows |= _quantized("policy", policy, matrix, dtype)
    elif policy.adapter:
        rows[f"policy, {_SHORT[dtype]}"] = policy.parameters * BYTES[dtype] / _shares(place)
    if policy.adapter:
        # TRL keeps the adapter of a quantized policy in bf16, and PEFT the others in float32
        each = 2 if is_quantized else 4
        optimizer, moments = _optimizer(args, each)
        rows[f"adapter, with gradient and {optimizer}"] = policy.adapter * each * (2 + moments)
        if args.sync_ref_model:
            rows["adapter of the reference"] = policy.adapter * each
    else:
        each = 4 if place.sharding else BYTES[dtype]  # FSDP and ZeRO keep float32 weights
        optimizer, moments = _optimizer(args, each)
        rows[f"policy, with gradient and {optimizer}"] = _trained(each * moments, policy, place, each)
        if place.processes > 1 and place.sharding is None:
            rows["policy, DDP's buckets of gradients"] = policy.parameters * each
        if args.beta > 0:
            rows[f"initial policy, {_SHORT[dtype]}"] = policy.parameters * BYTES[dtype] / _shares(place)
    for i, reward in enumerate(rewards):
        which = "reward model" if len(rewards) == 1 else f"reward model {i + 1}"
        if args.reward_quantization is None:
            rows[f"{which}, bf16"] = reward.parameters * 2 / (place.processes if place.sharding == "zero3" else 1)
        else:
            matrix = NF4[True] if args.reward_quantization == "4bit" else 1
            rows |= _quantized(which, reward, matrix, "bfloat16")
    return rows


def _quantized(what: str, size: ModelSize, matrix: float, dtype: str) -> dict[str, float]:
    """Weights of a model whose matrices bitsandbytes quantizes to `matrix` bytes each, the others in `dtype`."""
    kind = "8 bit" if matrix == 1 else "NF4"
    return {
        f"{what}, matrices in {kind}": size.matrices * matrix,
        f"{what}, the rest in {_SHORT[dtype]}": (size.parameters - size.matrices) * BYTES[dtype],
    }


def _generating(args: SPPOConfig, policy: ModelSize, place: Placement) -> dict[str, float]:
    evaluates = args.eval_strategy != "no"
    if args.rollouts is not None and not evaluates:
        return {}
    if args.use_vllm:
        if args.vllm_mode == "server":
            return {}
        share = args.vllm_gpu_memory_utilization * place.gpu
        return {"generating: vLLM" if args.vllm_enable_sleep_mode else "vLLM, which does not sleep": share}
    longest, prompt = longest_text(args, place), place.prompt_length
    groups = [(args.per_device_eval_batch_size, args.num_generations_eval or args.num_generations)] * evaluates
    if args.rollouts is None:
        rows = args.per_device_train_batch_size * (args.steps_per_generation or 1)
        groups.append((rows, args.num_generations))
    batch = max(rows for rows, _ in groups)
    generation: Any = args.generation_kwargs or {}
    read, width = batch, min(generation.get("prefill_chunk_size", prompt), prompt)
    if width == prompt and args.cache_implementation is None and not args.use_transformers_continuous_batching:
        read = max(-(-rows // cast(int, size)) for rows, size in groups)  # each prompt once for its group
    return {
        "reading prompts: cache, one layer, mask": batch * prompt * policy.cache
        + read * width * policy.kept
        + read * width * prompt * (3 + policy.kept_of_pairs),
        "generating: cache": batch * longest * policy.cache,
        "generating: of one layer, for all heads": batch * longest * policy.heads * 2 * 2,
    }


def _scoring(args: SPPOConfig, rewards: list[ModelSize], place: Placement) -> dict[str, float]:
    text = longest_text(args, place)
    batch = args.reward_batch_size
    layers = [batch * text * size.kept + batch * text**2 * (3 + size.kept_of_pairs) for size in rewards]
    return {"scoring: one layer, mask": max(layers)} if layers else {}


def _training(args: SPPOConfig, model_args: ModelConfig, policy: ModelSize, place: Placement) -> dict[str, float]:
    batch, longest = args.per_device_train_batch_size, longest_text(args, place)
    if dtype_of(args, model_args) == "float32" and not args.bf16 and not args.fp16:  # twice what was measured in bf16
        batch *= 2
    what, inputs, layers = "all layers", 0, policy.layers + 1  # one of them twice
    if args.gradient_checkpointing:
        what, inputs, layers = "inputs of all layers, one layer twice", policy.layers * policy.hidden * 2, 2
    of_pairs = longest**2 * layers * policy.kept_of_pairs
    rows = {f"training: {what}": float(batch * (longest * (inputs + layers * policy.kept) + of_pairs))}
    if model_args.load_in_4bit:
        rows["training: a matrix in bf16"] = policy.widest * 2
    if place.sharding in ("fsdp1", "fsdp2"):
        rows["training: gathered"] = (2 * policy.layer + policy.embedding) * 4
    if place.sharding == "zero3":  # DeepSpeed's stage3_max_live_parameters and reduce_bucket_size
        rows["training: gathered"] = 1_000_000_000 * 2 + 500_000_000 * 2
    if place.sharding in ("zero0", "zero1", "zero2"):
        rows["training: buckets"] = 500_000_000 * 2 * 2  # reduce_bucket_size and allgather_bucket_size
    if not policy.adapter:
        rows["training: head"] = policy.embedding * (2 + 4 + 2)
    return rows


def longest_text(args: SPPOConfig, place: Placement) -> int:
    """Tokens of the longest prompt with its completion."""
    if args.use_vllm and args.vllm_max_model_length is not None:
        return args.vllm_max_model_length
    return place.prompt_length + (args.max_completion_length or 0)


_SHORT = {"float32": "float32", "bfloat16": "bf16", "float16": "fp16"}


def dtype_of(args: SPPOConfig, model_args: ModelConfig) -> str:
    """Name of the dtype that the policy is loaded in. `"auto"` counts as bfloat16."""
    init_kwargs: Any = args.model_init_kwargs or {}
    dtype = str(init_kwargs.get("dtype", model_args.dtype) or "float32").removeprefix("torch.")
    if dtype not in (*BYTES, "auto"):
        raise ValueError(f"dtype must be {' or '.join(BYTES)}, or auto, got {dtype!r}.")
    return "bfloat16" if dtype == "auto" else dtype


def _shares(place: Placement) -> int:
    """Number of processes that weights without training are divided among."""
    return place.processes if place.sharding in ("zero3", "fsdp1", "fsdp2") else 1


def _trained(moments: float, policy: ModelSize, place: Placement, each: int) -> float:
    """Bytes of weights, gradients and `moments` in full fine-tuning, of `each` bytes per weight without ZeRO."""
    # Bytes per weight that each process has whole, and that are divided. ZeRO has bf16 weights and gradients, and a
    # copy in float32
    whole, divided = {
        "zero0": (2 + 2 + 4 + moments, 0.0),
        "zero1": (2 + 2, 4 + moments),
        "zero2": (2, 2 + 4 + moments),
        "zero3": (0, 2 + 2 + 4 + moments),
        "fsdp1": (0, 4 + 4 + moments),
        "fsdp2": (0, 4 + 4 + moments),
    }.get(str(place.sharding), (2 * each + moments, 0.0))
    return policy.parameters * (whole + divided / place.processes)


# By the start of their names: names in the rows of the budget, and moments per parameter. Others count as AdamW
OPTIMIZERS = {"rmsprop": ("RMSprop", 1), "sgd": ("SGD", 0), "adafactor": ("Adafactor", 0), "lion": ("Lion", 1)}


def _optimizer(args: SPPOConfig, each: int) -> tuple[str, float]:
    """Its name in the budget, and its moments in sizes of a parameter of `each` bytes."""
    name = OptimizerNames(args.optim).value.removeprefix("paged_")
    words, moments = next((OPTIMIZERS[start] for start in OPTIMIZERS if name.startswith(start)), ("AdamW", 2))
    return words, moments / each if "8bit" in name else moments
