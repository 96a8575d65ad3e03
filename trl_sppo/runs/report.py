"""Reports: one page about a run, which needs no network."""

import fnmatch
import io
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from markupsafe import Markup

from ..evaluation.files import Groups, mean_length
from ..evaluation.ladder import climb, draw, stored_players, verdict, which_evaluation_set
from ..evaluation.play import aligned
from ..evaluation.statistics import outcomes_of_scores
from ..files import read_beginning, write_atomically
from ..rows import to_tensor
from .checkpoints import checkpoints_of_run
from .model_card import last_win_rates


TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_SAMPLES = 500  # prompts of which the page shows the completions of both policies

# Metric (* is any name), healthy bounds at the end of a run (as in docs/metrics.md), and the meaning of other values
RULES = (
    ("kl_to_rollout_policy", 0.0, 0.1, "a rollout moves the policy far: lower the learning rate, or take fewer steps"),
    ("log_ratio_to_target", 0.001, 1.0, "near 0: raise the learning rate or lower eta; above 1: lower the rate"),
    ("win_rate/length_correlation", -0.3, 0.3, "win rates follow length: see those at equal length, or add an oracle"),
    ("preferences/tied", 0.0, 0.2, "many pairs are tied and teach nothing: a coarse reward, or duplicates"),
    ("preferences/panel_disagreement", 0.05, 0.4, "near 1/2 the oracles' vote is noise; near 0 one oracle is enough"),
    ("preferences/*/agreement/*", 0.5, 1.0, "the held-out judge agreed by chance only: it no longer saw progress"),
    ("preferences/intransitive", 0.0, 0.1, "many preferences form circles: look at the oracle's order disagreement"),
    ("completions/duplicates", 0.0, 0.1, "many completions of a group are the same: raise the temperature"),
    ("completions/clipped_ratio", 0.0, 0.3, "many completions are cut off at max_completion_length"),
    ("completions/reasoning_unfinished", 0.0, 0.1, "the reasoning of many completions never ends"),
    ("win_rate/unscorable", 0.0, 0.01, "a reward source gives no score for some completions: the log names it"),
    ("win_rate/groups_without_signal", 0.0, 0.2, "many groups have no winner: ties, or prompts too easy or too hard"),
    ("importance_weight", 0.8, 1.1, "vLLM and the trainer disagree about probabilities, so little is learned"),
)


def write_report(run: Path, evaluation_set: str | None = None) -> Path:
    """Write `report.html` into a run's directory. Raises `ValueError` if it has no log or no such evaluation set."""
    history = read_history(run)
    players = stored_players(run, evaluation_set)
    found = which_evaluation_set(run, evaluation_set)
    name, prefix = (None, "eval") if found == "." else (found, f"eval_{found}")
    beginning = read_beginning(str(run))
    rates = {judge: rate for (each, judge), rate in last_win_rates(history).items() if each == name}
    several: dict[str, Any] = {}  # what needs two evaluations
    if len(players) > 1:
        steps = min(players), max(players)
        ladders = climb(players)
        last, first = aligned(players[steps[1]], players[steps[0]])  # the following compares rows
        several = {
            "steps": steps,
            "lengths": [mean_length(groups) for groups in (first, last)],
            "length_plot": _svg(draw_lengths(first, last)) if ladders else None,
            "ladder": _svg(draw(ladders)) if ladders else None,
            "verdicts": {judge: verdict(matrix) for judge, matrix in ladders.items()},
            "samples": samples(first, last),
        }
    # Text of models and datasets is data: it is escaped
    page = Environment(autoescape=True).from_string(TEMPLATE.read_text()).render(
        run=run.resolve().name,
        beginning=beginning,
        config=beginning.pop("config", {}),
        num_steps=max((row.get("step", 0) for row in history), default=0),
        win_rates=rates,
        evaluation_set=name,
        curves=_svg(draw_curves(history, prefix)),
        win_rate_curves=_svg(draw_win_rates(history, prefix, rates)) if rates else None,
        diagnoses=diagnose(history, beginning.get("without_vote") or ()),
        **several,
    )  # fmt: skip
    path = run / "report.html"
    write_atomically(path, page)
    return path


def read_history(run: Path) -> list[dict[str, Any]]:
    """The log of the last run, from its end or its checkpoints. Raises `ValueError` if there is none."""
    states = [path / "trainer_state.json" for path in checkpoints_of_run(str(run)).values()]
    last = run / "trainer_state.json"
    if last.is_file():
        written_at = datetime.fromtimestamp(last.stat().st_mtime, UTC).isoformat()
        if written_at >= read_beginning(str(run)).get("began_at", ""):  # an earlier run's log may lie here
            states.append(last)
    if not states:
        raise ValueError(f"{str(run)!r} has no trainer_state.json. Pass the output directory of a run that saved one.")
    histories = [json.loads(path.read_text())["log_history"] for path in states]
    return max(histories, key=lambda history: max((row.get("step", 0) for row in history), default=0))


def curve(history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric."""
    points = [(row["step"], row[name]) for row in history if row.get(name) is not None and row[name] == row[name]]
    return [step for step, _ in points], [value for _, value in points]


def diagnose(history: list[dict[str, Any]], without_vote: Iterable[str] = ()) -> list[dict[str, Any]]:
    """
    Compare logged metrics with their healthy bounds. First and last are means over the first and last fifth, and of
    agreements the lowest mean over a fifth. Only agreements of a voter with an oracle without a vote count: voters
    may well have different goals.
    """
    found = []
    logged = sorted({name for row in history for name in row})
    logged = [name for name in logged if "/agreement/" not in name or _is_watched(name, set(without_vote))]
    rules = [(name, rule) for rule in RULES for name in fnmatch.filter(logged, rule[0])]
    for name, (_, low, high, problem) in rules:
        values = curve(history, name)[1]
        # With one optimizer step per iteration the policy is measured where it sampled: all log-ratios are 0
        if not values or (name == "log_ratio_to_target" and not any(values)):
            continue
        part = max(1, len(values) // 5)
        first, last = sum(values[:part]) / part, sum(values[-part:]) / part
        if "/agreement/" in name:
            sums = [0.0, *accumulate(values)]
            last = min((end - start) / part for start, end in zip(sums, sums[part:], strict=False))
        healthy = low <= last <= high
        words = f"healthy ({low:g} to {high:g})" if healthy else problem
        found.append({"name": name, "first": first, "last": last, "healthy": healthy, "words": words})
    return found


def _is_watched(name: str, without_vote: set[str]) -> bool:
    """Whether the metric is the agreement of a voter with an oracle that has no vote."""
    first, _, second = name.removeprefix("preferences/").partition("/agreement/")
    return (first in without_vote) != (second in without_vote)


def samples(first: Groups, last: Groups) -> list[dict[str, Any]]:
    """The first completion of each policy for each prompt, with the scores, and the winner under the first source."""
    rows = []
    for before, after in list(zip(first, last, strict=True))[:MOST_SAMPLES]:
        scores = [{name: values[0] for name, values in group.get("scores", {}).items()} for group in (before, after)]
        ours, theirs = (next(iter(each.values()), None) for each in reversed(scores))
        outcome = "unscored"
        if ours is not None and theirs is not None:
            outcome = "won" if ours > theirs else "lost" if ours < theirs else "tied"
        rows.append({
            "prompt": as_text(before["prompt"]),
            "before": as_text(before["completions"][0]),
            "after": as_text(after["completions"][0]),
            "scores": scores,
            "outcome": outcome,
        })  # fmt: skip
    return rows


def as_text(messages: Any) -> str:
    """A prompt or a completion as readable text."""
    if isinstance(messages, str):
        return messages
    texts = [str(message["content"]) for message in messages]
    for i, message in enumerate(messages):
        texts[i] += "".join(f"\n{json.dumps(call)}" for call in message.get("tool_calls") or ())
    if len(messages) == 1:
        return texts[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(messages, texts, strict=True))


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # texts as texts
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])  # matplotlib has escaped the texts in it


def _axes(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A matplotlib figure, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_curves(history: list[dict[str, Any]], prefix: str) -> Any:
    """A matplotlib figure of a training's metrics."""
    panels: list[tuple[str, str, dict[str, str]]] = [
        ("Reward of the rollouts", "mean score", {"reward": "training", f"{prefix}_reward": "evaluation"}),
        ("Log-ratio to the rollout policy", "nats per completion",
         {"winner_log_ratio": "winners", "loser_log_ratio": "losers"}),
        ("Length of completions", "tokens",
         {"completions/winners_mean_length": "winners", "completions/losers_mean_length": "losers"}),
        ("Entropy", "nats per token", {"entropy": "policy"}),
    ]  # fmt: skip
    figure, axes = _axes(2, 2, 11, 6)
    for axis, (title, unit, names) in zip(axes, panels, strict=True):
        for name, label in names.items():
            steps, values = curve(history, name)
            if values:
                axis.plot(steps, values, marker=".", label=label)
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        if axis.lines:
            axis.legend()
    return figure


def draw_win_rates(history: list[dict[str, Any]], prefix: str, judges: Iterable[str]) -> Any:
    """A matplotlib figure of the win rates of the evaluations on one set."""
    figure, axes = _axes(1, 2, 11, 3.8)
    opponents = {"initial": "the initial policy", "previous": "the evaluation before"}
    for axis, (label, opponent) in zip(axes, opponents.items(), strict=True):
        for judge in judges:
            name = f"{prefix}_win_rate_vs_{label}/{judge}"
            steps, values = curve(history, name)
            low, high = (curve(history, f"{name}/{bound}")[1] for bound in ("low", "high"))
            (line,) = axis.plot(steps, values, marker="o", label=judge)
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set(title=f"Win rate against {opponent}", xlabel="optimizer step", ylim=(0, 1))
        axis.legend()
    return figure


def draw_lengths(first: Groups, last: Groups) -> Any:
    """A matplotlib figure: the length of each completion of the last policy, and how often it beats the first."""
    names = [name for name in last[0].get("scores", ()) if name in first[0].get("scores", ())]
    figure, axes = _axes(1, max(len(names), 1), 5.5 * max(len(names), 1), 3.8)
    theirs, lengths = (torch.tensor([group["lengths"] for group in each]).float() for each in (first, last))
    longer = lengths - theirs.mean(dim=1, keepdim=True)
    for axis, name in zip(axes, names, strict=False):
        scores = (to_tensor([group["scores"][name] for group in each]) for each in (last, first))
        won = outcomes_of_scores(*scores).nanmean(dim=2)
        axis.scatter(longer.flatten().tolist(), won.flatten().tolist(), s=12, alpha=0.5)
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set(title=name, xlabel="tokens more than the initial policy's", ylabel="win rate of the completion")
    return figure
