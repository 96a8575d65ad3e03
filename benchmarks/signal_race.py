"""Does the continuous win rate teach a language model more than a binary one? Four signals, otherwise alike.

    trl-sppo quickstart                       # once: prepares the models in ./quickstart
    python benchmarks/signal_race.py          # hours; what is in ./signal_race already is not run again
    python benchmarks/signal_race.py --show

The policy, the LoRA adapter, the prompts and the work of the race (learning.py), with the quickstart's two voters: its
reward model and similarity to the plot. Each signal has its own learning rate, by a sweep on other seeds and on the
training prompts: the highest mean win rate under the two voters among the rates that end within a nat per token of the
initial policy. Then five seeds on the held-out prompts, under judges that nothing was trained on.
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
from statistics import fmean, stdev
from typing import Any

import torch
from learning_methods import ROLLOUT, STEP, Referee, accurate, answer, fit, judge_policy, load, read_prompts
from tqdm import tqdm
from transformers import set_seed

from trl_sppo import SPPOConfig, SPPOTrainer
from trl_sppo.evaluation.policies import tokenize_prompt
from trl_sppo.evaluation.statistics import outcomes_of_scores, win_rate
from trl_sppo.files import write_atomically
from trl_sppo.quickstart.scores import on_topic, relevance, vader


RESULTS = Path("signal_race")
LEARNING_RATES = (4e-4, 8e-4, 1.6e-3)
LARGEST_KL = 24.0  # to the initial policy, nats per completion
SWEEP_SEEDS = (100,)
VOTERS: dict[str, Any] = {"reward model": accurate, "relevance": relevance}
HELD_OUT: dict[str, Any] = {"VADER": vader, "words of the plot": on_topic}
JUDGES: dict[str, Any] = {**VOTERS, **HELD_OUT}
MEANS = {"voters, mean": VOTERS, "held-out judges, mean": HELD_OUT}  # a run trades one goal for the other
COLUMNS = [*JUDGES, *MEANS]
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 0.975 quantile of the t distribution, by the number of values


class PairsOfDPO(SPPOTrainer):
    """DPO's loss on the best and the worst of each group. The reference is the policy that sampled them."""

    def _sppo_loss(self, log_ratios, inputs, num_items, weights=None):
        _, metrics = super()._sppo_loss(log_ratios.detach(), inputs, num_items)
        # Rows of a group stand side by side. The better one has a win rate of 1, the other of 0
        signs = (inputs["win_rates"] - 0.5).sign()
        margins = (log_ratios * signs).view(-1, 2).sum(dim=1)
        # - log sigmoid(beta (log-ratio of the better - log-ratio of the worse)) with beta = 1 / eta
        losses = torch.nn.functional.softplus(-margins / self.args.eta)
        return losses.sum() / num_items, metrics


PAIR: dict[str, Any] = {"train_on": "best_and_worst", "loss_type": "sppo_hard"}
ARMS: dict[str, tuple[str, type[SPPOTrainer], dict[str, Any]]] = {
    "continuous": ("win rates, all of 8", SPPOTrainer, {}),
    "binary": ("binary, all of 8", SPPOTrainer, {"loss_type": "sppo_hard"}),
    "binary_pair": ("binary, best and worst", SPPOTrainer, PAIR),
    "dpo": ("DPO, best and worst", PairsOfDPO, {**PAIR, "keep_groups_together": True}),
}


def run(arm: str, learning_rate: float, seed: int) -> None:
    """One training, in this process."""
    split = "train" if seed in SWEEP_SEEDS else "test"
    path = path_of(arm, learning_rate, seed)
    set_seed(seed)
    model, tokenizer = load()
    for judge in JUDGES.values():  # loads models
        judge(prompts=prompts_of(split)[:1], completions=[answer("")])
    referee = Referee(tokenizer, 1000 + seed, Referee.last if split == "train" else 4, split)
    _, trainer_class, options = ARMS[arm]
    common = {"learning_rate": learning_rate, "seed": seed, "output_dir": str(path.with_suffix(""))}
    args = SPPOConfig(**{**ROLLOUT, **common, **options})
    fit(trainer_class, model, args, referee, reward_funcs=list(VOTERS.values()), train_dataset=read_prompts("train"))
    assert referee.steps == referee.last, (referee.steps, referee.last)
    _write(path, {"options": {**ROLLOUT, **common, **options}, "rows": [_scored(row, split) for row in referee.rows]})


def run_initial(split: str) -> None:
    """The opponent of all: 4 completions per prompt of the initial policy."""
    if not (path := RESULTS / f"initial-{split}.json").exists():
        model, tokenizer = load()
        prompt_ids = [tokenize_prompt(tokenizer, prompt) for prompt in prompts_of(split)]
        _write(path, _scored(judge_policy(model, model, tokenizer, prompt_ids, 4, seed=0), split))


def _scored(row: dict[str, Any], split: str) -> dict[str, Any]:
    """An evaluation with the scores of all judges, by prompt and sample."""
    prompts = [prompt for prompt, texts in zip(prompts_of(split), row["texts"], strict=True) for _ in texts]
    completions = [answer(text) for texts in row["texts"] for text in texts]
    samples = len(row["texts"][0])
    scores = {name: judge(prompts=prompts, completions=completions) for name, judge in JUDGES.items()}
    return {**row, "scores": {name: torch.tensor(s).view(-1, samples).tolist() for name, s in scores.items()}}


@cache
def prompts_of(split: str) -> list[list[dict[str, str]]]:
    return read_prompts(split)["prompt"][:]


def path_of(arm: str, learning_rate: float, seed: int) -> Path:
    return RESULTS / arm / f"lr-{learning_rate:g}" / f"seed-{seed}.json"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content))


def race(arms: list[str], learning_rates: list[float], seeds: list[int], processes: int) -> None:
    for split in ("train", "test"):
        run_initial(split)

    def start(job: tuple[str, float, int]) -> None:
        log = path_of(*job).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--run", *map(str, job)]
        with log.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            tqdm.write(f"{' '.join(map(str, job))} failed: {log}")

    def run_all(jobs: list, name: str) -> None:
        todo = [job for job in jobs if not path_of(*job).exists()]
        with ThreadPoolExecutor(processes) as pool:
            list(tqdm(pool.map(start, todo), total=len(todo), desc=name))

    run_all([(arm, rate, seed) for seed in SWEEP_SEEDS for rate in learning_rates for arm in arms], "sweep")
    chosen = {arm: best_learning_rate(arm, learning_rates) for arm in arms}
    run_all([(arm, chosen[arm], seed) for seed in seeds for arm in arms], "runs")


def rates(path: Path) -> Iterator[dict[str, float]]:
    """The evaluations of a run: optimizer step, KL, and the win rates against the initial policy."""
    split = "train" if int(path.stem.removeprefix("seed-")) in SWEEP_SEEDS else "test"
    initial = json.loads((RESULTS / f"initial-{split}.json").read_text())["scores"]
    yield {"completions": 0, "kl": 0.0, "seconds": 0.0, **dict.fromkeys(COLUMNS, 0.5)}
    for row in json.loads(path.read_text())["rows"]:
        found = {
            name: win_rate(outcomes_of_scores(torch.tensor(row["scores"][name]), torch.tensor(initial[name]))).mean
            for name in JUDGES
        }
        means = {name: fmean(found[judge] for judge in judges) for name, judges in MEANS.items()}
        facts = {"completions": row["step"] * STEP, "kl": row["kl"], "seconds": row["seconds"]}
        yield {**facts, **found, **means}


def sweep_of(arm: str, learning_rate: float) -> dict[str, float]:
    """How the runs of the sweep with a learning rate ended: means over their seeds."""
    ends = [list(rates(path_of(arm, learning_rate, seed)))[-1] for seed in SWEEP_SEEDS]
    return {name: fmean(end[name] for end in ends) for name in ends[0]}


def best_learning_rate(arm: str, learning_rates: list[float]) -> float:
    ends = {rate: sweep_of(arm, rate) for rate in learning_rates}
    near = [rate for rate, end in ends.items() if end["kl"] <= LARGEST_KL] or [min(ends)]
    return max(near, key=lambda rate: ends[rate]["voters, mean"])


def interval(values: list[float]) -> str:
    """The mean of independent values with its 95 % interval, by Student's t distribution."""
    half = STUDENT[len(values)] * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):.3f} [{fmean(values) - half:.3f}, {fmean(values) + half:.3f}]"


def at(curve: list[dict[str, float]], x: str, place: float, name: str) -> float:
    """The value where a run first comes to a KL or a time, between its evaluations on straight lines."""
    for before, after in pairwise(curve):
        if before[x] <= place <= after[x]:
            return before[name] + (place - before[x]) / (after[x] - before[x]) * (after[name] - before[name])
    return curve[-1][name]


def show(arms: list[str], learning_rates: list[float], seeds: list[int]) -> None:
    heads = " | ".join(COLUMNS)
    print(f"\n| sweep | learning rate | KL | {heads} |\n|" + "---|" * (len(COLUMNS) + 3))
    for arm in arms:
        for rate in learning_rates:
            end = sweep_of(arm, rate)
            print(f"| {ARMS[arm][0]} | {rate:g} | {end['kl']:.1f} | " + cells(f"{end[name]:.3f}" for name in COLUMNS))
    runs = {}
    for arm in arms:
        best = best_learning_rate(arm, learning_rates)
        runs[arm] = [list(rates(path_of(arm, best, seed))) for seed in seeds if path_of(arm, best, seed).exists()]
        print(f"{ARMS[arm][0]}: learning rate {best:g}, {len(runs[arm])} seeds")
    kl, seconds = (min(curve[-1][x] for curves in runs.values() for curve in curves) for x in ("kl", "seconds"))
    wheres = {
        f"after {int(runs[arms[0]][0][-1]['completions'])} completions": lambda curve, name: curve[-1][name],
        f"at a KL of {kl:.1f} nats": lambda curve, name: at(curve, "kl", kl, name),
        f"after {seconds:.0f} s of training": lambda curve, name: at(curve, "seconds", seconds, name),
    }
    for where, value in wheres.items():
        print(f"\n| {where} | KL | completions | seconds | {heads} |\n|" + "---|" * (len(COLUMNS) + 4))
        for arm, curves in runs.items():
            spent = [
                f"{fmean(value(curve, name) for curve in curves):.1f}" for name in ("kl", "completions", "seconds")
            ]
            each = [interval([value(curve, name) for curve in curves]) for name in COLUMNS]
            print(f"| {ARMS[arm][0]} | " + cells([*spent, *each]))
        for arm, curves in list(runs.items())[1:]:
            pairs = list(zip(runs[arms[0]], curves, strict=True))  # by seed
            each = [interval([value(a, name) - value(b, name) for a, b in pairs]) for name in COLUMNS]
            print(f"| {ARMS[arms[0]][0]} minus {ARMS[arm][0]} | | | | " + cells(each))


def cells(values: Any) -> str:
    return " | ".join(values) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=list(LEARNING_RATES), help="The sweep's.")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="Trainings at the same time.")
    parser.add_argument("--show", action="store_true", help="Only show what is there already.")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        arm, learning_rate, seed = args.run
        run(arm, float(learning_rate), int(seed))
        return
    if not args.show:
        race(args.arms, args.learning_rates, args.seeds, args.processes)
    show(args.arms, args.learning_rates, args.seeds)


if __name__ == "__main__":
    main()
