"""Win rates of one policy against another, on the prompts for which both have completions."""

from typing import Any

import torch
from transformers.utils import logging

from ..oracles.asking import PreferenceFunc, ask_oracle
from ..oracles.panel import Panel
from ..rows import IMAGES, key_of, to_lists, to_tensor
from .files import Groups, row_of
from .statistics import WinRate, length_controlled_win_rate, outcomes_of_scores, win_rate


logger = logging.get_logger(__name__)


def score_groups(panel: Panel, groups: Groups) -> None:
    """Give `"scores"` to groups, by each reward source of a panel: nested lists `{name: [S of them]}`."""
    for group in groups:
        group.pop("scores", None)
    if not panel.sources.names:
        return
    rows = [row for group in groups for row in [row_of(group)] * len(group["completions"])]
    scores = panel.sources.score(
        [row["prompt"] for row in rows],
        [completion for group in groups for completion in group["completions"]],
        {column: [row.get(column) for row in rows] for column in rows[0]},
        disable_tqdm=panel.disable_tqdm,
    )
    sizes = [len(group["completions"]) for group in groups]
    for group, part in zip(groups, scores.split(sizes), strict=True):
        group["scores"] = dict(zip(panel.sources.names, to_lists(part.T), strict=True))


def aligned(groups: Groups, opponents: Groups) -> tuple[Groups, Groups]:
    """The result of `matched`. Raises `ValueError` if it is empty, and logs its size if rows are left out."""
    ours, theirs = matched(groups, opponents)
    if not ours:
        raise ValueError("the two policies have completions of no common prompt, so they cannot be compared.")
    if len(ours) < max(len(groups), len(opponents)):
        logger.warning(f"the two policies are compared on the {len(ours)} prompts for which both have completions.")
    return ours, theirs


def matched(groups: Groups, opponents: Groups) -> tuple[Groups, Groups]:
    """Rows of two policies with the same prompt, one to one. Rows whose other columns are equal too come first."""
    waiting: dict[str, Groups] = {}
    for group in opponents:
        waiting.setdefault(key_of(group["prompt"]), []).append(group)
    found: dict[int, dict[str, Any]] = {}
    for strictly in (True, False):
        for i, group in enumerate(groups):
            rivals = waiting.get(key_of(group["prompt"]), []) if i not in found else []
            place = next((k for k, each in enumerate(rivals) if not strictly or _same_columns(group, each)), None)
            if place is not None:
                found[i] = rivals.pop(place)
    return [groups[i] for i in sorted(found)], [found[i] for i in sorted(found)]


def _same_columns(group: dict[str, Any], other: dict[str, Any]) -> bool:
    ours, theirs = row_of(group), row_of(other)
    return all(
        key_of(ours[name]) == key_of(theirs[name]) for name in ours.keys() & theirs.keys() - {"prompt", *IMAGES}
    )


def play(
    groups: Groups, opponents: Groups, panel: Panel | None = None, voters: dict[str, PreferenceFunc] | None = None
) -> dict[str, tuple[WinRate, WinRate]]:
    """Win rate and length-controlled win rate by judge: sources that scored both sides, and oracles."""
    groups, opponents = aligned(groups, opponents)
    ours, theirs = (torch.tensor([group["lengths"] for group in each]).float() for each in (groups, opponents))
    outcomes = {}
    for name in groups[0].get("scores", ()):
        if name in opponents[0].get("scores", ()):
            scores = (to_tensor([group["scores"][name] for group in each]) for each in (groups, opponents))
            outcomes[name] = outcomes_of_scores(*scores)
    size = len(groups[0]["completions"])
    total = size + len(opponents[0]["completions"])
    rows = [row_of(group) for group in groups]
    oracles = {**(voters or {}), **panel.oracles} if panel is not None else {}
    for name, oracle in oracles.items():
        assert panel is not None  # for mypy
        verdicts = ask_oracle(
            oracle,
            [group["prompt"] for group in groups for _ in range(total)],
            [text for pair in zip(groups, opponents, strict=True) for group in pair for text in group["completions"]],
            {column: [row[column] for row in rows for _ in range(total)] for column in rows[0]},
            group_size=total,
            first_side=size,
            both_orders=panel.both_orders,
            batch_size=panel.batch_size,
            accelerator=panel.accelerator,
            log_metric=panel.log_metric,
            disable_tqdm=panel.disable_tqdm,
        )
        if verdicts.num_lost:
            logger.warning(
                f"preference_func {name!r}: {verdicts.num_lost} of {verdicts.num_asked} comparisons of two policies "
                f"are lost, since {verdicts.problem}. They take no part in the win rate."
            )
        if verdicts.num_lost < verdicts.num_asked or not verdicts.num_asked:
            outcomes[name] = verdicts.preferences[:, :size, size:]
    return {
        name: (win_rate(outcome), length_controlled_win_rate(outcome, ours, theirs))
        for name, outcome in outcomes.items()
        if not outcome.isnan().all()
    }
