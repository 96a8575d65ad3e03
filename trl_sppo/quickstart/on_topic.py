"""A judge that ignores sentiment: is the completion about the film in the prompt?"""

import re
from typing import Any


def on_topic(
    prompts: list[list[dict[str, str]]], completions: list[list[dict[str, str]]], **kwargs: Any
) -> list[float]:
    """A reward function: how many of the words of four letters or more after "in which" the completion contains."""
    return [
        float(len(_words(prompt[-1]["content"].split(" in which ")[-1]) & _words(completion[0]["content"])))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w{4,}", text.lower()))
