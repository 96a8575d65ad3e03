"""Targets of a rollout, from preferences to the rows to train on, and metrics of steps."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..config import SPPOConfig
from ..diagnostics import (
    length_correlation,
    panel_disagreement,
    share_intransitive,
    share_of_duplicates,
    share_of_ties,
    share_saturated,
    win_rate_spread,
)
from ..objectives import head_to_head, log_mean_exp_baseline, select_completions
from ..preferences import mean_preferences, mean_win_rates, win_rates


@dataclass
class RolloutTargets:
    """Targets from the preferences about a rollout: the same on all processes, from gathered preferences."""

    panel: list[torch.Tensor]  # of each oracle, (groups, K, K), NaN where it could not compare
    preferences: torch.Tensor  # their weighted mean, (groups, K, K)
    win_rates: torch.Tensor  # (groups, K), as the following three
    regressed: torch.Tensor  # the loss's win rates: those themselves, their hard form, or head-to-head ones
    baseline: torch.Tensor  # stands for log Z / eta
    kept: torch.Tensor  # bool: whether a completion is trained on
    # This process's kept rows, then row 0 as padding. All processes have the same number, since sharded models need
    # the same number of forward passes, and so have all slices of the generation batch
    rows: torch.Tensor
    num_kept: int  # the first of `rows`, which are trained on
    num_logps: int  # the first of `rows`, which get log-probabilities: the most that any process keeps

    @classmethod
    def of(
        cls,
        panel: list[torch.Tensor],
        weights: list[float],
        usable: torch.Tensor,  # bool, (groups, K): whether a completion may be trained on at all
        args: SPPOConfig,
        num_slices: int,  # parts that this process's rows will be split into
        num_processes: int,
        process_index: int,
    ) -> "RolloutTargets":
        preferences = mean_preferences(panel, weights)
        rates = win_rates(preferences, args.include_self)
        if args.comparisons_per_group is not None:  # oracles have compared different pairs
            rates = mean_win_rates(panel, weights, args.include_self)
        chosen = select_completions(rates, args.train_on, args.win_rate_threshold)
        regressed = rates
        if args.loss_type == "sppo_hard":
            regressed = ((torch.sign(rates - 0.5) + 1) / 2).masked_fill(rates.isnan(), torch.nan)  # sign(NaN) is 0
        elif args.loss_type == "sppo_single":
            regressed = head_to_head(preferences, chosen)
        baseline = torch.full_like(rates, 0.5)
        if args.baseline == "log_mean_exp":
            baseline = log_mean_exp_baseline(rates, args.eta).expand_as(rates)
        kept = chosen & usable & ~regressed.isnan()
        if args.loss_type == "inpo":
            kept = kept & in_pairs(preferences, kept).any(dim=2)

        by_process = kept.view(num_processes, -1)
        num_logps = max(int(by_process.sum(dim=1).max()), 1)
        num_rows = -(-num_logps // num_slices) * num_slices
        rows = by_process[process_index].nonzero().squeeze(1)
        return cls(
            panel=panel,
            preferences=preferences,
            win_rates=rates,
            regressed=regressed,
            baseline=baseline,
            kept=kept,
            rows=torch.nn.functional.pad(rows, (0, num_rows - len(rows))),
            num_kept=len(rows),
            num_logps=num_logps,
        )

    def metrics(self, lengths: torch.Tensor, fingerprints: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalar metrics (docs/metrics.md). Lengths and fingerprints of completions have shape `(groups, K)`."""
        return {
            "win_rate/spread": win_rate_spread(self.win_rates),
            "win_rate/kept": self.kept.float().mean(),
            "win_rate/unscorable": self.win_rates.isnan().float().mean(),
            "win_rate/groups_without_signal": (~self.kept.any(dim=1)).float().mean(),
            "win_rate/length_correlation": length_correlation(self.win_rates, lengths),
            "preferences/tied": share_of_ties(self.preferences),
            "preferences/saturated": share_saturated(self.preferences),
            "preferences/intransitive": share_intransitive(self.preferences),
            "preferences/panel_disagreement": panel_disagreement(self.panel),
            "completions/duplicates": share_of_duplicates(fingerprints),
            "completions/winners_mean_length": lengths[self.win_rates > 0.5].mean(),
            "completions/losers_mean_length": lengths[self.win_rates < 0.5].mean(),
        }


def in_pairs(preferences: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Which two different kept completions have a preference: of the shape of `preferences`, `(..., K, K)`."""
    different = ~torch.eye(preferences.size(-1), dtype=torch.bool, device=preferences.device)
    return kept.unsqueeze(-1) & kept.unsqueeze(-2) & different & ~preferences.isnan()


class StepMetrics:
    """Adds up metrics over the micro-batches and processes of an optimizer step."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        # Logged at each optimizer step of an iteration, which an evaluation may interrupt
        self._of_rollout: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
        self._sums: dict[str, torch.Tensor] = {}  # numerators and denominators

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy({"of_rollout": self._of_rollout, "sums": self._sums})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._of_rollout, self._sums = copy.deepcopy((state["of_rollout"], state["sums"]))

    def begin_rollout(self, mode: str) -> None:
        """Forget the metrics of the rollout before, and sums of a step that was interrupted."""
        self._of_rollout[mode], self._sums = {}, {}

    def add_of_rollout(self, mode: str, metrics: dict[str, float]) -> None:
        """Add metrics of the current rollout, the same on all processes."""
        self._of_rollout[mode].update(metrics)

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Add numerators and denominators, of shape `(2,)`, of a micro-batch."""
        for name, sums in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + sums.float()

    def finish(self, mode: str) -> dict[str, float]:
        """The metrics of an optimizer step, over all processes. Metrics without a value are left out."""
        values = dict(self._of_rollout[mode])
        if self._sums:
            sums = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum")
            for name, (numerator, denominator) in zip(self._sums, sums.tolist(), strict=True):
                values[name] = numerator / denominator if denominator else math.nan
            self._sums = {}
        return {name: value for name, value in values.items() if not math.isnan(value)}
