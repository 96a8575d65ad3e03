"""Weight syncs to vLLM: exact where TRL's would round, and possible on a CPU."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from trl.generation.vllm_generation import VLLMGeneration


NamedTensors = Iterator[tuple[str, torch.Tensor]]


def prepare_weight_sync(generation: VLLMGeneration) -> None:
    """Make weight syncs to vLLM leave a LoRA policy's base weights as they were, and work on a CPU."""
    instance: Any = generation
    # Under FSDP this is refused. ZeRO-3 gathers into copies anyway
    if is_peft_model(generation.model) and not generation._dist.is_fsdp:
        instance._iter_named_params = partial(_restore_base_weights, generation, generation._iter_named_params)
    if generation.mode == "colocate" and generation.accelerator.device.type == "cpu":
        instance.sync_weights = partial(_sync_on_cpu, generation)


def _restore_base_weights(generation: VLLMGeneration, named_params: Callable[[], NamedTensors]) -> NamedTensors:
    # TRL merges the adapter in place for the sync, W + BA, and takes it out again afterwards. In bfloat16 that rounds
    # twice: each sync would move the frozen weights a little further from the adapter's base.
    layers = [module for module in generation.model.modules() if isinstance(module, BaseTunerLayer)]
    kept = [(p, p.detach().to("cpu", copy=True)) for layer in layers for p in layer.get_base_layer().parameters()]
    try:
        for name, tensor in named_params():
            # vLLM may hold on to a tensor until its whole layer has come, when the adapter is out again
            yield name, tensor.clone()
    finally:
        for layer in layers:
            if layer.merged:  # the sync has failed halfway
                layer.unmerge()
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


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
