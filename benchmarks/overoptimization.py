"""Over-optimisation: train on a proxy reward model, and watch a gold one. Which diagnostics warn in time?

    trl-sppo quickstart                          # once: prepares the models in ./quickstart
    python benchmarks/overoptimization.py        # what is in ./overoptimization is not run again

The gold reward model is the quickstart's: 8,000 film-review snippets, each rated by 15 to 29 people. The proxies have
seen 300 snippets each, and of each the rating of one person. The policy is trained on proxy_a; proxy_b, from other
snippets, only watches (a reward source of weight 0), as users can have it too. The gold model and VADER judge, and
somebody who does not mind sentiment: how much of the film's plot, which the prompt gives, an answer takes up. For
comparison the policy is also trained on the gold model: a diagnostic that warns there too is no warning.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from learning_methods import LORA, ROLLOUT, LoraConfig, read_prompts
from quickstart_reward_model import fit, held_out_figures, read_ratings
from tqdm import tqdm

from trl_sppo import SPPOConfig, SPPOTrainer
from trl_sppo.quickstart.assets import REWARD_TEMPLATE
from trl_sppo.quickstart.run import FOLDER as QUICKSTART
from trl_sppo.quickstart.scores import on_topic, relevance, vader
from trl_sppo.runs.report import RULES


FOLDER = Path("overoptimization")
PROXIES = ("proxy_a", "proxy_b")
GOLD = "reward_model"
NUM_TRAIN = 300
STEPS, EVERY = 24, 4  # optimizer steps of 32 completions
# The reward model that praises, and the number of voters: with two, similarity to the prompt's plot is the other
ARMS = {"proxy_a": ("proxy_a", 1), GOLD: (GOLD, 1), "proxy_panel": ("proxy_a", 2), "gold_panel": (GOLD, 2)}
LABELS = {
    "proxy_a": "proxy", "proxy_b": "second proxy", GOLD: "gold", "vader": "VADER", "on_topic": "on topic",
    "relevance": "relevance",
}  # fmt: skip


def make_proxies() -> None:
    texts, means = read_ratings()
    _, single = read_ratings(num_raters=1)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1)).tolist()
    held_out = order[-2000:]
    for i, name in enumerate(PROXIES):
        if (FOLDER / name).exists():
            continue
        torch.manual_seed(i)
        rows = order[i * NUM_TRAIN : (i + 1) * NUM_TRAIN]
        model, tokenizer = fit([texts[row] for row in rows], single[rows], epochs=8, learning_rate=1e-3)
        print(name, held_out_figures(model, tokenizer, [texts[row] for row in held_out], means[held_out]), flush=True)
        tokenizer.chat_template = REWARD_TEMPLATE
        for part in (model.merge_and_unload(), tokenizer):
            part.save_pretrained(FOLDER / name)


def run(trained_on: str, seed: int, learning_rate: float) -> None:
    torch.set_num_threads(1)
    folder = folder_of(trained_on, seed)
    models = {"proxy_a": str(FOLDER / "proxy_a"), GOLD: str(QUICKSTART / GOLD)}
    praise, votes = ARMS[trained_on]
    voters: list[Any] = [models.pop(praise)]
    judges: list[Any] = [*models.values(), vader, on_topic]
    (voters if votes == 2 else judges).append(relevance)
    options: dict[str, Any] = {
        "max_steps": STEPS, "learning_rate": learning_rate, "seed": seed, "output_dir": str(folder),
        "logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": EVERY,
        "num_generations_eval": 2, "per_device_eval_batch_size": 64,
    }  # fmt: skip
    trainer = SPPOTrainer(
        str(QUICKSTART / "policy"),
        [*voters, str(FOLDER / "proxy_b")],
        SPPOConfig(
            **{**ROLLOUT, **options},
            train_on="best_and_worst",
            reward_weights=[*[1.0] * votes, 0.0],
            model_init_kwargs={"dtype": "float32"},
        ),
        read_prompts("train"),
        read_prompts("test"),
        eval_reward_funcs=judges,
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    (folder / "history.json").write_text(json.dumps(trainer.state.log_history))


def folder_of(trained_on: str, seed: int) -> Path:
    return FOLDER / f"on-{trained_on}" / f"seed-{seed}"


def evaluations(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """For each evaluation: the step, the win rates, and the diagnostics of the optimizer steps before it."""
    rows = []
    for row in history:
        step = row["step"]
        if "eval_loss" not in row or step == 0:
            continue
        found = {"step": step}
        for judge, label in LABELS.items():
            found[f"mean score: {label}"] = row[f"eval_rewards/{judge}/mean"]
        for opponent in ("initial", "previous"):
            for judge, label in LABELS.items():
                found[f"win rate, {opponent}: {label}"] = row[f"eval_win_rate_vs_{opponent}/{judge}"]
        before = [each for each in history if "loss" in each and step - EVERY < each["step"] <= step]
        for name in [*(rule[0] for rule in RULES), "entropy"]:
            values = [each[name] for each in before if name in each]
            if values:
                found[name] = sum(values) / len(values)
        rows.append(found)
    return rows


def show(trained_on: str, runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Print the means over runs, and return them."""
    print(f"\nTrained on {trained_on}, {len(runs)} seeds\n")
    mean = [
        {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if all(name in row for row in rows)}
        for rows in zip(*runs, strict=True)
    ]
    names = [name for name in mean[0] if name != "step" and all(name in row for row in mean)]
    print("| optimizer steps | " + " | ".join(str(row["step"]).removesuffix(".0") for row in mean) + " |")
    print("|---|" + "---|" * len(mean))
    for name in names:
        print(f"| {name} | " + " | ".join(f"{row[name]:.3f}" for row in mean) + " |")
    for name, low, high, _ in RULES:
        if name in names:
            warned = [
                next((row["step"] for row in rows if name in row and not low <= row[name] <= high), None)
                for rows in runs
            ]
            print(f"{name}: outside {low:g} to {high:g} for the first time at step {warned}")
    for name, low in (("entropy", 1.5), ("win rate, initial: on topic", 0.4)):
        print(f"{name}: below {low:g} at steps {[[row['step'] for row in rows if row[name] < low] for rows in runs]}")
    for label in LABELS.values():
        name = f"win rate, previous: {label}"
        print(f"{name}: below 1/2 at steps {[[row['step'] for row in rows if row[name] < 0.5] for rows in runs]}")
    return mean


def draw(runs: dict[str, list[list[dict[str, float]]]], means: dict[str, list[dict[str, float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.7 * len(means)), layout="constrained")
    scores = {f"mean score: {label}": label for label in ("proxy", "second proxy", "gold")}
    rates = {f"win rate, previous: {label}": label for label in ("proxy", "second proxy", "VADER", "on topic")}
    diagnostics = {name: name for name in ("preferences/panel_disagreement", "completions/duplicates", "entropy")}
    grid = figure.subplots(len(means), 3, sharex=True, squeeze=False)
    for axes, (trained_on, mean) in zip(grid, means.items(), strict=True):
        steps = [row["step"] for row in mean]
        for axis, curves in zip(axes, (scores, rates, diagnostics), strict=True):
            for name, label in curves.items():
                (line,) = axis.plot(steps, [row[name] for row in mean], marker="o", label=label)
                for rows in runs[trained_on]:
                    axis.plot(steps, [row[name] for row in rows], color=line.get_color(), alpha=0.3, linewidth=0.8)
            axis.set(xlabel="optimizer step")
            axis.legend()
        praise, votes = ARMS[trained_on]
        voters = f"{LABELS[praise]}{' and relevance' if votes == 2 else ''}"
        axes[0].set(title=f"Trained on {voters}: mean scores", ylim=(0, 3.5))
        axes[1].set(title="Win rate against the evaluation before", ylim=(0, 1))
        axes[1].axhline(0.5, color="grey", linewidth=0.8)
        axes[2].set(title="Diagnostics", ylim=(0, 2))
    figure.savefig(FOLDER / "overoptimization.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trained_on", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--learning_rate", type=float, default=1.2e-3)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="Trainings at the same time.")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        trained_on, seed = args.run
        run(trained_on, int(seed), args.learning_rate)
        return
    make_proxies()
    jobs = [(trained_on, seed) for seed in args.seeds for trained_on in args.trained_on]
    todo = [job for job in jobs if not (folder_of(*job) / "history.json").exists()]

    def start(job: tuple[str, int]) -> None:
        trained_on, seed = job
        command = [
            sys.executable,
            __file__,
            "--run",
            trained_on,
            str(seed),
            "--learning_rate",
            str(args.learning_rate),
        ]
        folder_of(*job).mkdir(parents=True, exist_ok=True)
        with (folder_of(*job) / "log.txt").open("w") as file:
            subprocess.run(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)

    with ThreadPoolExecutor(args.processes) as pool:
        list(tqdm(pool.map(start, todo), total=len(todo), desc="runs"))
    runs: dict[str, list[list[dict[str, float]]]] = {}
    for job in jobs:
        history = json.loads((folder_of(*job) / "history.json").read_text())
        runs.setdefault(job[0], []).append(evaluations(history))
    draw(runs, {trained_on: show(trained_on, each) for trained_on, each in runs.items()})


if __name__ == "__main__":
    main()
