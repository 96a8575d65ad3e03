"""A reward function: similarity between a completion and the plot in its prompt."""

from functools import cache
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from .assets import ENCODER, models


@cache
def _encoder() -> Any:
    folder = models() / ENCODER
    return AutoModel.from_pretrained(folder, use_safetensors=True).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def relevance(
    prompts: list[list[dict[str, str]]], completions: list[list[dict[str, str]]], **kwargs: Any
) -> list[float]:
    """A reward function: cosine of all-MiniLM-L6-v2's embeddings (mean over tokens) of plot and completion."""
    texts = [prompt[-1]["content"].split(" in which ")[-1] for prompt in prompts]
    texts += [completion[0]["content"] for completion in completions]
    model, tokenizer = _encoder()
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    means = (model(**inputs).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.cosine_similarity(*means.chunk(2)).tolist()
