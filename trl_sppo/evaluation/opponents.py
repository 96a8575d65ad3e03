"""Opponents in evaluations during training: the completions of earlier evaluations."""

import math
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Features
from transformers import SchedulerType, TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..errors import RunError
from ..rollouts.files import installed_versions, write_parquet
from ..rows import IMAGES, to_lists
from .files import NO_PROMPT, TAKEN, EvaluationFiles, Groups, group_of, with_json, without_images
from .play import matched, play


logger = logging.get_logger(__name__)


class DefaultMetric(str):
    """The name of a metric chosen here, not by the user."""


def choose_metric(args: Any, judges: Sequence[str], eval_dataset: Any) -> None:
    """Let the first judge's win rate on the first evaluation set select the best policy, instead of the loss."""
    if args.metric_for_best_model != "loss" and not isinstance(args.metric_for_best_model, DefaultMetric):
        return
    prefix = f"eval_{next(iter(eval_dataset))}" if isinstance(eval_dataset, dict) else "eval"
    args.metric_for_best_model = DefaultMetric(f"{prefix}_win_rate_vs_initial/{judges[0]}")
    args.greater_is_better = True
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, "greedy"):
        args.lr_scheduler_kwargs = {"mode": "max", **cast(dict, args.lr_scheduler_kwargs or {})}
    logger.warning(f"metric_for_best_model is {args.metric_for_best_model!s}, by default the first judge's.")


def check_metric(metric: str | None, found: dict[str, float], judges: Sequence[str]) -> None:
    """Raise `RunError` if evaluations do not measure a metric. The first one `found` some, and had no opponent."""
    sets = [name.removesuffix("_loss") for name in found if name.endswith("_loss")]
    opponents = [f"{each}_win_rate_vs_{label}" for each in sets for label in ("initial", "previous")]
    rates = [f"{opponent}/{judge}" for opponent in opponents for judge in (*judges, "opponent_mean_length")]
    name = f"eval_{str(metric).removeprefix('eval_')}"
    if metric is not None and name not in found and not name.startswith(tuple(rates)):
        known = ", ".join([*rates, *sorted(found)])
        raise RunError(f"metric_for_best_model={metric!r} is not measured. Choose one of: {known}.")


class Opponents(TrainerCallback):
    """
    Lets each evaluation play against the stored completions of the first one and of the one before. The trainer calls,
    on all processes: `begin`, `add` for each batch, `finish`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.args = trainer.args
        self.files = EvaluationFiles(self.args.output_dir)
        self.forget()

    def forget(self, checkpoint: str | None = None) -> None:
        """Start from nothing, or from a checkpoint, whose run may have earlier evaluations."""
        self._steps: dict[str, list[int]] = {}  # optimizer steps at which each evaluation set was sampled
        self._memory: dict[tuple[str, int], Groups] = {}  # the first and the last of each evaluation set
        self._groups: Groups = []
        self._elsewhere = None if checkpoint is None else EvaluationFiles(str(Path(checkpoint).parent))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": {name: list(steps) for name, steps in self._steps.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = {name: list(steps) for name, steps in state["steps"].items()}

    @property
    def is_resumed(self) -> bool:
        return self._elsewhere is not None

    def on_epoch_begin(self, args, state, control, **kwargs):
        # The initial policy is the first opponent. A resumed run has evaluated it, or no longer can
        is_first = state.global_step == 0 and not self.is_resumed and not self._steps
        if is_first and args.eval_strategy != IntervalStrategy.NO:
            judges = [*self.trainer.panel.names, *self.trainer.voters.names]
            check_metric(args.metric_for_best_model, self.trainer.evaluate(), judges)

    def begin(self, prefix: str, dataset: Any) -> None:
        """Begin an evaluation, whose metrics have this prefix. Processes may see some prompts of `dataset` twice."""
        self._prefix, self._name = prefix, prefix.removeprefix("eval").removeprefix("_")
        self._num_prompts = len(dataset) if isinstance(dataset, Sized) else None
        self._groups = []

    def add(
        self, rows: Sequence[dict[str, Any]], completions: Sequence[Any], lengths: torch.Tensor, scores: dict
    ) -> None:
        """Add a batch: this process's rows and completions; all processes' lengths and scores, `(groups, K)`."""
        size = lengths.size(1)
        # Images are large, so they are gathered only if there are oracles
        has_oracles = bool(self.trainer.voters.oracles or self.trainer.panel.oracles)
        names = [name for name in rows[0] if has_oracles or name not in IMAGES]
        prompts = gather_object([{name: row[name] for name in names} for row in rows])[::size]
        texts = gather_object(list(completions))
        for g, prompt in enumerate(prompts):
            # Parquet cannot hold an empty struct
            judged = {"scores": {name: to_lists(values[g]) for name, values in scores.items()}} if scores else {}
            self._groups.append(group_of(
                {"prompt": NO_PROMPT, **prompt},
                step=self.trainer.state.global_step,
                completions=texts[g * size : (g + 1) * size],
                lengths=lengths[g].int().tolist(),
                **judged,
                policy=self.trainer.policy_name,
                versions=installed_versions(self.args.use_vllm),
            ))  # fmt: skip

    @property
    def _as_json(self) -> bool:
        """Whether completions are messages of many shapes, which tools and environments bring."""
        return bool(self.trainer.tools or self.trainer.environment_factories)

    def finish(self) -> dict[str, float]:
        """Play against the opponents, keep the completions for the next evaluation, and return metrics."""
        groups, self._groups = self._groups[: self._num_prompts], []
        trainer, step = self.trainer, self.trainer.state.global_step
        steps = self._steps.get(self._name, [])
        earlier = [each for each in steps if each < step]
        metrics: dict[str, float] = {}
        results: dict[int, dict[str, float]] = {}
        if 0 not in earlier and step > 0 and trainer.is_in_train:
            logger.warning_once("there are no win rates against the initial policy, which was not evaluated.")
        for label, opponent in (("initial", 0), ("previous", earlier[-1] if earlier else None)):
            if opponent in earlier:
                if opponent not in results:
                    results[opponent] = self._play(groups, self._get(self._name, opponent))
                metrics |= {f"win_rate_vs_{label}/{name}": value for name, value in results[opponent].items()}
        if trainer.is_in_train:
            self._keep(groups, step, steps)
        metrics = {f"{self._prefix}_{name}": value for name, value in metrics.items()}
        metric = self.args.metric_for_best_model
        is_asked = isinstance(metric, DefaultMetric) and metric.startswith(f"{self._prefix}_win_rate")
        if is_asked and metric not in metrics and trainer.is_in_train and step > 0:
            logger.warning_once(
                f"{metric!s} is not known: the judge has scored nothing, or the initial policy was not evaluated. "
                "This policy is not taken for the best."
            )
            metrics[str(metric)] = math.nan  # without it transformers would end the run
        return metrics

    def _keep(self, groups: Groups, step: int, steps: list[int]) -> None:
        name = self._name
        groups = [without_images(group) for group in groups]
        self._steps[name] = [*(each for each in steps if each < step), step]
        kept = {(name, steps[0] if steps else step)}
        self._memory = {key: value for key, value in self._memory.items() if key[0] != name or key in kept}
        self._memory[name, step] = groups
        if self.args.save_rollouts and self.trainer.is_world_process_zero():
            dataset = self.trainer.eval_dataset
            dataset = dataset.get(name) if isinstance(dataset, dict) else dataset
            features = getattr(dataset, "features", None) or {}
            taken = {column: kind for column, kind in features.items() if column in TAKEN and column not in IMAGES}
            features = Features({column: kind for column, kind in features.items() if column not in TAKEN})
            if taken:
                features["dataset_columns"] = taken
            if self._as_json:
                groups = [*map(with_json, groups)]
            write_parquet(self.files.path(name, step), groups, features)

    def _get(self, name: str, step: int) -> Groups | None:
        if (name, step) not in self._memory:
            found = None
            if self.trainer.is_world_process_zero():
                found = self.files.read(name, step) or (self._elsewhere and self._elsewhere.read(name, step))
            found = broadcast_object_list([found])[0]
            if found is None:
                logger.warning_once(f"{self.files.path(name, step)} is missing: no win rates against that policy.")
                return None
            self._memory[name, step] = found
        return self._memory[name, step]

    def _play(self, groups: Groups, opponents: Groups | None) -> dict[str, float]:
        if opponents is None:
            return {}
        if not matched(groups, opponents)[0]:
            logger.warning_once("this evaluation shares no prompt with the one before: no win rates against it.")
            return {}
        voters = self.trainer.voters  # whose scores the groups have
        results = play(groups, opponents, self.trainer.panel, voters.oracles)
        metrics: dict[str, float] = {}
        for judge, (plain, controlled) in results.items():
            metrics |= {judge: plain.mean, f"{judge}/low": plain.low, f"{judge}/high": plain.high}
            metrics[f"{judge}/length_controlled"] = controlled.mean
        lengths = torch.tensor([group["lengths"] for group in opponents]).float()
        return {**metrics, "opponent_mean_length": lengths.mean().item()}
