"""The voters of a training: reward sources and pairwise oracles whose preferences are trained on."""

import copy
import math
from collections.abc import Callable, Sequence, Sized
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers.utils import logging

from ..config import SPPOConfig
from ..diagnostics import order_disagreement
from ..errors import RunError
from ..preferences import preferences_from_scores, sum_of_scores
from .asking import SAYS_NOTHING, PreferenceFunc, VerdictLog, Verdicts, ask_oracle
from .endpoint import Endpoint, usage_of
from .scoring import RewardSources


logger = logging.get_logger(__name__)

PATIENCE = 100  # prompts that functions may leave without a score from the start: they may be of another task
STREAM = 1000  # the same, if the number and the order of the prompts are unknown
CHANCE = 1e-6  # later: as many as come in a row with this probability, given the share of prompts with a score


class Voters:
    """Reward sources and pairwise oracles, with their weights."""

    def __init__(
        self,
        args: SPPOConfig,
        sources: RewardSources,
        weights: torch.Tensor,  # of the sources. Callbacks may change them
        oracles: dict[str, PreferenceFunc],
        accelerator: Any,
        train_dataset: Any = None,  # its size bounds how long a voter may be silent
    ):
        self.args = args
        self.sources = sources
        self._source_weights = torch.as_tensor(weights)
        self.oracles = oracles
        self.oracle_weights = args.preference_weights or [1.0] * len(oracles)
        self.accelerator = accelerator
        self._num_prompts = len(train_dataset) if isinstance(train_dataset, Sized) else None
        # By voter: prompts up to the last one with a score, how many of them have one; prompts and rollouts since
        self._silence: dict[str, tuple[int, int, int, int]] = {}
        self._warned: set[str] = set()
        self.usage: dict[str, dict[str, float]] = {}  # of oracles that count it: requests, tokens and cost

    @property
    def names(self) -> list[str]:
        return [*self.sources.names, *self.oracles]

    @property
    def source_weights(self) -> list[float]:
        return self._source_weights.tolist()

    @property
    def weights(self) -> list[float]:
        return [*self.source_weights, *self.oracle_weights]

    def state_dict(self) -> dict[str, Any]:
        return {"silence": dict(self._silence), "usage": copy.deepcopy(self.usage)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._silence, self.usage = dict(state["silence"]), copy.deepcopy(state.get("usage", {}))

    def describe(self) -> dict[str, Any]:
        """The voters, for the model card and the rollout files."""
        without_vote = [name for name, weight in zip(self.names, self.weights, strict=True) if weight == 0]
        oracles = list(self.oracles)
        return {"reward_sources": self.sources.names, "preference_funcs": oracles, "without_vote": without_vote}

    def compare(
        self,
        prompts: list,  # of all processes, by groups, like completions and columns
        completions: list,
        columns: dict[str, list],
        group_size: int,
        log_metric: Callable[[str, float], None],
        known: Callable[[str], torch.Tensor] | None = None,  # by name: the matrix of stored verdicts, see ask_oracle
        log: Callable[[int], VerdictLog | None] | None = None,  # in training: by the oracle's number
    ) -> tuple[dict[str, Verdicts], dict[str, float]]:
        """Verdicts of the pairwise oracles by name, the same on all processes; and metrics."""
        found: dict[str, Verdicts] = {}
        metrics: dict[str, float] = {}
        for number, (name, oracle) in enumerate(self.oracles.items()):
            before = usage_of(oracle)
            verdicts = ask_oracle(
                oracle,
                prompts,
                completions,
                columns,
                group_size=group_size,
                both_orders=self.args.both_orders,
                batch_size=self.args.preference_batch_size,
                accelerator=self.accelerator,
                log_metric=log_metric,
                disable_tqdm=bool(self.args.disable_tqdm),
                known=None if known is None else known(name),
                per_group=None if getattr(oracle, "orders_groups", False) else self.args.comparisons_per_group,
                log=None if log is None else log(number),
            )
            if log is not None:  # in training
                metrics |= self._count_usage(name, before, usage_of(oracle))
            if verdicts.num_asked:
                metrics[f"preferences/{name}/lost"] = verdicts.num_lost / verdicts.num_asked
            metrics[f"preferences/{name}/order_disagreement"] = order_disagreement(verdicts.matrix).item()
            if verdicts.num_lost and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    f"preference_func {name!r}: {verdicts.num_lost} of {verdicts.num_asked} comparisons are lost, "
                    f"since {verdicts.problem}. They take no part in the win rates. Shown once per oracle; the metric "
                    f"preferences/{name}/lost counts them."
                )
            found[name] = verdicts
        return found, metrics

    def _count_usage(self, name: str, before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
        """Metrics of what a judge has used, in this rollout and in all of the training, over all processes."""
        used: dict[str, float] = {}
        for of_process in gather_object([{key: value - before.get(key, 0.0) for key, value in now.items()}]):
            for key, value in of_process.items():
                used[key] = used.get(key, 0.0) + value
        total = self.usage.setdefault(name, {})
        for key, value in used.items():
            total[key] = total.get(key, 0.0) + value
        of_rollout = {f"preferences/{name}/{key}": value for key, value in used.items()}
        return of_rollout | {f"preferences/{name}/{key}_total": value for key, value in total.items()}

    @property
    def tokens_used(self) -> float:
        """Tokens that judges behind endpoints have read and written, in this run."""
        return sum(used.get(key, 0.0) for used in self.usage.values() for key in ("input_tokens", "output_tokens"))

    def check_silence(self, scores: torch.Tensor, verdicts: dict[str, Verdicts], group_size: int) -> None:
        """Raise `RunError` if a voter has given no score or verdict for too many prompts."""
        voting = [i for i, weight in enumerate(self.source_weights) if weight > 0]
        if self.sources.names and not self.oracles:
            prompts = (~scores[:, voting].isnan()).any(dim=1).view(-1, group_size).any(dim=1)
            is_model = any(isinstance(self.sources.sources[i], (nn.Module, Endpoint)) for i in voting)
            num_silent = self.silent_prompts("reward sources", prompts, may_pass=not is_model)
            if num_silent:
                names = ", ".join(repr(self.sources.names[i]) for i in voting)
                raise RunError(
                    f"reward source {names} gave no finite score (None, NaN or infinite) for any completion of the "
                    f"last {num_silent} prompts. It must return one number for each completion that it can score."
                )
        alone = sum(weight > 0 for weight in self.weights) == 1
        for (name, oracle), weight in zip(self.oracles.items(), self.oracle_weights, strict=True):
            said = verdicts[name]
            known = (~said.matrix.isnan()).flatten(1).any(dim=1)
            asked = said.questions[:, 0].unique()  # groups of identical completions are not compared
            may_pass = said.problem == SAYS_NOTHING and not isinstance(oracle, Endpoint)
            num_silent = self.silent_prompts(name, known[asked], may_pass, alone) if weight > 0 else 0
            if num_silent:
                raise RunError(
                    f"preference_func {name!r} gave no valid verdict on any comparison of the last {num_silent} "
                    f"prompts: {said.problem}. It must return one probability in [0, 1] for each."
                )

    def silent_prompts(self, voter: str, scored: torch.Tensor, may_pass: bool, alone: bool = True) -> int:
        """
        The number of prompts in a row without a score or verdict of a voter if it is too large, else 0. A voter that
        may skip prompts has the time that its prompts may take to come; others three rollouts, and none at the start.
        """
        seen, num_scored, prompts, rollouts = self._silence.get(voter, (0, 0, 0, 0))
        if scored.any() or len(scored) == 0:
            self._silence[voter] = seen + prompts + len(scored), num_scored + int(scored.sum()), 0, 0
            return 0
        prompts, rollouts = prompts + len(scored), rollouts + 1
        self._silence[voter] = seen, num_scored, prompts, rollouts
        length = STREAM if self._num_prompts is None else self._num_prompts
        if not may_pass:
            limit = 0.0
        elif self._num_prompts is None or not self.args.shuffle_dataset:  # its kind of prompts may come last
            limit = length
        elif num_scored == 0:
            limit = min(PATIENCE, length) if alone else length
        else:
            limit = math.log(CHANCE) / math.log1p(-num_scored / (seen + 1))
        return prompts if prompts >= limit and (num_scored == 0 or rollouts >= 3) else 0

    @property
    def panel_names(self) -> list[str]:
        """Names of the votes of `panel`. Rewards that are added up are one vote, `reward`."""
        names = list(self.sources.names)
        if self.args.reward_aggregation == "sum" and names:
            without_vote = self.describe()["without_vote"]
            names = ["reward", *(name for name in names if name in without_vote)]
        return [*names, *self.oracles]

    def panel(
        self, scores: torch.Tensor, verdicts: dict[str, Verdicts], ended: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[float]]:
        """The votes: preference matrices of shape `(groups, K, K)`, and their weights."""
        votes, weights = preferences_of_sources(scores, self.source_weights, ended, self.args)
        votes += [verdict.preferences.to(scores.device) for verdict in verdicts.values()]
        return votes, [*weights, *self.oracle_weights]


def preferences_of_sources(
    scores: torch.Tensor, weights: Sequence[float], ended: torch.Tensor, args: SPPOConfig
) -> tuple[list[torch.Tensor], list[float]]:
    """The votes of the reward sources, as in `Voters.panel`."""
    weights = list(weights)
    if args.reward_aggregation == "sum" and len(scores) > 0:
        watching = [k for k, weight in enumerate(weights) if weight == 0]  # logged and compared, without a vote
        total = sum_of_scores(scores, weights).unsqueeze(0)
        scores, weights = torch.cat([total, scores[watching]]), [sum(weights), *[0.0] * len(watching)]
    if args.missing_eos_penalty is not None:
        scores = scores - args.missing_eos_penalty * ~ended
    return [preferences_from_scores(source, args.comparison, args.bt_temperature) for source in scores], weights
