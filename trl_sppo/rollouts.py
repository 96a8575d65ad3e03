"""What becomes of a rollout between its scores and its loss: a verdict on its completions, and which rows stay."""

from dataclasses import dataclass
from typing import Any

import torch

from .config import SPPOConfig
from .objectives import select_completions
from .preferences import (
    mean_preferences,
    preferences_from_scores,
    share_of_ties,
    win_rate_spread,
    win_rates,
    win_rates_from_scores,
)


@dataclass
class Verdict:
    """
    What scoring says of a rollout. All processes come to the same one, from gathered scores.

    Args:
        scores (`torch.Tensor` of shape `(completions of all processes, reward sources)`):
            Scores, NaN where a source could not score.
        win_rates (`torch.Tensor` of shape `(groups, K)`):
            Win rate of each completion in its group.
        kept (`torch.Tensor` of bool, of shape `(groups, K)`):
            Whether a completion is trained on.
        tied_pairs (`torch.Tensor`):
            Share of the pairs with equal scores.
        rows (`torch.Tensor` of shape `(rows,)`):
            Rows of this process's rollout to carry on with: those kept, then copies of row 0 as padding. Every process
            has as many, so that all take the same number of forward passes (sharded models need that), and so has each
            slice of the generation batch.
        num_kept (`int`):
            How many of `rows`, the first ones, are trained on.
        num_logps (`int`):
            How many of `rows`, the first ones, need log-probabilities: the most that any process keeps.
    """

    scores: torch.Tensor
    win_rates: torch.Tensor
    kept: torch.Tensor
    tied_pairs: torch.Tensor
    rows: torch.Tensor
    num_kept: int
    num_logps: int

    @classmethod
    def of(
        cls,
        scores: torch.Tensor,
        usable: torch.Tensor,
        group_size: int,
        weights: list[float],
        args: SPPOConfig,
        num_slices: int,
        num_processes: int,
        process_index: int,
    ) -> "Verdict":
        """
        Judge a rollout.

        Args:
            scores (`torch.Tensor` of shape `(completions of all processes, reward sources)`):
                Scores, NaN where a source could not score.
            usable (`torch.Tensor` of bool, of shape `(completions of all processes,)`):
                Whether a completion may be trained on at all.
            group_size (`int`):
                Completions per prompt, K.
            weights (`list[float]`):
                Vote of each reward source.
            args ([`SPPOConfig`]):
                How to compare, and what to train on.
            num_slices (`int`):
                Parts that this process's rows will be split into.
            num_processes, process_index (`int`):
                Of how many processes this is which one.
        """
        sources = scores.T.reshape(scores.size(1), -1, group_size)
        if len(sources) == 1:
            rates = win_rates_from_scores(sources[0], args.comparison, args.bt_temperature, args.include_self)
        else:
            matrices = [preferences_from_scores(source, args.comparison, args.bt_temperature) for source in sources]
            rates = win_rates(mean_preferences(matrices, weights), args.include_self)
        kept = select_completions(rates, args.train_on, args.win_rate_threshold) & usable.view_as(rates)

        by_process = kept.view(num_processes, -1)
        num_logps = max(int(by_process.sum(dim=1).max()), 1)
        num_rows = -(-num_logps // num_slices) * num_slices
        rows = by_process[process_index].nonzero().squeeze(1)
        return cls(
            scores=scores,
            win_rates=rates,
            kept=kept,
            tied_pairs=torch.stack([share_of_ties(source) for source in sources]).nanmean(),
            rows=torch.nn.functional.pad(rows, (0, num_rows - len(rows))),
            num_kept=len(rows),
            num_logps=num_logps,
        )

    def metrics(self, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalar metrics. `lengths`, of shape `(completions of all processes,)`, are in tokens."""
        lengths = lengths.view_as(self.win_rates)
        return {
            "win_rate/spread": win_rate_spread(self.win_rates),
            "win_rate/tied_pairs": self.tied_pairs,
            "win_rate/kept": self.kept.float().mean(),
            "win_rate/unscorable": self.win_rates.isnan().float().mean(),
            "win_rate/groups_without_signal": (~self.kept.any(dim=1)).float().mean(),
            "completions/winners_mean_length": lengths[self.win_rates > 0.5].mean(),
            "completions/losers_mean_length": lengths[self.win_rates < 0.5].mean(),
        }


def take_rows(batch: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The given rows of every tensor of a batch that has rows."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.ndim > 0 else value
        for name, value in batch.items()
    }


def trim_completions(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut the columns that only completions of other rows needed. Prompts stay: their padding gives the positions."""
    longest = max(int(batch["completion_mask"].sum(dim=1).max()), 1)
    names = {"completion_ids", "completion_mask", "tool_mask", "old_per_token_logps"}
    return {name: value[:, :longest] if name in names else value for name, value in batch.items()}


def loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """Completion tokens that the policy sampled: neither padding nor a tool's words."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).bool()
