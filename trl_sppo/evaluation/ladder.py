"""Ladders: the policies of a run against each other."""

from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import Any

from ..oracles.panel import Panel
from .files import EvaluationFiles, Groups
from .play import play, score_groups
from .statistics import WinRate


# matrix[a][b]: win rate of a against b
Matrix = dict[str, dict[str, WinRate]]


def climb(players: dict[int, Groups], panel: Panel | None = None) -> dict[str, Matrix]:
    """Win rates between policies, as a matrix by step for each judge. Without a panel, stored scores count."""
    if panel is not None:
        for groups in players.values():
            score_groups(panel, groups)
    ladders: dict[str, Matrix] = {}
    for a, b in combinations(sorted(players), 2):
        pair = players[b], players[a]
        results = play(*pair, panel)
        for judge, (rate, _) in results.items():
            matrix = ladders.setdefault(judge, {str(step): {} for step in sorted(players)})
            matrix[str(b)][str(a)] = rate
            matrix[str(a)][str(b)] = WinRate(1 - rate.mean, 1 - rate.high, 1 - rate.low, rate.num_prompts)
    # A judge may not have scored all policies. Its ladder leaves out policies without all comparisons
    return {
        judge: {a: row for a, row in matrix.items() if row and len(row) == max(map(len, matrix.values()))}
        for judge, matrix in ladders.items()
    }


def which_evaluation_set(run: Path, evaluation_set: str | None) -> str:
    """The requested evaluation set, or the first; `"."` if there is only one. Raises `ValueError` if it is unknown."""
    names = EvaluationFiles(str(run)).names()
    if evaluation_set is not None and evaluation_set not in names:
        raise ValueError(f"evaluation_set={evaluation_set!r} is unknown. This run has {names}.")
    return evaluation_set or (names[0] if names else ".")


def stored_players(run: Path, evaluation_set: str | None = None) -> dict[int, Groups]:
    """The evaluations of a run by step. Raises `ValueError` for an unknown evaluation set."""
    files = EvaluationFiles(str(run))
    name = which_evaluation_set(run, evaluation_set)
    return {step: groups for step in files.steps(name) if (groups := files.read(name, step))}


def verdict(matrix: Matrix) -> list[str]:
    """Describe a matrix of win rates in words."""
    steps = sorted(matrix, key=int)
    lines = []
    pairs = [*pairwise(steps), (steps[0], steps[-1])]
    for earlier, later in dict.fromkeys(pairs):
        rate = matrix[later][earlier]
        word = "beats" if rate.low > 0.5 else "loses to" if rate.high < 0.5 else "cannot be distinguished from"
        lines.append(f"step {later} {word} step {earlier}: {rate}")
    circles = [
        f"circle: step {a} beats {b}, {b} beats {c}, {c} beats {a}"
        for a, b, c in permutations(steps, 3)
        if a == min(a, b, c, key=int) and all(matrix[x][y].low > 0.5 for x, y in ((a, b), (b, c), (c, a)))
    ]
    return [*lines, *(circles or ["no circles beyond the noise"])]


def draw(ladders: dict[str, Matrix]) -> Any:
    """A matplotlib figure with a matrix for each judge."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(ladders), 4), layout="constrained")
    axes = figure.subplots(1, len(ladders), squeeze=False)[0]
    for axis, (judge, matrix) in zip(axes, ladders.items(), strict=True):
        steps = sorted(matrix, key=int)
        values = [[0.5 if a == b else matrix[a][b].mean for b in steps] for a in steps]
        image = axis.imshow(values, cmap="RdBu", vmin=0, vmax=1)
        axis.set(title=f"{judge}", xlabel="opponent: step", ylabel="policy: step")
        axis.set_xticks(range(len(steps)), steps)
        axis.set_yticks(range(len(steps)), steps)
        if len(steps) <= 12:
            for i, j in permutations(range(len(steps)), 2):
                value = values[i][j]
                colour = "white" if abs(value - 0.5) > 0.3 else "black"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=list(axes), label="win rate of the row against the column", shrink=0.8)
    return figure
