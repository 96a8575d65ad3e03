"""Generation: the options that act, prompts computed once, and the tokens that end a completion."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftType
from transformers import DynamicCache, GenerationConfig


@contextmanager
def only_requested_generation(model: Any) -> Iterator[None]:
    """
    Ignore a checkpoint's `generation_config.json`, such as `min_p`, except for its special tokens, as TRL does with
    vLLM: completions would not come from the policy that is trained. It is restored afterwards, for saving.
    """
    config = vars(model.generation_config)  # in place: wrappers of the model share the object
    recommended = dict(config)
    names = "eos_token_id", "bos_token_id", "pad_token_id"
    config.clear()
    config.update(vars(GenerationConfig(**{name: recommended.get(name) for name in names})))
    try:
        yield
    finally:
        config.clear()
        config.update(recommended)


@contextmanager
def shared_prompts(model: Any) -> Iterator[None]:
    """
    In the next call of `generate`, compute each prompt once where the rows after it repeat it: its keys and values are
    copied for the completions of its group. Dropout, if there is any, is then the same in a group's copies. Models,
    adapters and caches for which this could be wrong compute each row.
    """
    is_adapted = isinstance(model, PeftModel)
    base = model.get_base_model() if is_adapted else model
    if is_adapted and not all(_keeps_to_rows(config) for config in model.peft_config.values()):
        yield
        return
    prompt_of_row: list[torch.Tensor] = []

    def keep_one_of_each(module, args, kwargs):
        before.remove()  # only the first pass has prompts
        if not _can_share(module, kwargs):
            return None
        rows = torch.cat(
            [kwargs[name] for name in ("input_ids", "attention_mask") if _is_of_rows(kwargs.get(name))], 1
        )
        _, numbers, counts = torch.unique_consecutive(rows, dim=0, return_inverse=True, return_counts=True)
        if len(counts) == len(rows):
            return None
        prompt_of_row.append(numbers)
        first = counts.cumsum(dim=0) - counts
        return args, {name: value[first] if _is_of_rows(value) else value for name, value in kwargs.items()}

    def repeat(module, args, kwargs, output):
        after.remove()
        if prompt_of_row:
            output.logits = output.logits[prompt_of_row[0]]
            _cache(kwargs).reorder_cache(prompt_of_row[0])

    before = base.register_forward_pre_hook(keep_one_of_each, with_kwargs=True)
    after = base.register_forward_hook(repeat, with_kwargs=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _keeps_to_rows(config: Any) -> bool:
    """Whether an adapter brings no columns, and nothing that it has computed for each row."""
    return config.peft_type == PeftType.LORA and not getattr(config, "alora_invocation_tokens", None)


def _can_share(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a first pass has nothing but prompts, and leaves nothing but a cache that can be copied."""
    tensors = {name: value.shape for name, value in kwargs.items() if _is_of_rows(value)}
    return (
        type(_cache(kwargs)) is DynamicCache
        and not _cache(kwargs).offloading
        # Models with a part for images keep positions of each row, RecurrentGemma its state, and own code is unknown
        and model.config.get_text_config() is model.config
        and model.config.model_type != "recurrent_gemma"
        and not model.is_remote_code()
        and {"input_ids"} <= tensors.keys() <= {"input_ids", "attention_mask", "position_ids"}
        and len(set(tensors.values())) == 1
    )


def _is_of_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _cache(kwargs: dict[str, Any]) -> Any:
    """By the names that versions of transformers, and state spaces in older ones, have for it."""
    return next((kwargs[name] for name in ("cache", "past_key_values", "cache_params") if name in kwargs), None)


def end_tokens(config: GenerationConfig | None, tokenizer: Any) -> list[int]:
    """Tokens that end a completion, as in TRL: the tokenizer's EOS token, and all that the checkpoint names."""
    ends: Any = getattr(config, "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends or ())} - {None})
