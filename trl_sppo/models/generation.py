"""Generation: the options that act, and the tokens that end a completion."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig


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


def end_tokens(config: GenerationConfig | None, tokenizer: Any) -> list[int]:
    """Tokens that end a completion, as in TRL: the tokenizer's EOS token, and all that the checkpoint names."""
    ends: Any = getattr(config, "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends or ())} - {None})
