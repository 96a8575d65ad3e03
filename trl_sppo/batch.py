"""Rollouts in memory, between generation and loss."""

from dataclasses import dataclass
from typing import Any

import torch

from .targets import RolloutTargets


# What the forward pass of a model with images needs besides tokens
IMAGE_FIELDS = (
    "pixel_values", "image_grid_thw", "num_images", "num_tiles", "pixel_attention_mask", "spatial_shapes",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


@dataclass
class Rollout:
    """
    A generation batch, between its prompts and TRL's batch of tensors.

    Args:
        inputs (`list[dict]`):
            This process's rows of the dataset, one for each completion.
        iteration (`int`, *optional*):
            Number of the iteration. `None` in an evaluation.
        only_sampled (`bool`, *optional*, defaults to `False`):
            Whether it is written down and not trained on: then all completions get log-probabilities.
        scores (`torch.Tensor` of shape `(completions of all processes, sources)`, *optional*):
            By the reward sources, once they are asked.
        targets ([`RolloutTargets`], *optional*):
            What the completions are regressed to, once all are asked.
    """

    inputs: list[dict[str, Any]]
    iteration: int | None
    only_sampled: bool = False
    scores: torch.Tensor | None = None
    targets: RolloutTargets | None = None

    def rows_with_logps(self, num_rows: int) -> torch.Tensor:
        """Of this process's rows, those that need log-probabilities under the policy that sampled them."""
        assert self.targets is not None
        if self.only_sampled:
            return torch.arange(num_rows, device=self.targets.rows.device)
        return self.targets.rows[: self.targets.num_logps]


def take_rows(batch: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The given rows of every tensor of a batch that has rows."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.ndim > 0 else value
        for name, value in batch.items()
    }


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with all its tensors on a device."""
    return {
        name: value.to(device, non_blocking=device.type == "cuda") if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def pin(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch in CPU memory, made ready for being copied to a GPU while that computes."""
    if device.type != "cuda":
        return batch
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def trim_completions(batch: dict[str, Any], longest: int) -> dict[str, Any]:
    """Cut the columns that only completions of other rows needed. Prompts stay: their padding gives the positions."""
    names = {"completion_ids", "completion_mask", "tool_mask", "old_per_token_logps", "ref_per_token_logps"}
    return {name: value[:, :longest] if name in names else value for name, value in batch.items()}


def loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """Completion tokens that the policy sampled: neither padding nor a tool's words."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).bool()


def count_kept(slices: list[dict[str, Any]], per_step: int, accelerator: Any) -> list[torch.Tensor]:
    """Of each optimizer step, the completions of all processes that are trained on, from this process's slices."""
    counts = torch.stack([each["kept"].sum() for each in slices]).view(-1, per_step).sum(dim=1)
    return list(accelerator.reduce(counts.to(accelerator.device), reduction="sum").clamp(min=1).cpu())
