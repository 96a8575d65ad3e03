"""Who judges in a training: reward sources, pairwise oracles, and judges for evaluations only."""

import math
from collections.abc import Callable, Sized
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import SchedulerType
from transformers.utils import logging

from .checks_sources import named_datasets
from .comparisons import SAYS_NOTHING, Answers, PreferenceFunc, ask_oracle, on_own_copies, oracle_name, told_apart
from .config import SPPOConfig
from .diagnostics import order_disagreement
from .faults import RunError, is_of_another_process
from .judges.endpoint import Endpoint
from .prompts import check_prompts
from .readers import policy_reader, reward_readers
from .resumable import ResumableTrainer
from .rewards import MicroBatchedRewardModel, RewardSource, load_reward_models
from .rollouts import preferences_of_sources
from .stored_rollouts import stored_panel


logger = logging.get_logger(__name__)

PATIENCE = 100  # prompts that functions may leave without a score from the start, since they may be of another task
STREAM = 1000  # as many, where nobody knows how many there are, and in which order
CHANCE = 1e-6  # and later as many as come in a row with this probability, by the share of those with a score


class DefaultMetric(str):
    """The name of a metric that nobody has asked for."""


class ScoringTrainer(ResumableTrainer):
    """
    A trainer that asks reward sources and pairwise oracles about completions, and further judges in evaluations.

    Args:
        args ([`SPPOConfig`]):
            Configuration.
        reward_funcs, reward_processing_classes (`list`):
            Reward sources that were checked, and the tokenizers of those that are models.
        preference_funcs (`list`):
            Pairwise oracles.
        judges, judges_processing_classes, eval_preference_funcs (`list`):
            The same for evaluations only.
        conversational (`bool`):
            Whether prompts are lists of messages.
        kwargs:
            Further arguments of [`~trl.GRPOTrainer`].
    """

    model: nn.Module

    _saved = [*ResumableTrainer._saved, "_rollout_metrics", "_silence"]

    def __init__(
        self,
        *,
        args: SPPOConfig,
        reward_funcs: list[RewardSource],
        reward_processing_classes: list,
        preference_funcs: list[PreferenceFunc],
        judges: list[RewardSource],
        judges_processing_classes: list,
        eval_preference_funcs: list[PreferenceFunc],
        conversational: bool,
        **kwargs,
    ):
        self.preference_funcs, self.eval_preference_funcs = preference_funcs, eval_preference_funcs
        self.preference_weights = args.preference_weights or [1.0] * len(preference_funcs)
        # Logged at each optimizer step of an iteration, which an evaluation may interrupt
        self._rollout_metrics: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
        self._warned: set[str] = set()
        # By voter: prompts up to the last one with a score, how many of them have one; prompts and rollouts since
        self._silence: dict[str, tuple[int, int, int, int]] = {}

        sources, processing_classes = load_reward_models(
            [*judges, *reward_funcs],
            [*judges_processing_classes, *reward_processing_classes],
            conversational,
            [name.rstrip("/") for name in args.reward_trust_remote_code or ()],
            cast(Any, args.chat_template_kwargs),
            args.reward_quantization,
            check=lambda sources, tokenizers: self._check_prompts(args, sources, tokenizers, len(judges), kwargs),
        )
        # TRL prepares judges like reward sources. It insists on one, but if there is none there is nothing to log or
        # to warn about
        num_hidden = len(judges)
        if not sources and (preference_funcs or args.rollouts is not None):  # otherwise environments reward
            sources, processing_classes, num_hidden = [_no_reward], [None], 1
        weights = args.reward_weights
        if weights is not None:
            args.reward_weights = [*[0.0] * num_hidden, *weights]
        super().__init__(args=args, reward_funcs=sources, reward_processing_classes=processing_classes, **kwargs)
        args.reward_weights = weights
        self.reward_funcs = [
            MicroBatchedRewardModel(source, args.reward_batch_size)
            if isinstance(source, nn.Module)
            else source
            if isinstance(source, Endpoint)
            else on_own_copies(cast(Callable, source))
            for source in self.reward_funcs
        ]
        rewards = self.reward_func_names[num_hidden:]
        names = [*rewards, *(oracle_name(oracle) for oracle in preference_funcs)]
        self.preference_func_names = told_apart(names)[len(rewards) :]
        # A judge gives way: it must not change the names of what is trained on
        judge_names = [
            *self.reward_func_names[: len(judges)],
            *(oracle_name(oracle) for oracle in eval_preference_funcs),
        ]
        judge_names = told_apart([*names, *judge_names])[len(names) :]
        self.eval_preference_func_names = judge_names[len(judges) :]
        self._judges = {
            "reward_funcs": self.reward_funcs[: len(judges)],
            "reward_processing_classes": self.reward_processing_classes[: len(judges)],
            "reward_func_names": judge_names[: len(judges)],
        }
        for each in (self.reward_funcs, self.reward_func_names, self.reward_processing_classes):
            del cast(list, each)[:num_hidden]
        self.reward_weights = self.reward_weights[num_hidden:]
        self._choose_metric()

    def _choose_metric(self) -> None:
        """Let a win rate say which policy is the best: transformers' default, the loss, says nothing about that."""
        args = self.args
        if args.metric_for_best_model != "loss" and not isinstance(args.metric_for_best_model, DefaultMetric):
            return
        voters = [*self.reward_source_names, *self.preference_func_names]
        names = [*cast(list, self._judges["reward_func_names"]), *self.eval_preference_func_names, *voters]
        prefix = f"eval_{next(iter(self.eval_dataset))}" if isinstance(self.eval_dataset, dict) else "eval"
        args.metric_for_best_model = DefaultMetric(f"{prefix}_win_rate_vs_initial/{names[0]}")
        args.greater_is_better = True
        if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, "greedy"):
            args.lr_scheduler_kwargs = {"mode": "max", **cast(dict, args.lr_scheduler_kwargs or {})}
        logger.warning(f"metric_for_best_model is {args.metric_for_best_model!s}, by default the first judge's.")

    def _check_prompts(self, args: SPPOConfig, sources: list, tokenizers: list, num_judges: int, kwargs: dict) -> None:
        """Through the templates of the policy and of reward models, of which none is loaded yet."""
        self._readers = reward_readers(args, sources, tokenizers, num_judges)
        if kwargs.get("rollout_func") is None:  # which renders prompts itself, and samples what it likes
            policy = policy_reader(args, kwargs["model"], kwargs["processing_class"], kwargs.get("tools"))
            self._readers.insert(0, policy)
        if kwargs.get("environment_factory") is None:  # environments may bring or change the prompts
            check_prompts(self._readers, named_datasets(kwargs["train_dataset"], kwargs["eval_dataset"]))

    @property
    def reward_source_names(self) -> list[str]:
        """TRL's names of the reward sources, told apart."""
        return told_apart(self.reward_func_names)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def describe(self) -> dict[str, Any]:
        voters = [
            *zip(self.reward_source_names, self.reward_weights.tolist(), strict=True),
            *zip(self.preference_func_names, self.preference_weights, strict=True),
        ]
        return {
            **super().describe(),
            "reward_sources": self.reward_source_names,
            "preference_funcs": self.preference_func_names,
            "without_vote": [name for name, weight in voters if weight == 0],
            "judges": [*cast(list, self._judges["reward_func_names"]), *self.eval_preference_func_names],
        }

    def _ask_judges(self, inputs, prompts, completions, completion_ids, group_size: int) -> dict[str, torch.Tensor]:
        """Scores by those that are there for evaluations only, of shape `(groups, K)`."""
        own = {name: getattr(self, name) for name in self._judges}
        vars(self).update(self._judges)
        try:
            scores = self._calculate_rewards(inputs, prompts, completions, completion_ids)
            names = self.reward_func_names
        finally:
            vars(self).update(own)
        for name, column in zip(names, scores.T, strict=True):
            if not column.isnan().all():
                self._metrics["eval"][f"rewards/{name}/mean"].append(column.nanmean().item())
        return {name: column.reshape(-1, group_size) for name, column in zip(names, scores.T, strict=True)}

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        dataset = dataloader.dataset
        self._opponents.begin(
            metric_key_prefix.removeprefix("eval").removeprefix("_"),
            len(dataset) if isinstance(dataset, Sized) else None,
        )
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        results = self._opponents.finish()
        metrics = cast(dict, output.metrics)
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in results.items()})
        metric = self.args.metric_for_best_model
        is_asked = isinstance(metric, DefaultMetric) and metric.startswith(f"{metric_key_prefix}_win_rate")
        if is_asked and metric not in metrics and self.is_in_train and self.state.global_step > 0:
            logger.warning_once(
                f"{metric!s} is not known: the judge has scored nothing, or there is no evaluation of the initial "
                "policy. This policy is not taken for the best."
            )
            metrics[str(metric)] = math.nan  # better than nothing: transformers would end the run
        return output

    def _stored_panel(self, ended: torch.Tensor) -> tuple[list[torch.Tensor], list[float]]:
        """The votes that rollouts bring with them."""
        panel, scores = stored_panel(self._recorder.groups, ended.size(1))
        if scores is not None:
            return preferences_of_sources(scores.to(ended.device), [1.0] * len(scores), ended, self.args)
        return [preferences.to(ended.device) for preferences in panel], [1.0] * len(panel)

    def _ask_oracles(self, inputs, prompts, completions, group_size: int) -> dict[str, Answers]:
        """What each pairwise oracle says, in the groups of all processes."""
        if not self.preference_funcs:
            return {}
        prompts, completions, inputs = gather_object(prompts), gather_object(completions), gather_object(inputs)
        found = {}
        recalled = self.model.training and self._recorder.is_scored
        for i, (oracle, name) in enumerate(zip(self.preference_funcs, self.preference_func_names, strict=True)):
            answers = ask_oracle(
                oracle,
                prompts,
                completions,
                {name: [row[name] for row in inputs] for name in inputs[0]},
                group_size=group_size,
                both_orders=self.args.both_orders,
                batch_size=self.args.preference_batch_size,
                accelerator=self.accelerator,
                log_metric=self._log_metric,
                disable_tqdm=bool(self.args.disable_tqdm),
                known=self._recorder.answers(name) if recalled else None,
            )
            self._check_answers(answers, i)
            metrics = self._rollout_metrics[self._mode]
            if answers.num_asked:
                metrics[f"preferences/{name}/lost"] = answers.num_lost / answers.num_asked
            metrics[f"preferences/{name}/order_disagreement"] = order_disagreement(answers.matrix).item()
            found[name] = answers
        return found

    def _check_answers(self, answers: Answers, i: int) -> None:
        """Say once that comparisons are lost. Stop if an oracle with a vote stays silent for too long."""
        name = self.preference_func_names[i]
        known = (~answers.matrix.isnan()).flatten(1).any(dim=1)
        asked = (~answers.same).flatten(1).any(dim=1)  # not about groups of identical completions
        if self.model.training and self.preference_weights[i] > 0:
            may_pass = answers.problem == SAYS_NOTHING and not isinstance(self.preference_funcs[i], Endpoint)
            votes = [*self.reward_weights.tolist(), *self.preference_weights]
            alone = sum(weight > 0 for weight in votes) == 1
            num_silent = self._silent_prompts(f"oracle {i}", known[asked], may_pass, alone)
            if num_silent:
                raise RunError(
                    f"preference_func {name!r} gave no usable answer to any comparison of the last {num_silent} "
                    f"prompts: {answers.problem}. It must return one probability in [0, 1] for each comparison (None "
                    "where it cannot say)."
                )
        if answers.num_lost and name not in self._warned:
            self._warned.add(name)
            logger.warning(
                f"preference_func {name!r}: {answers.num_lost} of {answers.num_asked} comparisons are lost, since "
                f"{answers.problem}. They take no part in the win rates. Said once for each oracle; the metric "
                f"preferences/{name}/lost goes on counting."
            )

    def _silent_prompts(self, voter: str, scored: torch.Tensor, may_pass: bool, alone: bool = True) -> int:
        """
        Count the prompts in a row of which a voter has said nothing.

        Args:
            voter (`str`):
                Its key.
            scored (`torch.Tensor` of bool, of shape `(P,)`):
                Of which prompts of this rollout it has said something.
            may_pass (`bool`):
                Whether it may say nothing of some prompts, as functions do that return `None` for other tasks.
            alone (`bool`, *optional*, defaults to `True`):
                Whether nothing is learned while it is silent. If others vote, it is given an epoch.

        Returns:
            `int`: their number if it is too large, else 0. A voter that may pass is given the time that its kind of
            prompts may take to come, by their share so far. Any other is given three rollouts, and none at the start.
        """
        seen, num_scored, prompts, rollouts = self._silence.get(voter, (0, 0, 0, 0))
        if scored.any() or len(scored) == 0:
            self._silence[voter] = seen + prompts + len(scored), num_scored + int(scored.sum()), 0, 0
            return 0
        prompts, rollouts = prompts + len(scored), rollouts + 1
        self._silence[voter] = seen, num_scored, prompts, rollouts
        is_stream = not isinstance(self.train_dataset, Sized)
        length = STREAM if is_stream else len(cast(Sized, self.train_dataset))
        if not may_pass:
            limit = 0.0
        elif is_stream or not self.shuffle_dataset:  # its kind of prompts may come last
            limit = length
        elif num_scored == 0:
            limit = min(PATIENCE, length) if alone else length
        else:
            limit = math.log(CHANCE) / math.log1p(-num_scored / (seen + 1))
        return prompts if prompts >= limit and (num_scored == 0 or rollouts >= 3) else 0

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        if not self.reward_funcs:  # TRL would complain of each completion without a score
            return torch.zeros(len(prompts) * self.accelerator.num_processes, 0, device=self.accelerator.device)
        try:
            scores = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except Exception as error:  # whatever it is, the completions are not lost
            if isinstance(error, torch.OutOfMemoryError) or is_of_another_process(error):
                raise
            names = ", ".join(map(repr, self.reward_func_names))
            form = "a text" if isinstance(completions[0], str) else "a list of messages"
            raise RunError(
                f"reward source {names} failed: {type(error).__name__}: {str(error).rstrip('.')}. It must return one "
                f"number for each of its completions, None where it cannot say; to these prompts each is {form}."
                + " What was sampled is kept: a resumed run scores it without sampling again."
                * self._recorder.recalls
            ) from error
        for name, column in zip(self.reward_func_names, scores.T, strict=True):
            unscorable = (~column.isfinite()).sum().item()
            if unscorable and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    f"reward source {name!r} gave no finite score (None, NaN or infinite) for {unscorable} of "
                    f"{len(column)} completions: they take no part in its comparisons. Said once for each source; the "
                    "metric win_rate/unscorable goes on counting the completions that no source could score."
                )
        return scores.masked_fill(~scores.isfinite(), torch.nan)

    def _check_scores(self, scores: torch.Tensor) -> None:
        """Stop if no reward source with a vote has scored a completion of this training for too long."""
        if not self.reward_funcs or self.preference_funcs:
            return
        voters = self.reward_weights.to(scores.device) > 0
        scored = ~scores[:, voters].isnan()
        prompts = scored.any(dim=1).view(-1, cast(int, self.num_generations)).any(dim=1)
        is_model = [
            isinstance(source, (nn.Module, Endpoint))
            for source, weight in zip(self.reward_funcs, self.reward_weights.tolist(), strict=True)
            if weight > 0
        ]
        num_silent = self._silent_prompts("reward sources", prompts, may_pass=not any(is_model))
        if num_silent:
            names = ", ".join(map(repr, self.reward_func_names))
            raise RunError(
                f"reward source {names} gave no finite score (None, NaN or infinite) for any completion of the last "
                f"{num_silent} prompts: there is nothing to compare. It must return one number for each of its "
                "completions, None only where it cannot say."
            )


def _no_reward(completions: list, **kwargs) -> list[float | None]:
    return [None] * len(completions)
