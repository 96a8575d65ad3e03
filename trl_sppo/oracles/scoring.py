"""Reward sources: reward models and reward functions that score completions."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging
from trl.data_utils import apply_chat_template, is_conversational
from trl.trainer.utils import is_async_callable

from ..errors import RunError, is_of_another_process
from .asking import own_copy, run_coroutines


logger = logging.get_logger(__name__)

# Columns of the dataset that reward functions do not get: their own arguments have these names
NO_COLUMNS = {"prompt", "prompts", "completion", "completions", "completion_ids"}

TEXTS = 256  # tokenized at a time for a reward model


@dataclass(eq=False)
class RewardSources:
    """Reward models, on their device, and reward functions, which may be asynchronous, by name."""

    names: list[str]
    sources: list[Any]  # the trainer's own list, whose entries may be replaced as in TRL
    tokenizers: Sequence[Any]  # of the reward models, else None
    chat_template_kwargs: dict[str, Any] | None = None
    kind: str = "reward source"  # what messages call one
    _warned: set[str] = field(default_factory=set)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: dict[str, list],
        timed: Callable[[str], AbstractContextManager] = nullcontext,  # a context by name, in which that source runs
        if_one_fails: str = "",  # advice, added to the message
        loop: asyncio.AbstractEventLoop | None = None,  # for asynchronous functions
        disable_tqdm: bool = True,
        **more: Any,
    ) -> torch.Tensor:
        """Scores `(N, sources)`, NaN where a source gave no finite one. Raises `RunError` if a source fails."""
        columns = {name: values for name, values in columns.items() if name not in NO_COLUMNS}
        scores = torch.full((len(completions), len(self.names)), torch.nan)
        asked = {"prompts": prompts, "completions": completions, **columns, **more}
        coroutines: dict[int, Coroutine] = {}  # run together
        for i, (name, source, tokenizer) in enumerate(zip(self.names, self.sources, self.tokenizers, strict=True)):
            with self._named(name, completions, columns, if_one_fails):
                # Copies: a source that changes its arguments must not affect the others
                if is_async_callable(source) and not isinstance(source, nn.Module):
                    coroutines[i] = _timed(source(**own_copy(asked)), timed, name)
                    continue
                with timed(name):
                    if isinstance(source, nn.Module):
                        scores[:, i] = self._run(name, source, tokenizer, prompts, completions, disable_tqdm)
                    else:
                        scores[:, i] = _to_scores(source(**own_copy(asked)), len(completions))
        for i, output in zip(coroutines, run_coroutines([*coroutines.values()], loop), strict=True):
            with self._named(self.names[i], completions, columns, if_one_fails):
                scores[:, i] = _to_scores(output, len(completions))
        return scores.masked_fill(~scores.isfinite(), torch.nan)

    def text(self, tokenizer: Any, prompt: Any, completion: Any) -> str:
        """The text that a reward model reads."""
        if not is_conversational({"prompt": prompt}):
            return prompt + completion
        conversation: Any = {"messages": [*prompt, *completion]}
        return cast(Any, apply_chat_template(conversation, tokenizer, **(self.chat_template_kwargs or {})))["text"]

    @torch.inference_mode()
    def _run(
        self, name: str, model: nn.Module, tokenizer: Any, prompts: Sequence, completions: Sequence, disable_tqdm: bool
    ) -> torch.Tensor:
        texts = [self.text(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
        devices = (weight.device for weight in model.parameters() if weight.device.type != "meta")  # not offloaded
        device = next(devices, torch.device("cpu"))
        scores = []
        for start in tqdm(range(0, len(texts), TEXTS), desc=name, disable=disable_tqdm):
            part = texts[start : start + TEXTS]
            padding: Any = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
            inputs = tokenizer(text=part, add_special_tokens=False, **padding).to(device)
            scores.append(model(**inputs).logits[:, 0].cpu())
        # Copies of a text tie, though in another batch its score rounds differently
        of_text = dict(zip(texts, torch.cat(scores).tolist(), strict=True))
        return torch.tensor([of_text[text] for text in texts])

    def score_everywhere(
        self, accelerator: Accelerator, prompts: Sequence[Any], completions: Sequence[Any], columns: dict, **more: Any
    ) -> torch.Tensor:
        """Scores of all processes' completions, `(completions, sources)`. Warns once per source that lacks some."""
        if not self.names:
            return torch.zeros(len(completions) * accelerator.num_processes, 0, device=accelerator.device)
        scores = accelerator.gather(self.score(prompts, completions, columns, **more).to(accelerator.device))
        for name, column in zip(self.names, scores.T, strict=True):
            unscorable = int(column.isnan().sum())
            if unscorable and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    f"{self.kind} {name!r} gave no finite score (None, NaN or infinite) for {unscorable} of "
                    f"{len(column)} completions: they take no part in its comparisons. Shown once per source; the "
                    "metric win_rate/unscorable counts the completions that no source could score."
                )
        return scores

    @contextmanager
    def _named(self, name: str, completions: Sequence, columns: dict, advice: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: the completions are not lost
            if isinstance(error, torch.OutOfMemoryError) or is_of_another_process(error):
                raise
            form = "a text" if isinstance(completions[0], str) else "a list of messages"
            raise RunError(
                f"{self.kind} {name!r} failed: {type(error).__name__}: {str(error).rstrip('.')}. It must return one "
                f"number, or None, for each completion. Each is {form} here, and the columns are {list(columns)}."
                f"{advice}"
            ) from error


async def _timed(coroutine: Coroutine, timed: Callable[[str], AbstractContextManager], name: str) -> Any:
    with timed(name):
        return await coroutine


def _to_scores(output: Any, expected: int) -> torch.Tensor:
    if isinstance(output, BaseException):
        raise output
    values = [torch.nan if value is None else float(value) for value in output]
    if len(values) != expected:
        raise ValueError(f"it returned {len(values)} scores for {expected} completions")
    return torch.tensor(values)
