"""Judges of stored completions, outside a training: reward models, reward functions and pairwise oracles."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm
from trl.data_utils import apply_chat_template, is_conversational
from trl.trainer.utils import get_config_model_id

from .comparisons import NO_COLUMNS, PreferenceFunc, ask, check_oracle, oracle_name, told_apart
from .evaluation import WinRate
from .opponents import play, row_of
from .rewards import MicroBatchedRewardModel, RewardSource, load_reward_models, without_slash


# Of the dataset's columns, reward functions do not get those that their own arguments have the names of
NOT_FOR_REWARDS = {"prompt", "prompts", "completion", "completions", "completion_ids"}


class Panel:
    """
    Judges that score completions, or compare those of two policies.

    Args:
        reward_funcs (sequence of `str`, [`~transformers.PreTrainedModel`] or callable):
            Reward sources, as for [`SPPOTrainer`].
        preference_funcs (sequence of callable):
            Pairwise oracles, likewise.
        conversational (`bool`):
            Whether prompts are lists of messages.
        trust_remote_code (sequence of `str`, *optional*, defaults to `()`):
            Reward models that may run Python code of their own.
        both_orders (`bool`, *optional*, defaults to `True`):
            Whether oracles are asked for each pair in both orders.
        batch_size (`int`, *optional*, defaults to `16`):
            Completions per forward pass of a reward model.
        columns (sequence of `str`, *optional*):
            Columns of the prompts, if they are known: then functions that need others are refused.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat templates of reward models.

    Raises:
        `ValueError`: if a judge could not be asked.
    """

    def __init__(
        self,
        reward_funcs: Sequence[RewardSource],
        preference_funcs: Sequence[PreferenceFunc],
        conversational: bool,
        trust_remote_code: Sequence[str] = (),
        both_orders: bool = True,
        batch_size: int = 16,
        columns: Sequence[str] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        for oracle in preference_funcs:
            check_oracle(oracle)
        if columns is not None:
            for source in reward_funcs:
                if callable(source) and not isinstance(source, nn.Module):
                    given = [name for name in columns if name not in NOT_FOR_REWARDS]
                    _check_call(source, "prompts and completions", ["prompts", "completions"], given)
            for oracle in preference_funcs:
                given = [name for name in columns if name not in NO_COLUMNS]
                own = ["prompts", "first", "second", "log_metric"]
                _check_call(oracle, "prompts, first, second and log_metric", own, given)
        self.both_orders = both_orders
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.accelerator = Accelerator()
        reward_funcs = without_slash(reward_funcs)
        sources, tokenizers = load_reward_models(
            reward_funcs,
            [None] * len(reward_funcs),
            conversational,
            [name.rstrip("/") for name in trust_remote_code],
            chat_template_kwargs,
        )
        names = [
            get_config_model_id(cast(Any, source.config)).split("/")[-1]
            if isinstance(source, nn.Module)
            else oracle_name(source)
            for source in sources
        ]
        names = told_apart([*names, *map(oracle_name, preference_funcs)])
        self.oracles = dict(zip(names[len(sources) :], preference_funcs, strict=True))
        self.sources: dict[str, tuple[Any, Any]] = {}
        for name, source, tokenizer in zip(names[: len(sources)], sources, tokenizers, strict=True):
            if isinstance(source, nn.Module):
                model = source.to(self.accelerator.device) if not hasattr(source, "hf_quantizer") else source
                self.sources[name] = MicroBatchedRewardModel(model, batch_size), tokenizer
            else:
                self.sources[name] = source, None

    def score(self, groups: list[dict[str, Any]]) -> None:
        """Give `"scores"` to groups, by each reward source: nested lists `{name: [S of them]}`."""
        for group in groups:
            group.pop("scores", None)
            if self.sources:
                group["scores"] = {}
        completions = [completion for group in groups for completion in group["completions"]]
        rows = [row for group in groups for row in [row_of(group)] * len(group["completions"])]
        for name, (source, tokenizer) in self.sources.items():
            if tokenizer is None:
                columns = [column for column in rows[0] if column not in NOT_FOR_REWARDS]
                try:
                    scores = ask(
                        source,
                        prompts=[row["prompt"] for row in rows],
                        completions=completions,
                        **{column: [row.get(column) for row in rows] for column in columns},
                    )
                except Exception as error:
                    raise ValueError(
                        f"judge {name!r} failed: {type(error).__name__}: {error}. It is called with prompts, "
                        f"completions and the columns {columns}, and returns a score for each completion."
                    ) from error
                if len(scores) != len(rows):
                    raise ValueError(f"judge {name!r} gave {len(scores)} scores for {len(rows)} completions.")
            else:
                scores = self._ask_model(name, source, tokenizer, [row["prompt"] for row in rows], completions)
            iterator = iter(scores)
            for group in groups:
                group["scores"][name] = [_number(next(iterator)) for _ in group["completions"]]

    def check_prompts(self, prompts: list) -> None:
        """Raise `ValueError` if the chat template of a reward model refuses a conversation."""
        for name, (_, tokenizer) in self.sources.items():
            messages = tokenizer is not None and is_conversational({"prompt": prompts[0]})
            for i, prompt in enumerate(prompts if messages else ()):
                try:
                    self._text(tokenizer, prompt, [{"role": "assistant", "content": "a"}])
                except Exception as error:  # templates raise whatever they like
                    raise ValueError(
                        f"prompt {i} is refused by the chat template of judge {name!r}: {error} Leave out such "
                        "prompts, or change them."
                    ) from error

    def _text(self, tokenizer: Any, prompt: Any, completion: Any) -> str:
        """What TRL's trainer gives a reward model."""
        if not is_conversational({"prompt": prompt}):
            return prompt + completion
        conversation: Any = {"messages": [*prompt, *completion]}
        return cast(Any, apply_chat_template(conversation, tokenizer, **self.chat_template_kwargs))["text"]

    @torch.inference_mode()
    def _ask_model(self, name: str, model: nn.Module, tokenizer: Any, prompts: list, completions: list) -> list[float]:
        texts = [self._text(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in tqdm(range(0, len(texts), 256), desc=name):
            inputs = tokenizer(
                text=texts[start : start + 256], return_tensors="pt", padding=True, padding_side="right",
                add_special_tokens=False,
            )  # fmt: skip
            scores += model(**inputs.to(self.accelerator.device)).logits[:, 0].tolist()
        return scores

    def compare(self, groups: list[dict], opponents: list[dict]) -> dict[str, tuple[WinRate, WinRate]]:
        """See [`~opponents.play`]: of scored groups."""
        return play(
            groups,
            opponents,
            self.oracles,
            both_orders=self.both_orders,
            batch_size=512,
            accelerator=self.accelerator,
            log_metric=lambda name, value: None,
            disable_tqdm=False,
        )


def _check_call(judge: Callable[..., Any], what: str, own: list[str], columns: list[str]) -> None:
    """Raise `ValueError` if a judge could not be called with its own arguments and these columns of the prompts."""
    try:
        signature = inspect.signature(judge)
    except (TypeError, ValueError):  # of some built-in functions
        return
    try:
        signature.bind(**dict.fromkeys([*own, *columns]))
    except TypeError as error:
        raise ValueError(
            f"judge {oracle_name(judge)!r} cannot be called: {error}. It gets {what}, and the columns {columns} of "
            "the prompts. Add what is missing to the prompts, or let the judge take `**kwargs`."
        ) from error


def _number(score: Any) -> float | None:
    """A score, `None` if it is none."""
    return None if score is None or not torch.tensor(float(score)).isfinite() else float(score)
