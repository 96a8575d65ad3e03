"""Checks of the prompts themselves."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer

from .checks import AnyDataset, policy_config
from .config import SPPOConfig
from .faults import RunError


# More than the templates of known models add to a conversation
TEMPLATE_TOKENS = 512


def _room_for_prompts(args: SPPOConfig, config: Any) -> tuple[int, int] | None:
    """The policy's context and how much of it a prompt may fill, in tokens; `None` if nothing says."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if args.use_vllm:  # which ends completions where the context ends, and refuses prompts that fill it
        context = args.vllm_max_model_length or context
        return context and (context, context - 1)
    return context and (context, context - (args.max_completion_length or 0))


def _does_not_fit(what: str, longest: int, args: SPPOConfig, context: int, room: int) -> str:
    completions = "" if args.use_vllm else f" with max_completion_length={args.max_completion_length}"
    return (
        f"{what} into the policy's context of {context} tokens{completions}: a prompt may have {room}, and the "
        f"longest has {longest}. Leave out such prompts before training (docs/memory.md has a filter)"
        f"{', or raise vllm_max_model_length' if args.use_vllm else ', or lower max_completion_length'}."
    )


def check_prompt_ids(prompt_ids: list[list[int]], args: SPPOConfig, config: Any) -> None:
    """Raise `RunError` if a prompt cannot be answered. Those of a streamed dataset are not known earlier."""
    room = _room_for_prompts(args, config)
    if min(map(len, prompt_ids), default=1) == 0:
        raise RunError("a prompt has no tokens: there is nothing to begin a completion with. Leave out such prompts.")
    longest = max(map(len, prompt_ids), default=0)
    if room is not None and longest > room[1]:
        raise RunError(_does_not_fit("a prompt does not fit", longest, args, *room))


def check_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Raise `RunError` if a row that is to be answered has no prompt. Those of a streamed dataset come unchecked."""
    for row in rows:
        problem = _what_is_missing(row.get("prompt"))
        if problem:
            raise RunError(f"a row of the dataset {problem}: {row}. Leave out such rows, with `dataset.filter`.")


def check_prompts(
    args: SPPOConfig,
    model: str | nn.Module,
    processing_class: Any,
    train_dataset: AnyDataset | None,
    eval_dataset: AnyDataset | dict[str, AnyDataset] | None,
) -> None:
    """
    Look at each prompt of datasets that are not streamed.

    Args:
        args ([`SPPOConfig`]):
            Configuration.
        model (`str` or `nn.Module`), processing_class (*optional*):
            The policy and its tokenizer, as for [`SPPOTrainer`].
        train_dataset, eval_dataset:
            Datasets, as for [`SPPOTrainer`].

    Raises:
        `ValueError`: if a prompt is missing, or does not fit into the policy's context.
    """
    config: Any = policy_config(model, args) if isinstance(model, str) else model.config
    room = _room_for_prompts(args, config)
    datasets = {"train_dataset": train_dataset}
    datasets |= eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
            continue
        long: dict[int, int] = {}
        for i, row in enumerate(dataset.select_columns("prompt")):
            problem = _what_is_missing(row["prompt"])
            if problem:
                raise ValueError(
                    f"row {i} of {name} {problem}. Leave out such rows, with `dataset.filter`, or complete them."
                )
            # A token is at least a byte of the text; the template adds some
            if room is not None and _bytes(row["prompt"]) + TEMPLATE_TOKENS > room[1]:
                if processing_class is None:
                    path: Any = model if isinstance(model, str) else config._name_or_path
                    processing_class = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
                length = _count_tokens(row["prompt"], processing_class, args)
                if length > room[1]:
                    long[i] = length
        if long and room is not None:
            rows = ", ".join(map(str, list(long)[:5])) + (", ..." if len(long) > 5 else "")
            what = f"{len(long)} of {len(dataset)} prompts of {name} (rows {rows}) do not fit"
            raise ValueError(_does_not_fit(what, max(long.values()), args, *room))


def _what_is_missing(prompt: Any) -> str | None:
    if prompt is None:
        return "has no prompt (None)"
    if not isinstance(prompt, str):
        if len(prompt) == 0:
            return "has a prompt without messages"
        for message in prompt:
            if message is None or message.get("role") is None or not _says_something(message):
                return f"has a message without role or content ({message})"
    return None


def _says_something(message: dict[str, Any]) -> bool:
    return message.get("content") is not None or bool(message.get("tool_calls"))


def _bytes(prompt: Any) -> int:
    """Of the text of a prompt."""
    if isinstance(prompt, str):
        return len(prompt.encode(errors="replace"))
    return sum(len(str(message["content"]).encode(errors="replace")) + 8 for message in prompt)


def _count_tokens(prompt: Any, processing_class: Any, args: SPPOConfig) -> int:
    if isinstance(prompt, str):
        return len(processing_class(text=prompt)["input_ids"])
    kwargs: Any = args.chat_template_kwargs or {}
    return len(
        processing_class.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs
        )["input_ids"]
    )
