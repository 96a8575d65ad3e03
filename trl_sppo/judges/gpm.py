"""General preference models, which embed completions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import check_positive
from ..oracles.texts import Messages, break_up_messages
from .local import LocalJudge, check_loaded, load, load_config, load_tokenizer


class GeneralPreferenceJudge(LocalJudge):
    """
    General preference model (GPM, https://huggingface.co/papers/2410.02197), run in this process: a model embeds each
    completion by itself, and an antisymmetric form compares two embeddings.

        v = normalised value_head(last token),   b = softmax(prompt_head(last token of the prompt))
        score = sum_k b_k (v1[2k] v2[2k+1] - v1[2k+1] v2[2k]),   P(first beats second | prompt) = sigmoid(score / tau)

    Each distinct completion of a prompt is read once per call, so the cost is linear in the number of completions.
    P(a, b) + P(b, a) = 1 by construction, and cycles (a beats b, b beats c, c beats a) can be expressed.

    Args:
        model (`str`):
            Path or hub id of a checkpoint with the weights `model.*`, `value_head.weight` and optionally
            `prompt_head.weight` (without it b = 1). Loaded from safetensors only, without remote code.
        embedding_dim (`int`):
            Length of v: the first dimension of `value_head.weight`, an even number.
        tau (`float`, *optional*, defaults to `0.1`):
            Temperature, in units of the score. The published models were trained with 0.1.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the model, with a chat template. The default is the one saved with the model.
        batch_size (`int`, *optional*, defaults to `8`):
            Completions per forward pass.
        max_length (`int`, *optional*, defaults to `4096`):
            Tokens of a prompt with its completion.

    Raises:
        `ValueError`: if the checkpoint cannot be found, or lacks weights or a chat template; or if an option is out of
        range or does not fit it.

    Example:

    ```python
    judge = GeneralPreferenceJudge("general-preference/GPM-Gemma-2-2B", embedding_dim=...)
    judge(["What is 2 + 2?"], ["4"], ["5"])  # [P("4" beats "5")]
    ```
    """

    def __init__(
        self,
        model: str,
        embedding_dim: int,
        tau: float = 0.1,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        max_length: int = 4096,
    ):
        check_positive(embedding_dim=embedding_dim, tau=tau, batch_size=batch_size, max_length=max_length)
        if embedding_dim % 2:
            raise ValueError(f"embedding_dim must be even, got {embedding_dim}: dimensions are compared in pairs.")
        loaded = _load_general_preference_model(model, embedding_dim)
        tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
        if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
            raise ValueError(f"judge {model!r} needs a `tokenizer` with a chat template and an EOS token.")
        super().__init__(model, loaded, tokenizer, batch_size, max_length)
        self.tau = tau

    def __call__(
        self, prompts: Sequence[Messages], first: Sequence[Messages], second: Sequence[Messages], **kwargs: Any
    ) -> list[float | None]:
        """P(first beats second | prompt) for each of N comparisons. Uses `log_metric`, and ignores other arguments."""
        if not prompts:
            return []
        texts = [
            self._render(prompt, completion)
            for prompt, *pair in zip(prompts, first, second, strict=True)
            for completion in pair
        ]
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        ids, ends, truncated = self._encode(list(distinct))
        left, right = torch.tensor([distinct[text] for text in texts]).view(-1, 2).T
        self._count_truncated((truncated[left] | truncated[right]).tolist(), kwargs.get("log_metric"))
        embeddings, weights = self._embed(ids, ends)
        v1, v2 = embeddings[left], embeddings[right]
        blocks = v1[:, 0::2] * v2[:, 1::2] - v1[:, 1::2] * v2[:, 0::2]  # v1[2k] v2[2k+1] - v1[2k+1] v2[2k]
        # Both completions have the same prompt, and the model is causal: b is the same for both
        scores = (weights[left] * blocks).sum(dim=1)
        return torch.sigmoid(scores / self.tau).tolist()

    def _render(self, prompt: Messages, completion: Messages) -> tuple[str, str]:
        """The text of the prompt alone, and with the completion."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = break_up_messages(self._special, messages)
        reply = {"role": "assistant", "content": self._said(completion)}
        render = partial(self.tokenizer.apply_chat_template, tokenize=False)
        return render(messages), render([*messages, reply])

    def _encode(self, texts: list[tuple[str, str]]) -> tuple[list[list[int]], list[int], torch.Tensor]:
        """Token ids, the index of the prompt's last token, and whether the text was truncated."""
        # Like the official code (GPMPipeline): the rendered template is tokenized with special tokens, so where the
        # template writes a BOS token there are two; and the last token is always overwritten by EOS
        alone, whole = (self.tokenizer([text[i] for text in texts], verbose=False).input_ids for i in (0, 1))
        ids = [[*row[: min(len(row), self.max_length) - 1], self.tokenizer.eos_token_id] for row in whole]
        ends = [min(len(prompt), len(row)) - 1 for prompt, row in zip(alone, ids, strict=True)]
        return ids, ends, torch.tensor([len(row) > self.max_length for row in whole])

    @torch.inference_mode()
    def _embed(self, ids: list[list[int]], ends: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings v and block weights b, each text's in its row, in float32 on the CPU."""
        dim = self.model.value_head.out_features
        embeddings, weights = torch.empty(len(ids), dim), torch.ones(len(ids), dim // 2)
        for rows, input_ids, mask in self._micro_batches(ids):
            hidden = self.model(input_ids, mask)
            row = torch.arange(len(rows), device=hidden.device)
            values = self.model.value_head(hidden[row, mask.sum(dim=1) - 1])
            embeddings[rows] = nn.functional.normalize(values.float(), dim=1).cpu()
            if self.model.prompt_head is not None:
                end = torch.tensor([ends[i] for i in rows], device=hidden.device)
                weights[rows] = self.model.prompt_head(hidden[row, end]).float().softmax(dim=1).cpu()
        return embeddings, weights


def _load_general_preference_model(path: str, embedding_dim: int) -> Any:
    config = load_config(path)
    backbone: Any = MODEL_MAPPING[type(config)]
    base: Any = next(parent for parent in backbone.__mro__[1:] if issubclass(parent, PreTrainedModel))

    class CustomRewardModel(base):  # the name in the published checkpoints' config.json
        def __init__(self, config: PreTrainedConfig):
            super().__init__(config)
            self.model = backbone(config)
            self.value_head = nn.Linear(config.hidden_size, embedding_dim, bias=False)
            self.prompt_head = nn.Linear(config.hidden_size, embedding_dim // 2, bias=False)
            self.post_init()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    model, info = load(CustomRewardModel, path, config=config, ignore_mismatched_sizes=True)
    for key, saved, _ in info["mismatched_keys"]:
        problem = f"embedding_dim={embedding_dim} does not fit judge {path!r}, whose {key} has shape {tuple(saved)}"
        fix = "set it to the first dimension of value_head.weight"
        raise ValueError(f"{problem}: {fix if 'head.' in key else 'correct its config.json'}.")
    missing = set(info["missing_keys"])
    # b = 1 without a prompt head, but not with one of another form
    if "prompt_head.weight" in missing and not any(key.startswith("prompt_head.") for key in info["unexpected_keys"]):
        model.prompt_head = None
        missing.remove("prompt_head.weight")
    check_loaded(path, missing)
    return model
