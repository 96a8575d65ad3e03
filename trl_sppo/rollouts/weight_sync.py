"""Weight syncs to vLLM: adapters are merged into copies, and a sync is possible on a CPU."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
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
    tensors = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
    before = {tensor: tensor.data for tensor in tensors if tensor.is_floating_point()}
    try:
        for tensor, data in before.items():
            tensor.data = data.to(torch.float32, copy=True)
        for layer in layers:
            layer.merge()
        return {before[parameter].data_ptr(): parameter.data.to(before[parameter].dtype) for parameter in base}
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        for tensor, data in before.items():
            tensor.data = data


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
