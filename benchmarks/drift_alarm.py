"""Does the agreement of a reward model with other judges warn of over-optimisation? A replay of stored rollouts.

    python benchmarks/overoptimization.py     # once: the trainings, and their rollouts
    python benchmarks/drift_alarm.py

Scores the rollouts of each training with all judges, and computes `preferences/<oracle>/agreement/<other>` of the
reward model that was trained on with judges that were not. Two questions, with thresholds that are chosen on some
seeds and tested on the others. Does an alarm tell a wrong reward model from a right one: is there one before the gold
model turns against the policy of the proxy, and none for the policy of the gold model? And does it tell a reward model
alone from one in a panel: is there one in the runs with one voter, and none in those with two?
"""

import argparse
import json
import math
from functools import cache
from itertools import product
from statistics import fmean
from typing import Any

import torch
from overoptimization import ARMS, FOLDER, GOLD, PROXIES, QUICKSTART, evaluations, folder_of
from pyarrow.parquet import read_table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_sppo.diagnostics import agreement
from trl_sppo.files import write_atomically
from trl_sppo.preferences import preferences_from_scores
from trl_sppo.quickstart.scores import on_topic, relevance, vader


STEPS_PER_ITERATION = 2
WATCHERS = ("proxy_b", "vader", "relevance")
WINDOW = 2  # iterations of which an alarm takes the mean
TURN = "win rate, previous: gold"


@cache
def _model(path: str) -> tuple[Any, Any]:
    return AutoModelForSequenceClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@torch.inference_mode()
def _scores(judge: str, prompts: list, completions: list) -> list[float]:
    functions: dict[str, Any] = {"vader": vader, "on_topic": on_topic, "relevance": relevance}
    if judge in functions:
        return functions[judge](prompts=prompts, completions=completions)
    model, tokenizer = _model(str((QUICKSTART if judge == GOLD else FOLDER) / judge))
    texts = [completion[0]["content"] for completion in completions]
    return model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits[:, 0].tolist()


def replay(trained_on: str, seed: int) -> list[dict[str, torch.Tensor]]:
    """By iteration and judge: scores of the rollouts, of shape `(groups, K)`."""
    path = folder_of(trained_on, seed) / "replay.json"
    if not path.exists():
        found = []
        for file in sorted((path.parent / "rollouts").glob("iteration-*.parquet")):
            rows = read_table(file).to_pylist()
            prompts = [row["prompt"] for row in rows for _ in row["completions"]]
            completions = [each for row in rows for each in row["completions"]]
            judges = (*PROXIES, GOLD, "vader", "on_topic", "relevance")
            found.append({name: _scores(name, prompts, completions) for name in judges})
        write_atomically(path, json.dumps(found))
    iterations = json.loads(path.read_text())
    return [{name: torch.tensor(scores).view(-1, 8) for name, scores in each.items()} for each in iterations]


def agreements(iterations: list[dict[str, torch.Tensor]], first: str, second: str) -> list[float]:
    """Of two judges, by iteration."""
    panels = [[preferences_from_scores(each[name], "hard") for name in (first, second)] for each in iterations]
    return [agreement(panel)[0, 1].item() for panel in panels]


def turn_of(trained_on: str, seed: int) -> float:
    """The step of the evaluation at which the gold model first prefers the evaluation before."""
    rows = evaluations(json.loads((folder_of(trained_on, seed) / "history.json").read_text()))
    return next((row["step"] for row in rows if row[TURN] < 0.5), math.inf)


def alarm(values: list[float], threshold: float) -> float:
    """The optimizer step at which the mean of the last iterations is first below the threshold."""
    ends = range(WINDOW, len(values) + 1)
    below = (end for end in ends if fmean(values[end - WINDOW : end]) < threshold)
    return next(below, math.inf) * STEPS_PER_ITERATION


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration_seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--test_seeds", type=int, nargs="+", default=[2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [*args.calibration_seeds, *args.test_seeds]
    iterations = {job: replay(*job) for job in product(ARMS, seeds)}
    turns = {job: turn_of(*job) for job in iterations}
    print("The gold model's turn, by seed:", {arm: [turns[arm, seed] for seed in seeds] for arm in ARMS})

    for watcher in WATCHERS:
        print(f"\nAgreement with {watcher}, means over seeds\n")
        heads = ["trained on", *(f"iterations {i} and {i + 1}" for i in range(1, 13, 2))]
        print(f"| {' | '.join(heads)} |\n|" + "---|" * len(heads))
        for arm in ARMS:
            runs = [agreements(iterations[arm, seed], ARMS[arm][0], watcher) for seed in seeds]
            known = [[values[k] for values in runs for k in (i, i + 1)] for i in range(0, 12, 2)]
            means = [fmean(value for value in values if not math.isnan(value)) for values in known]
            print(f"| {arm} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")

    end = max(len(each) for each in iterations.values()) * STEPS_PER_ITERATION
    wrong = {("proxy_a", seed): turns["proxy_a", seed] for seed in seeds}
    alone = dict.fromkeys(product(("proxy_a", GOLD), seeds), end)
    questions = (
        ("a wrong one", wrong, [(GOLD, seed) for seed in seeds]),
        ("one alone", alone, list(product(("proxy_panel", "gold_panel"), seeds))),
    )
    print("\n| alarms for | watching | threshold | in time, calibration | false | in time, test | false |")
    print("|" + "---|" * 7)
    for (question, positives, negatives), watcher in product(questions, WATCHERS):
        series = {job: agreements(iterations[job], ARMS[job[0]][0], watcher) for job in (*positives, *negatives)}

        def rates(threshold: float, among: list[int]) -> tuple[list[bool], list[bool]]:
            alarms = {job: alarm(series[job], threshold) for job in series if job[1] in among}  # noqa: B023
            in_time = [alarms[job] <= deadline for job, deadline in positives.items() if job in alarms]  # noqa: B023
            return in_time, [alarms[job] < math.inf for job in negatives if job in alarms]  # noqa: B023

        def gain(threshold: float) -> float:
            in_time, false = rates(threshold, args.calibration_seeds)
            return fmean(in_time) - fmean(false)

        grid = [i / 100 for i in range(30, 80)]
        gains = [gain(threshold) for threshold in grid]
        best = [threshold for threshold, each in zip(grid, gains, strict=True) if each == max(gains)]
        threshold = best[len(best) // 2]
        parts = [each for among in (args.calibration_seeds, args.test_seeds) for each in rates(threshold, among)]
        cells = [f"{sum(each)} of {len(each)}" for each in parts]
        print(f"| {question} | {watcher} | {threshold:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
