"""Weight syncs to vLLM: adapters are merged into copies, and a sync is possible on a CPU."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from trl.generation.vllm_generation import VLLMGeneration


NamedTensors = Iterator[tuple[str, torch.Tensor]]


def prepare_weight_sync(generation: VLLMGeneration) -> None:
    """Make weight syncs to vLLM only read the weights of a policy with adapters, and work on a CPU."""
    instance: Any = generation
    if is_peft_model(generation.model) and not generation._dist.is_fsdp:  # which is refused
        instance._iter_named_params = partial(_merge_into_copies, generation, generation._iter_named_params)
    if generation.mode == "colocate" and generation.accelerator.device.type == "cpu":
        instance.sync_weights = partial(_sync_on_cpu, generation)


def _merge_into_copies(generation: VLLMGeneration, named_params: Callable[[], NamedTensors]) -> NamedTensors:
    # TRL merges all adapters in place, W + BA, and takes them out again. In bfloat16 that rounds twice: each sync
    # would move the frozen weights a little further from the adapter's base.
    model: Any = generation.model
    model.merge_adapter = model.unmerge_adapter = lambda: None  # found before PEFT's
    merged: dict[int, torch.Tensor] = {}  # of one layer, by the address of the weight in the policy
    layers: dict[int, list[Any]] = {}  # of PEFT
    try:
        for name, tensor in named_params():
            if not layers:  # not before: ZeRO-3 has gathered the weights by now
                for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
                    for parameter in layer.get_base_layer().parameters():
                        layers.setdefault(parameter.data_ptr(), []).append(layer)
            address = tensor.data_ptr()
            if address in layers and address not in merged:
                merged = _merged(layers[address])
            yield name, merged.get(address, tensor)
    finally:
        del model.merge_adapter, model.unmerge_adapter


@torch.no_grad()
def _merged(layers: list[Any]) -> dict[int, torch.Tensor]:
    """Base weights of layers that share some, with all active adapters. PEFT merges in float32, rounded once."""
    base = [parameter for layer in layers for parameter in layer.get_base_layer().parameters()]
    modules = [module for layer in layers for module in layer.modules()]
    # What a module holds is replaced, not what is in a parameter: DDP's hooks are lost with another dtype
    held = [
        (entries, name, tensor)
        for module in dict.fromkeys(modules)
        for entries in (module._parameters, module._buffers)
        for name, tensor in entries.items()
        if tensor is not None and tensor.is_floating_point()
    ]
    copies: dict[torch.Tensor, torch.Tensor] = {}
    try:
        for entries, name, tensor in held:
            if tensor not in copies:
                copy = tensor.detach().to(torch.float32, copy=True)
                is_parameter = isinstance(tensor, nn.Parameter)
                copies[tensor] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
            entries[name] = copies[tensor]
        for layer in layers:
            layer.merge()
        merged = [parameter for layer in layers for parameter in layer.get_base_layer().parameters()]
        result = {old.data_ptr(): new.to(old.dtype, copy=True) for old, new in zip(base, merged, strict=True)}
        for layer in layers:
            layer.unmerge()  # some have swapped modules
        return result
    finally:
        for layer in layers:
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
