"""The race: train one policy with SPPO and with its peers, on the same work, and judge it on held-out prompts.

    trl-sppo quickstart                                    # once: prepares the models in ./quickstart
    python benchmarks/learning.py                          # hours; what is in ./learning already is not run again
    python benchmarks/learning.py --methods sppo grpo --seeds 0

All methods train SmolLM2-135M-Instruct with the same LoRA, on the same prompts, with one reward function, sampling
and number of optimizer steps: one per 32 completions, of 384 in all. Each has its learning rate from the same sweep,
of a seed that takes no further part (the forms of SPPO share one): the highest win rate on the held-out prompts under
the training reward, among those that end within a nat per token of the initial policy (further off answers fall apart,
and no judge of sentiment minds). Win rates are against the initial policy. Time is CPU time of one thread, without
evaluations.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from learning_methods import (
    JUDGES,
    LORA,
    METHODS,
    ROLLOUT,
    STEP,
    Referee,
    accurate,
    answer,
    judge_policy,
    load,
    read_prompts,
    swept_as,
)
from tqdm import tqdm
from transformers import set_seed

from trl_sppo.evaluation.policies import tokenize_prompt
from trl_sppo.evaluation.statistics import WinRate, outcomes_of_scores, win_rate
from trl_sppo.files import write_atomically
from trl_sppo.quickstart.scores import on_topic
from trl_sppo.rollouts.files import installed_versions


RESULTS = Path("learning")
LEARNING_RATES = (4e-4, 8e-4, 1.6e-3)
LARGEST_KL = 24.0  # to the initial policy, nats per completion
SWEEP_SEED = 100


# Running


def path_of(method: str, learning_rate: float, seed: int) -> Path:
    return RESULTS / method / f"lr-{learning_rate:g}" / f"seed-{seed}.json"


def run(method: str, learning_rate: float, seed: int) -> None:
    """One training, in this process."""
    path = path_of(method, learning_rate, seed)
    set_seed(seed)
    model, tokenizer = load()
    accurate([answer("")])  # loads the reward model
    every = Referee.last if seed == SWEEP_SEED else 4
    referee = Referee(tokenizer, 1000 + seed, every)
    common = {"learning_rate": learning_rate, "seed": seed, "output_dir": str(path.with_suffix(""))}
    METHODS[method][1](referee, model, common)
    assert referee.steps == referee.last, (referee.steps, referee.last)
    setup = {"options": {**ROLLOUT, **common}, "lora": LORA, "versions": installed_versions(use_vllm=False)}
    _write(path, {"method": method, "seed": seed, **setup, "rows": referee.rows})


def run_initial(path: Path) -> None:
    """The opponent of all: 4 completions per held-out prompt of the initial policy."""
    if not path.exists():
        model, tokenizer = load()
        prompt_ids = [tokenize_prompt(tokenizer, prompt) for prompt in read_prompts("test")["prompt"]]
        _write(path, judge_policy(model, model, tokenizer, prompt_ids, 4, seed=0))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content))


def rates(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, WinRate]]]:
    """The evaluations of a run: the row, and the win rate against the initial policy under each judge."""
    initial = _all_scores(json.loads((RESULTS / "initial.json").read_text()))
    for row in json.loads(path.read_text())["rows"]:
        scores = _all_scores(row)
        yield row, {name: win_rate(outcomes_of_scores(scores[name], initial[name])) for name in scores}


def _all_scores(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """By judge, of shape `(prompts, samples)`."""
    topic = [
        on_topic([prompt] * len(texts), [answer(text) for text in texts])
        for prompt, texts in zip(_test_prompts(), row["texts"], strict=True)
    ]
    return {name: torch.tensor(scores) for name, scores in {**row["scores"], "on topic": topic}.items()}


@cache
def _test_prompts() -> list[list[dict[str, str]]]:
    return read_prompts("test")["prompt"][:]


def last_rates(path: Path) -> dict[str, WinRate]:
    return list(rates(path))[-1][1]


def last_row(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["rows"][-1]


def best_learning_rate(method: str, learning_rates: list[float]) -> float | None:
    """By the sweep, once it is complete."""
    paths = {rate: path_of(swept_as(method), rate, SWEEP_SEED) for rate in learning_rates}
    if not all(path.exists() for path in paths.values()):
        return None
    near = [rate for rate, path in paths.items() if last_row(path)["kl"] <= LARGEST_KL]
    return max(near or [min(paths)], key=lambda rate: last_rates(paths[rate])["reward model"].mean)


def race(methods: list[str], learning_rates: list[float], seeds: list[int], processes: int) -> None:
    run_initial(RESULTS / "initial.json")

    def start(job: tuple[str, float, int]) -> None:
        command = [sys.executable, __file__, "--run", *map(str, job)]
        log = path_of(*job).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            bar.write(f"{' '.join(map(str, job))} failed: {log}")
        bar.update()

    swept = dict.fromkeys(map(swept_as, methods))
    sweep = [(method, rate, SWEEP_SEED) for method in swept for rate in learning_rates]
    with tqdm(total=len(sweep) + len(methods) * len(seeds), desc="runs") as bar, ThreadPoolExecutor(processes) as pool:

        def todo(jobs: list) -> list:
            left = [job for job in jobs if not path_of(*job).exists()]
            bar.update(len(jobs) - len(left))
            return left

        list(pool.map(start, todo(sweep)))
        chosen = {method: best_learning_rate(method, learning_rates) for method in methods}
        finals = [(method, rate, seed) for seed in seeds for method, rate in chosen.items() if rate is not None]
        list(pool.map(start, todo(finals)))


# Results


def curves(method: str, rate: float | None, seeds: list[int]) -> list[list[dict[str, float]]]:
    """For each finished seed, from the initial policy on: completions, seconds, and win rates by judge."""
    paths = [path_of(method, rate, seed) for seed in seeds] if rate is not None else []
    return [curve_of(path) for path in paths if path.exists()]


def curve_of(path: Path) -> list[dict[str, float]]:
    """Of a run, from the initial policy on."""
    curve = [{"completions": 0.0, "seconds": 0.0, "kl": 0.0, **dict.fromkeys([*JUDGES, "on topic"], 0.5)}]
    for row, win_rates in rates(path):
        facts = {"completions": row["step"] * STEP, "seconds": row["seconds"], "kl": row["kl"]}
        curve.append({**facts, **{name: win_rate.mean for name, win_rate in win_rates.items()}})
    return curve


def mean_curve(runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    return [{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} for rows in zip(*runs, strict=True)]


def crossing(curve: list[dict[str, float]], x: str, y: str, level: float) -> float | None:
    """Where a curve of `y` over `x` first reaches a level, between its points on straight lines."""
    for before, after in pairwise(curve):
        if before[y] <= level <= after[y] and after[y] > before[y]:
            return before[x] + (after[x] - before[x]) * (level - before[y]) / (after[y] - before[y])
    return None


def value_at(curve: list[dict[str, float]], x: str, y: str, place: float) -> float:
    for before, after in pairwise(curve):
        if before[x] <= place <= after[x]:
            return before[y] + (after[y] - before[y]) * (place - before[x]) / (after[x] - before[x])
    return curve[-1][y]


ALL_JUDGES = ["reward model", "VADER", "on topic"]


def show_sweep(methods: list[str], learning_rates: list[float]) -> dict[str, list[dict[str, float]]]:
    """Print how the runs of the sweep ended; returns all their evaluations by method."""
    print("\n| swept | learning rate | seconds | KL | " + " | ".join(ALL_JUDGES) + " |\n|" + "---|" * 7)
    points: dict[str, list[dict[str, float]]] = {}
    for method in dict.fromkeys(map(swept_as, methods)):
        for rate in learning_rates:
            path = path_of(method, rate, SWEEP_SEED)
            if path.exists():
                curve = curve_of(path)
                points.setdefault(method, []).extend(curve[1:])
                cells = [METHODS[method][0], f"{rate:g}", f"{curve[-1]['seconds']:.0f}", f"{curve[-1]['kl']:.1f}"]
                print("| " + " | ".join([*cells, *(f"{curve[-1][judge]:.3f}" for judge in ALL_JUDGES)]) + " |")
    return points


def show(methods: list[str], learning_rates: list[float], seeds: list[int]) -> None:
    points = show_sweep(methods, learning_rates)
    best = {method: best_learning_rate(method, learning_rates) for method in methods}
    found = {method: runs for method in methods if (runs := curves(method, best[method], seeds))}
    mean = {method: mean_curve(runs) for method, runs in found.items()}
    for method, runs in found.items():
        points.setdefault(method, []).extend(row for run in runs for row in run[1:])
    if found:
        time_of_fastest = min(curve[-1]["seconds"] for curve in mean.values())
        heads = ["method", "learning rate", "seconds", "KL", *(f"{judge}: mean (each seed)" for judge in ALL_JUDGES)]
        heads += [f"{judge} after {time_of_fastest:.0f} s" for judge in ALL_JUDGES]
        print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for method, runs in found.items():
        last = mean[method][-1]
        cells = [METHODS[method][0], f"{best[method]:g}", f"{last['seconds']:.0f}", f"{last['kl']:.1f}"]
        for judge in ALL_JUDGES:
            cells.append(f"{last[judge]:.3f} ({', '.join(f'{run[-1][judge]:.3f}' for run in runs)})")
        cells += [f"{value_at(mean[method], 'seconds', judge, time_of_fastest):.3f}" for judge in ALL_JUDGES]
        print("| " + " | ".join(cells) + " |")
    if mean:
        show_at_equal_reward(mean)
    if {"sppo", "online_dpo"} <= mean.keys():
        for judge in ALL_JUDGES[:2]:
            level, whole = mean["online_dpo"][-1][judge], mean["online_dpo"][-1]["seconds"]
            seconds = crossing(mean["sppo"], "seconds", judge, level)
            when = "does not reach it" if seconds is None else f"{seconds:.0f} s, {seconds / whole:.2f} of that"
            print(f"OnlineDPO's last win rate under {judge}, {level:.3f}, takes it {whole:.0f} s; SPPO: {when}")
    if {"sppo", "sppo_biased"} <= mean.keys():
        show_bias({method: (best[method], found[method]) for method in ("sppo", "sppo_biased")}, seeds)
    draw(found, mean, points)


def show_at_equal_reward(mean: dict[str, list[dict[str, float]]]) -> None:
    """Print what each method has paid when it reaches the reward at which the last one ends."""
    level = min(curve[-1]["reward model"] for curve in mean.values())
    names = ["completions", "seconds", "kl", *ALL_JUDGES[1:]]
    print(f"\n| at {level:.3f} under the reward model | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for method, curve in mean.items():
        place = crossing(curve, "completions", "reward model", level)
        if place is not None:
            values = [value_at(curve, "completions", name, place) for name in names]
            cells = [f"{value:.3f}" if value < 1 else f"{value:.0f}" for value in values]
            print("| " + " | ".join([METHODS[method][0], *cells]) + " |")


def show_bias(trained: dict[str, tuple], seeds: list[int]) -> None:
    """Print what training on the biased reward model does under all judges, and to the habit that it pays for."""
    names = ["biased reward model", *ALL_JUDGES]
    print("\n| | " + " | ".join(names) + " | commas per completion |\n|" + "---|" * (len(names) + 2))
    for method, (rate, runs) in trained.items():
        cells = [METHODS[method][0]]
        for name in names:
            values = [run[-1][name] for run in runs]
            cells.append(f"{sum(values) / len(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
        paths = [path for seed in seeds if (path := path_of(method, rate, seed)).exists()]
        texts = [text for path in paths for group in last_row(path)["texts"] for text in group]
        cells.append(f"{sum(text.count(',') for text in texts) / len(texts):.1f}")
        print("| " + " | ".join(cells) + " |")


def draw(found: dict, mean: dict, points: dict) -> None:
    """Above, win rates over time; below, over the distance from the initial policy, with all runs of the sweep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(ALL_JUDGES), 7.6), layout="constrained")
    axes = figure.subplots(2, len(ALL_JUDGES), sharey=True)
    for over_time, over_kl, judge in zip(*axes, ALL_JUDGES, strict=True):
        for i, (method, rows) in enumerate(points.items()):
            style: dict[str, Any] = {"color": f"C{i}", "label": METHODS[method][0]}
            over_kl.scatter([row["kl"] for row in rows], [row[judge] for row in rows], s=14, **style)
            for run in found.get(method, []):
                each = [row["seconds"] for row in run], [row[judge] for row in run]
                over_time.plot(*each, color=f"C{i}", alpha=0.25, linewidth=0.8)
            if method in mean:
                seconds = [row["seconds"] for row in mean[method]]
                over_time.plot(seconds, [row[judge] for row in mean[method]], marker="o", **style)
        over_kl.axvline(LARGEST_KL, color="grey", linewidth=0.8, linestyle=":")
        over_kl.set(xscale="symlog", xlabel="KL to the initial policy, nats per completion")
        over_time.set(title=judge, xlabel="seconds of training on one CPU thread", ylim=(0, 1))
        for axis in (over_time, over_kl):
            axis.axhline(0.5, color="grey", linewidth=0.8)
    axes[1][0].legend()
    for row in axes:
        row[0].set_ylabel("win rate against the initial policy")
    figure.savefig(RESULTS / "learning.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="None: only the sweep.")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=list(LEARNING_RATES), help="The sweep's.")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="Trainings at the same time.")
    parser.add_argument("--show", action="store_true", help="Only show what is there already.")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        method, learning_rate, seed = args.run
        run(method, float(learning_rate), int(seed))
        return
    if not args.show:
        race(args.methods, args.learning_rates, args.seeds, args.processes)
    show(args.methods, args.learning_rates, args.seeds)


if __name__ == "__main__":
    main()
