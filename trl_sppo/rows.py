"""Rows of stored groups: conversions, and equality of prompts."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from trl.data_utils import is_conversational


IMAGES = ("image", "images")  # columns of the dataset that are not written
ROW = "row_of_rollouts"


def to_tensor(rows: Any) -> torch.Tensor:
    """A float tensor of nested lists, NaN where they have `None`."""
    return torch.from_numpy(np.array(rows, dtype=np.float32))


def to_lists(values: torch.Tensor) -> Any:
    """Nested lists of a tensor, with `None` where it is NaN."""
    array = values.cpu().numpy().astype(object)
    array[values.isnan().cpu().numpy()] = None
    return array.tolist()


def without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """A message without the fields that only other messages of its file have."""
    return {name: value for name, value in message.items() if value is not None}


def key_of(prompt: Any) -> str:
    """A key that is equal for equal prompts, however they were stored."""
    if prompt and is_conversational({"prompt": prompt}):
        prompt = [without_nulls(message) for message in prompt]
    return json.dumps(prompt, sort_keys=True, default=str)


def same_prompts(groups: Sequence[dict[str, Any]], prompts: Sequence[Any]) -> bool:
    """Whether stored groups are of these prompts, in this order."""
    return [key_of(group["prompt"]) for group in groups] == [key_of(prompt) for prompt in prompts]
