"""Weight syncs to vLLM: adapters are merged into copies, 4-bit weights too, and a sync is possible on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
from accelerate.utils import is_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import nn
from torch.distributed.tensor import DTensor
from trl.generation.vllm_generation import VLLMGeneration


NamedTensors = Iterator[tuple[str, torch.Tensor]]


def unquantized_vllm() -> AbstractContextManager:
    """A context in which TRL starts vLLM without bitsandbytes for a policy in 4 bit. vLLM 0.28 dropped it."""
    return patch("trl.generation.vllm_generation.is_bitsandbytes_available", return_value=False)


def prepare_weight_sync(generation: VLLMGeneration) -> None:
    """Make weight syncs to vLLM only read the weights of a policy with adapters, and work on a CPU."""
    instance: Any = generation
    if is_peft_model(generation.model):
        for name, layer in generation.model.named_modules():
            if isinstance(layer, BaseTunerLayer) and _is_quantized(layer) and not isinstance(layer, lora.Linear4bit):
                kind = f"{type(layer).__module__}.{type(layer).__name__}"
                problem = f"use_vllm=True with {kind} on 4-bit weights, in {name}: only LoRA is merged"
                raise ValueError(f"{problem} into them. Set use_vllm=False, or use LoRA on linear layers.")
        instance._iter_named_params = partial(_merge_into_copies, generation, generation._iter_named_params)
    if generation.mode == "colocate" and generation.accelerator.device.type == "cpu":
        instance.sync_weights = partial(_sync_on_cpu, generation)


def _merge_into_copies(generation: VLLMGeneration, named_params: Callable[[], NamedTensors]) -> NamedTensors:
    # TRL merges all adapters in place, W + BA, and takes them out again. In bfloat16 that rounds twice: each sync
    # would move the frozen weights a little further from the adapter's base. It would push 4-bit weights as they are.
    model: Any = generation.model
    parameter: Any = None  # whose weight TRL pushes next
    # Modules that an adapter saves whole: of inactive ones, such as "ref", vLLM knows none
    adapters = getattr(model, "peft_config", {})
    idle = [f".modules_to_save.{name}." for name in adapters if name not in model.active_adapters]

    def named_parameters(*args: Any, **kwargs: Any) -> NamedTensors:
        nonlocal parameter
        for name, each in type(model).named_parameters(model, *args, **kwargs):
            if not any(part in name for part in idle):
                parameter = each
                yield name, each

    layers: dict[nn.Parameter, list[Any]] = {}  # of PEFT, or of bitsandbytes without an adapter
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) or _is_quantized(layer):
            for weight in _base(layer).parameters():
                layers.setdefault(weight, []).append(layer)
    merged: dict[nn.Parameter, torch.Tensor] = {}  # of one layer
    model.merge_adapter = model.unmerge_adapter = lambda: None  # found before PEFT's
    model.named_parameters = named_parameters
    try:
        for name, tensor in named_params():
            if parameter in layers and parameter not in merged:
                merged = _merged(layers[parameter])
            yield name, merged.get(parameter, tensor)
    finally:
        del model.merge_adapter, model.unmerge_adapter, model.named_parameters


def _base(layer: Any) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _is_quantized(layer: Any) -> bool:
    """Whether bitsandbytes holds the weights of a layer, or of the layer that an adapter is on."""
    return any(get_bnb_param_type(parameter) for parameter in _base(layer).parameters(recurse=False))


def _whole(tensor: Any) -> torch.Tensor:
    """What a layer multiplies by, in the policy's dtype: all shards, dequantized."""
    if isinstance(tensor, DTensor):  # may be offloaded
        return cast(DTensor, tensor.detach().to(tensor.device_mesh.device_type)).full_tensor()
    if not get_bnb_param_type(tensor):
        return tensor.detach()
    if getattr(tensor.quant_state, "packing_format_for_cpu", False):
        problem = "bitsandbytes has packed the policy's 4-bit weights at a forward pass in evaluation mode on a CPU"
        raise RuntimeError(f"{problem}, so vLLM cannot get them. Do not call model.eval() before a weight sync.")
    return dequantize_bnb_weight(tensor)


@torch.no_grad()
def _merged(layers: list[Any]) -> dict[nn.Parameter, torch.Tensor]:
    """Base weights of layers that share some, with all active adapters. PEFT merges in float32, rounded once."""
    base = [parameter for layer in layers for parameter in _base(layer).parameters()]
    tuners = [layer for layer in layers if isinstance(layer, BaseTunerLayer)]
    # PEFT's class for 4-bit weights would quantize the sum
    merging = [(lora.Linear if _is_quantized(layer) else type(layer), layer) for layer in tuners]
    modules = [module for layer in layers for module in layer.modules()]
    # What a module holds is replaced, not what is in a parameter: DDP's hooks are lost with another dtype
    held = [
        (entries, name, tensor)
        for module in dict.fromkeys(modules)
        for entries in (module._parameters, module._buffers)
        for name, tensor in entries.items()
        if tensor is not None and (tensor.is_floating_point() or get_bnb_param_type(tensor))
    ]
    bases = {layer: layer.get_base_layer() for layer in tuners}
    copies: dict[torch.Tensor, torch.Tensor] = {}
    try:
        for entries, name, tensor in held:
            if tensor not in copies:
                copy = _whole(tensor).to(torch.float32, copy=True)
                is_parameter = isinstance(tensor, nn.Parameter)
                copies[tensor] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
            entries[name] = copies[tensor]
        for kind, layer in merging:
            kind.merge(layer)
        merged = [parameter for layer in layers for parameter in _base(layer).parameters()]
        pairs = zip(base, merged, strict=True)
        result = {old: new.to(getattr(old, "quant_state", old).dtype, copy=True) for old, new in pairs}
        for kind, layer in merging:
            if layer.get_base_layer() is not bases[layer] or getattr(layer, "lora_variant", None):
                kind.unmerge(layer)  # norm tuning swaps modules, DoRA keeps a norm. Of others the copies are dropped
        return result
    finally:
        for layer in tuners:
            layer.merged_adapters.clear()
        for entries, name, tensor in held:
            entries[name] = tensor


def _sync_on_cpu(generation: VLLMGeneration) -> None:
    # vLLM's CPU backend repacks weights for its kernels when they are loaded, so TRL's push into the loaded model
    # fails ("'Parameter' object has no attribute 'weight_loader'"). vLLM's own reload repacks again.
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
    runner.reload_weights(weights_iterator=generation._iter_named_params())
    # A head whose weights are the embedding's is not repacked by that: it would keep its first weights
    for module in runner.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
    generation.llm.reset_prefix_cache()
