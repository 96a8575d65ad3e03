"""Reward functions of the quickstart: sentiment, words of the plot, and similarity to the plot."""

import re
from functools import cache
from typing import Any

import torch


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """VADER's sentiment of each completion, from -1 to 1, by a lexicon and rules."""
    return [_analyzer().polarity_scores(completion[0]["content"])["compound"] for completion in completions]


def _plot(prompt: list[dict[str, str]]) -> str:
    return prompt[-1]["content"].split(" in which ")[-1]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w{4,}", text.lower()))


def on_topic(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    """The number of the plot's words of four letters or more that each completion contains."""
    pairs = zip(prompts, completions, strict=True)
    return [float(len(_words(_plot(prompt)) & _words(completion[0]["content"]))) for prompt, completion in pairs]


@cache
def _encoder() -> Any:
    from transformers import AutoModel, AutoTokenizer

    from .assets import ENCODER, models

    folder = models() / ENCODER
    return AutoModel.from_pretrained(folder, use_safetensors=True).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def relevance(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    """Cosine of all-MiniLM-L6-v2's embeddings, means over tokens, of the plot and of each completion."""
    model, tokenizer = _encoder()
    texts = [_plot(prompt) for prompt in prompts] + [completion[0]["content"] for completion in completions]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    means = (model(**inputs).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.cosine_similarity(*means.chunk(2)).tolist()
