"""PairRM, and classifiers with its input format."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    DebertaV2PreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from ..errors import check_positive
from ..oracles.texts import Messages, break_up, break_up_messages, prompt_text
from .local import LocalJudge, check_loaded, load, load_config, load_tokenizer


# PairRM's prefixes: field of the config with the token's id -> token (https://huggingface.co/llm-blender/PairRM-hf)
PREFIXES = {"source_prefix_id": "<|source|>", "cand1_prefix_id": "<|candidate1|>", "cand2_prefix_id": "<|candidate2|>"}


class DebertaV2PairRM(DebertaV2PreTrainedModel):
    """PairRM: the three prefix tokens gather the prompt and the two candidates, and a head compares them."""

    base_model_prefix = "pretrained_model"

    def __init__(self, config: DebertaV2Config):
        super().__init__(config)
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(config.drop_out),
            nn.Linear(2 * config.hidden_size, config.hidden_size),
            nn.Tanh(),
            nn.Dropout(config.drop_out),
            nn.Linear(config.hidden_size, config.n_tasks),
        )
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        """Compare: `input_ids` has shape `(N, L)` with each prefix token once a row, the logits have shape `(N,)`."""
        hidden = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        source, first, second = (hidden[input_ids == getattr(self.config, field)] for field in PREFIXES)
        # logit = mean over tasks of (head(source, candidate 1) - head(source, candidate 2))
        left = self.head_layer(torch.cat([source, first], dim=1))
        right = self.head_layer(torch.cat([source, second], dim=1))
        return SequenceClassifierOutput(logits=(left - right).mean(dim=1))


class PairRMJudge(LocalJudge):
    """
    A pairwise classifier with PairRM's input form, run in this process.

        P(first beats second | prompt) = sigmoid(logit of [source, prompt, candidate1, first, candidate2, second])

    PairRM reads both completions at once, so its preferences may be intransitive, and they depend on the order: use
    both orders and average, as [`SPPOTrainer`] does. Special tokens that a text spells out are broken up.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`], *optional*, defaults to `"llm-blender/PairRM-hf"`):
            Path or hub id of PairRM, of a model with its architecture (`DebertaV2PairRM`), or of a
            `...ForSequenceClassification` model with one label that was trained on the same input form. Or such a
            model, loaded; `tokenizer` is then required. Loaded from safetensors only, without remote code.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the model, with the tokens `<|source|>`, `<|candidate1|>` and `<|candidate2|>`. The default is
            the one saved with the model. Its chat template, if there is one, renders conversational prompts.
        batch_size (`int`, *optional*, defaults to `8`):
            Comparisons per forward pass.
        max_length (`int`, *optional*, defaults to `2048`):
            Tokens of the whole input, prompt and both completions. Each completion gets half of what the prompt
            leaves. 2048 and 1224 are what PairRM was trained with.
        max_prompt_length (`int`, *optional*, defaults to `1224`):
            Tokens of the prompt.

    Raises:
        `ValueError`: if the model cannot be found, is no such classifier or lacks weights; if the tokenizer lacks the
        prefix tokens; or if the lengths do not fit.

    Example:

    ```python
    judge = PairRMJudge()
    judge(["What is 2 + 2?"], ["4"], ["5"])  # [P("4" beats "5")]
    judge.num_truncated  # comparisons so far in which a text was truncated
    ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel = "llm-blender/PairRM-hf",
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        max_length: int = 2048,
        max_prompt_length: int = 1224,
    ):
        check_positive(batch_size=batch_size, max_length=max_length, max_prompt_length=max_prompt_length)
        name = model if isinstance(model, str) else model.config._name_or_path or type(model).__name__
        if isinstance(model, str):
            path, model = model, _load_pair_classifier(model)
            tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
        elif tokenizer is None:
            raise ValueError(f"judge {name!r} was given as a loaded model, so pass its `tokenizer` too.")
        super().__init__(name, model, tokenizer, batch_size, max_length, PREFIXES.values())
        self.max_prompt_length = max_prompt_length
        _check_pair_classifier(name, self.model, max_length)
        self._prefix_ids = _prefix_ids(name, self.tokenizer, self.model.config)
        # The tokenizer's tokens before and after a text: [CLS] and [SEP]
        plain, full = (self.tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
        start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        self._before, self._after = full[:start], full[start + len(plain) :]
        self._frame = start + 1 + len(self._after)  # with the prefix token
        if min(max_prompt_length, (max_length - max_prompt_length) // 2) <= self._frame:
            raise ValueError(
                f"max_length={max_length} and max_prompt_length={max_prompt_length} leave a text no more than its "
                f"{self._frame} special tokens. Raise max_length."
            )

    def __call__(
        self, prompts: Sequence[Messages], first: Sequence[Messages], second: Sequence[Messages], **kwargs: Any
    ) -> list[float | None]:
        """P(first beats second | prompt) for each of N comparisons. Uses `log_metric`, and ignores other arguments."""
        texts = [
            [self._render(prompt) for prompt in prompts],
            [self._said(completion) for completion in first],
            [self._said(completion) for completion in second],
        ]
        inputs = [self._input(*texts) for texts in zip(*map(self._encode, texts), strict=True)]
        ids, truncated = [row for row, _ in inputs], [cut for _, cut in inputs]
        self._count_truncated(truncated, kwargs.get("log_metric"))
        probabilities: list[float | None] = [None] * len(ids)
        with torch.inference_mode():
            for rows, input_ids, mask in self._micro_batches(ids):
                logits = self.model(input_ids=input_ids, attention_mask=mask).logits.reshape(-1)
                for row, probability in zip(rows, logits.float().sigmoid().tolist(), strict=True):
                    probabilities[row] = probability
        return probabilities

    def _input(self, source: list[int], first: list[int], second: list[int]) -> tuple[list[int], bool]:
        """The token ids of one comparison, and whether a text had to be truncated."""

        def segment(prefix: int, text: list[int], limit: int) -> list[int]:
            return [*self._before, prefix, *text[: limit - self._frame], *self._after]

        ids = segment(self._prefix_ids[0], source, self.max_prompt_length)
        room = (self.max_length - len(ids)) // 2
        ids = ids + segment(self._prefix_ids[1], first, room) + segment(self._prefix_ids[2], second, room)
        longest = max(len(first), len(second)) + self._frame
        return ids, len(source) + self._frame > self.max_prompt_length or longest > room

    def _render(self, prompt: Messages) -> str:
        if isinstance(prompt, str) or self.tokenizer.chat_template is None:
            return break_up(self._special, prompt_text(prompt))
        return self.tokenizer.apply_chat_template(break_up_messages(self._special, prompt), tokenize=False)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids without special tokens. A group's completions come up many times and are tokenized once."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return []
        encoded = self.tokenizer(distinct, add_special_tokens=False, verbose=False).input_ids
        # A tokenizer that normalises text could still find a prefix in it; a second one would move what is compared
        encoded = [[token for token in ids if token not in self._prefix_ids] for ids in encoded]
        by_text = dict(zip(distinct, encoded, strict=True))
        return [by_text[text] for text in texts]


def _prefix_ids(name: str, tokenizer: Any, config: PreTrainedConfig) -> list[int]:
    """Ids of PairRM's prefix tokens, on which tokenizer and model must agree."""
    ids = tokenizer.convert_tokens_to_ids(list(PREFIXES.values()))
    for (field, token), token_id in zip(PREFIXES.items(), ids, strict=True):
        if token_id in (None, tokenizer.unk_token_id) or getattr(config, field, token_id) != token_id:
            raise ValueError(
                f"the tokenizer of judge {name!r} has the id {token_id} for {token!r}, which is not the one that its "
                "model was trained with. Use the model's own tokenizer."
            )
    return ids


def _load_pair_classifier(path: str) -> PreTrainedModel:
    is_pairrm = "DebertaV2PairRM" in (load_config(path).architectures or ())
    model, info = load(DebertaV2PairRM if is_pairrm else AutoModelForSequenceClassification, path)
    check_loaded(path, info["missing_keys"])
    return model


def _check_pair_classifier(name: str, model: PreTrainedModel, max_length: int) -> None:
    config = model.config
    if config.pad_token_id is None or not (isinstance(model, DebertaV2PairRM) or config.num_labels == 1):
        raise ValueError(
            f"judge {name!r} is a {type(model).__name__} with num_labels={config.num_labels} and pad_token_id="
            f"{config.pad_token_id}. It needs a padding token, and is a DebertaV2PairRM or a classifier of one label."
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.endswith("position_embeddings"):
            # RoBERTa's positions begin after the padding token's
            limit = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            if max_length > limit:
                raise ValueError(
                    f"max_length={max_length} is more than the {limit} positions of judge {name!r}. Lower it."
                )
