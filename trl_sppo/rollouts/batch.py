"""Rollouts in memory, between generation and loss."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device

from ..rows import ROW
from .targets import RolloutTargets, in_pairs


# Inputs of a model with images besides tokens
IMAGE_FIELDS = (
    "pixel_values", "image_grid_thw", "num_images", "num_tiles", "pixel_attention_mask", "spatial_shapes",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


@dataclass
class Rollout:
    """A generation batch, between its prompts and TRL's batch of tensors."""

    inputs: list[dict[str, Any]]  # this process's rows of the dataset, one for each completion
    group_size: int  # completions per prompt, K
    iteration: int | None = None  # None in an evaluation
    only_sampled: bool = False  # written and not trained on: all completions get log-probabilities
    prompts: list = field(default_factory=list)  # this process's, as all that is sampled
    completions: list = field(default_factory=list)  # as voters and judges read them
    completion_ids: list[list[int]] = field(default_factory=list)
    tool_mask: list[list[int]] | None = None  # 0 for tokens that are a tool's
    reasoning: list[tuple[int, bool]] | None = None  # hidden: the number of tokens, and whether it never ends
    scores: torch.Tensor | None = None  # by the reward sources, (completions of all processes, sources)
    targets: RolloutTargets | None = None

    def rows(self, extra_fields: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows of the dataset, with the other values that a `rollout_func` returned, as in TRL."""
        rows = [{name: value for name, value in row.items() if name != ROW} for row in self.inputs]
        for name, value in extra_fields.items():
            for row, each in zip(rows, value if isinstance(value, list) else [value] * len(rows), strict=False):
                row[name] = each
        return rows

    def facts(self, ends: list[int], pad: int) -> torch.Tensor:
        """
        Per completion, of shape `(N, 5)`: the number of sampled tokens, whether it ends, a number that is equal for
        equal completions, and `reasoning`. A completion without tokens is stored as one token `pad`.
        """
        mask = self.tool_mask or [[1] * len(ids) for ids in self.completion_ids]
        empty = [pad] if pad not in ends else None
        reasoning = self.reasoning or [(0, False)] * len(mask)
        return torch.tensor([
            [0 if ids == empty else sum(row), bool(ids) and ids[-1] in (*ends, pad), hash(tuple(ids)), *hidden]
            for ids, row, hidden in zip(self.completion_ids, mask, reasoning, strict=True)
        ])  # fmt: skip

    def rows_with_logps(self) -> torch.Tensor | slice:
        """This process's rows that need log-probabilities under the policy that sampled them."""
        assert self.targets is not None
        return slice(None) if self.only_sampled else self.targets.rows[: self.targets.num_logps]


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list]:
    """The dataset's columns besides the prompt."""
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with all its tensors on a device."""
    return send_to_device(batch, device, non_blocking=device.type == "cuda")


def pin(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch in pinned CPU memory, from which copies to a GPU overlap with computation."""
    if device.type != "cuda":
        return batch
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def model_inputs(batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of TRL's log-probability pass, after the model."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    images = {name: batch[name] for name in IMAGE_FIELDS if name in batch}
    return (ids, mask, batch["completion_ids"].size(1)), images


def preferences_of_rows(batch: dict[str, Any]) -> torch.Tensor:
    """P[i, j] of shape `(N, N)` for the rows of a micro-batch, NaN unless both are kept and of one group."""
    same = batch["group"].unsqueeze(1) == batch["group"].unsqueeze(0)
    preferences = batch["preferences"][:, batch["place"]].masked_fill(~same, torch.nan)
    return preferences.masked_fill(~in_pairs(preferences, batch["kept"]), torch.nan)


def loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """Completion tokens that the policy sampled: neither padding nor a tool's output."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).bool()
