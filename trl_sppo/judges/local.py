"""Judges that run a model in this process: devices, micro-batches, loading."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import PartialState
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.weights import whole_and_silent
from ..oracles.texts import Messages, break_up, completion_text, last_part, special_tokens
from ..trust import check_safetensors, own_code_is_refused


logger = logging.get_logger(__name__)


class LocalJudge:
    """A judge that runs a model in this process."""

    def __init__(
        self, name: str, model: Any, tokenizer: Any, batch_size: int, max_length: int, special: Iterable[str] = ()
    ):
        self.__name__ = last_part(name)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.max_length = batch_size, max_length
        self.num_truncated = 0
        self._special = special_tokens(tokenizer, *special)

    def _said(self, completion: Messages) -> str:
        """The text of a completion, with special tokens broken up."""
        return break_up(self._special, completion_text(completion))

    def _micro_batches(self, ids: Sequence[list[int]]) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Micro-batches of similar length: the rows of `ids`, and right-padded token ids and their mask."""
        device = PartialState().device  # not earlier: the process may not know its device yet
        if not hasattr(self.model, "hf_device_map"):  # such a model has been placed already, by `device_map`
            self.model.to(device)
        # Longest first: a lack of memory shows at once
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
        pad = self.model.config.pad_token_id or 0
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            tensors = [torch.tensor(ids[row]) for row in rows]
            input_ids = pad_sequence(tensors, batch_first=True, padding_value=pad)
            mask = pad_sequence([*map(torch.ones_like, tensors)], batch_first=True)
            yield rows, input_ids.to(device), mask.to(device)

    def _count_truncated(self, truncated: Sequence[bool], log_metric: Callable[[str, float], None] | None) -> None:
        if log_metric is not None and truncated:
            log_metric(f"{self.__name__}/truncated", sum(truncated) / len(truncated))
        if any(truncated) and not self.num_truncated:
            logger.warning(
                f"{self.__name__} judged truncated texts in {sum(truncated)} of {len(truncated)} comparisons. Raise "
                f"its max_length={self.max_length}, or lower `max_completion_length`. Shown once; "
                f"{self.__name__}/truncated is the share."
            )
        self.num_truncated += sum(truncated)


def load(kind: Any, path: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """A model, and transformers' loading info."""
    check_safetensors("judge", path)
    with no_own_code(path), whole_and_silent():  # a judge divided among processes would stay divided
        return kind.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **kwargs
        )


def load_config(path: str) -> Any:
    try:
        with no_own_code(path):
            return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"judge {path!r} is neither a folder with a config.json nor a model on the Hugging Face hub. ({error})"
        ) from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    with no_own_code(path):  # otherwise transformers asks on the terminal
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def no_own_code(path: str) -> AbstractContextManager[None]:
    return own_code_is_refused(f"judge {path!r}", "If you trust it, wrap it in a `preference_func` of your own.")


def check_loaded(path: str, missing: set[str]) -> None:
    if missing:
        names = ", ".join(sorted(missing)[:5])
        raise ValueError(f"judge {path!r} lacks the weights {names}, and weights made now would judge at random.")
