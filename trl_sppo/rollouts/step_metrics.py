"""Metrics of optimizer steps: of their rollout, and sums over their micro-batches."""

import copy
import math
from typing import Any

import torch


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
        state = copy.deepcopy(state)
        self._of_rollout, self._sums = state["of_rollout"], state["sums"]

    def begin_rollout(self, mode: str) -> None:
        """Forget the metrics of the rollout before, and sums of a step that was interrupted."""
        self._of_rollout[mode], self._sums = {}, {}

    def add_of_rollout(self, mode: str, metrics: dict[str, float]) -> None:
        """Add metrics of the rollout at hand, the same on all processes."""
        self._of_rollout[mode].update(metrics)

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Add numerators and denominators, of shape `(2,)`, of a micro-batch."""
        for name, sums in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + sums.float()

    def finish(self, mode: str) -> dict[str, float]:
        """The metrics of an optimizer step, over all processes. What could not be measured is left out."""
        values = dict(self._of_rollout[mode])
        if self._sums:
            sums = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum")
            for name, (numerator, denominator) in zip(self._sums, sums.tolist(), strict=True):
                values[name] = numerator / denominator if denominator else math.nan
            self._sums = {}
        return {name: value for name, value in values.items() if not math.isnan(value)}
