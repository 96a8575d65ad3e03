"""A reward function that keeps the policy on the subject: how close a completion is to the plot in its prompt."""

from functools import cache
from typing import Any

import torch


@cache
def _encoder() -> Any:
    """all-MiniLM-L6-v2 and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    from .assets import ENCODER, models

    folder = models() / ENCODER
    return AutoModel.from_pretrained(folder, use_safetensors=True).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def _embed(texts: list[str]) -> torch.Tensor:
    """Mean of the last hidden states over tokens, of length 1, as in sentence-transformers: `(texts, 384)`."""
    model, tokenizer = _encoder()
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    states = model(**inputs).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def relevance(
    prompts: list[list[dict[str, str]]], completions: list[list[dict[str, str]]], **kwargs: Any
) -> list[float]:
    """A reward function: cosine of the embeddings of the plot (what follows "in which") and of the completion."""
    plots = [prompt[-1]["content"].split(" in which ")[-1] for prompt in prompts]
    texts = [completion[0]["content"] for completion in completions]
    return (_embed(plots) * _embed(texts)).sum(dim=-1).tolist()
