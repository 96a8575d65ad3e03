"""A judge that the quickstart's policy is not trained on: rules and a lexicon instead of a neural network."""

from functools import cache
from typing import Any


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """A reward function: VADER's sentiment of each completion, from -1 to 1."""
    return [_analyzer().polarity_scores(completion[0]["content"])["compound"] for completion in completions]
