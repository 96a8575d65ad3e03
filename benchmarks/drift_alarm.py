"""Does the agreement of a reward model with other judges warn of over-optimisation? A replay of stored rollouts.

    python benchmarks/overoptimization.py     # once: the trainings, and their rollouts
    python benchmarks/drift_alarm.py

Scores the rollouts of each training with all judges, and computes the agreement (`preferences/<oracle>/agreement`) of
the reward model that was trained on with judges that were not. An alarm is due at or before the evaluation at which
the gold model first prefers the policy of the evaluation before; in runs without such a turn every alarm is false. The
thresholds are chosen on some seeds, and tested on the others.
"""

import argparse
import json
from functools import cache
from itertools import product
from statistics import fmean
from typing import Any

import torch
from overoptimization import ARMS, EVERY, FOLDER, GOLD, PROXIES, QUICKSTART, evaluations, folder_of
from pyarrow.parquet import read_table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_sppo.diagnostics import agreement
from trl_sppo.files import write_atomically
from trl_sppo.preferences import preferences_from_scores
from trl_sppo.quickstart.scores import on_topic, relevance, vader


STEPS_PER_ITERATION = 2
WATCHERS = (("proxy_b",), ("vader",), ("relevance",), ("proxy_b", "vader"))
WINDOW = 2  # iterations of which an alarm takes the mean
FORMS = {
    "agreement below": lambda own, others: own,
    "… less than that of the others by": lambda own, others: own - others,
}
DROP = "… below its start by"
TURN = "win rate, previous: gold"


@cache
def _model(path: str) -> tuple[Any, Any]:
    return AutoModelForSequenceClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@torch.inference_mode()
def _scores(judge: str, prompts: list, completions: list) -> list[float]:
    functions = {"vader": vader, "on_topic": on_topic, "relevance": relevance}
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


def agreements(iterations: list[dict[str, torch.Tensor]], first: str, others: tuple[str, ...]) -> list[float]:
    """Of an oracle with others, by iteration."""
    panels = [[preferences_from_scores(each[name], "hard") for name in (first, *others)] for each in iterations]
    return [agreement(panel)[0].item() for panel in panels]


def turn_of(trained_on: str, seed: int) -> float | None:
    """The step of the evaluation at which the gold model first prefers the evaluation before."""
    rows = evaluations(json.loads((folder_of(trained_on, seed) / "history.json").read_text()))
    return next((row["step"] for row in rows if row[TURN] < 0.5), None)


def alarm(values: list[float], threshold: float, drop: bool) -> int | None:
    """The optimizer step at which the mean of the last iterations is below the threshold, or has dropped by it."""
    for end in range(2 * WINDOW, len(values) + 1):
        last = fmean(values[end - WINDOW : end])
        if (fmean(values[:WINDOW]) - last > threshold) if drop else (last < threshold):
            return end * STEPS_PER_ITERATION
    return None


def in_time(step: int | None, turn: float) -> bool:
    return step is not None and step <= turn + EVERY - STEPS_PER_ITERATION


def rates(runs: dict, threshold: float, drop: bool) -> tuple[list[bool], list[bool]]:
    """Of runs with a turn, whether the alarm came in time; of the others, whether there was one."""
    alarms = {run: alarm(values, threshold, drop) for run, (values, _) in runs.items()}
    detected = [in_time(alarms[run], turn) for run, (_, turn) in runs.items() if turn is not None]
    return detected, [alarms[run] is not None for run, (_, turn) in runs.items() if turn is None]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained_on", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--calibration_seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--test_seeds", type=int, nargs="+", default=[2, 3])
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [*args.calibration_seeds, *args.test_seeds]
    there = [job for job in product(args.trained_on, seeds) if (folder_of(*job) / "history.json").exists()]
    iterations = {job: replay(*job) for job in there}
    turns = {job: turn_of(*job) for job in there}
    print("The gold model's turn:", {f"{arm}, seed {seed}": turn for (arm, seed), turn in turns.items()})

    for watchers in WATCHERS:
        print(f"\nAgreement with {' and '.join(watchers)}, means over seeds, by two iterations\n")
        for arm in args.trained_on:
            runs = [agreements(iterations[job], ARMS[arm][0], watchers) for job in there if job[0] == arm]
            mean = [fmean(values) for values in zip(*runs, strict=True)]
            print(f"| {arm} | " + " | ".join(f"{fmean(mean[i : i + 2]):.2f}" for i in range(0, len(mean), 2)) + " |")

    print("\n| alarm | watching | threshold | in time, calibration | false | in time, test | false |\n|" + "---|" * 7)
    for watchers, name in product(WATCHERS, (*FORMS, DROP)):
        if name in FORMS and "others" in name and len(watchers) < 2:
            continue
        series = {}
        for job in there:
            own = agreements(iterations[job], ARMS[job[0]][0], watchers)
            others = agreements(iterations[job], watchers[0], watchers[1:]) if len(watchers) > 1 else own
            values = own if name == DROP else [FORMS[name](*each) for each in zip(own, others, strict=True)]
            series[job] = values, turns[job]
        drop = name == DROP
        parts = [
            {job: each for job, each in series.items() if job[1] in part}
            for part in (args.calibration_seeds, args.test_seeds)
        ]
        grid = [round(0.02 * i, 2) for i in range(-15 if "others" in name else 0, 40)]

        def gain(threshold: float, runs=parts[0], drop=drop) -> float:
            detected, false = rates(runs, threshold, drop)
            return fmean(detected or [0]) - fmean(false or [0])

        best = max(grid, key=gain)
        cells = [f"{sum(each)} of {len(each)}" for part in parts for each in rates(part, best, drop)]
        print(f"| {name} | {' and '.join(watchers)} | {best:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
