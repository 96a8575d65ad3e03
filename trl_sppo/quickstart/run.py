"""`trl-sppo quickstart`: prepare, train on an ordinary recipe, then compare with the policy it started from."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import load_dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from .. import cli, train
from ..evaluation import WinRate, outcomes_of_scores, sample_completions, win_rate
from ..rewards import MicroBatchedRewardModel
from . import assets


FOLDER = Path("quickstart")
SAMPLES_PER_PROMPT = 2
EXAMPLES = 4


def main(argv: list[str]) -> None:
    """Run the quickstart in the working directory. `argv` overrides options of its recipe."""
    start = time.monotonic()
    console = Console()
    with cli.recipe("quickstart.yaml") as recipe:
        argv = ["--config", str(recipe), *argv]
        train.check_arguments(argv)  # before anything is prepared
        console.rule("1/3 Preparing models and prompts")
        assets.prepare(FOLDER)
        console.rule("2/3 Training with SPPO")
        trainer = train.main(argv)
    args = trainer.args
    history = trainer.state.log_history
    del trainer  # what is compared is what was saved

    console.rule("3/3 Playing the trained policy against the initial one on held-out prompts")
    output_dir = Path(args.output_dir)
    prompts = load_dataset(str(FOLDER / "prompts"), split="test")["prompt"]
    answers = {
        name: sample(name, path, prompts, args)
        for name, path in (("initial", FOLDER / "policy"), ("trained", output_dir))
    }
    judges = {"training reward model": reward_model_judge(), "VADER (not trained on)": vader_judge()}
    scores = {
        judge: {name: torch.tensor([score(group) for group in groups]) for name, groups in answers.items()}
        for judge, score in judges.items()
    }
    results = {judge: win_rate(outcomes_of_scores(each["trained"], each["initial"])) for judge, each in scores.items()}

    _save(output_dir, prompts, answers, scores, results)
    _draw(output_dir / "quickstart.png", history, results)
    _show(console, prompts, answers, scores, results)
    console.print(
        f"\nSaved in {output_dir}: the adapter, completions.jsonl, win_rates.json and quickstart.png "
        f"({time.monotonic() - start:.0f} s in all)"
    )


def sample(name: str, path: Path, prompts, args) -> list[list[str]]:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    return sample_completions(
        model,
        AutoTokenizer.from_pretrained(path),
        prompts,
        num_samples=SAMPLES_PER_PROMPT,
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        seed=args.seed,
        description=f"{name} policy",
    )


def reward_model_judge() -> Callable[[list[str]], list[float]]:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "reward_model")
    model = MicroBatchedRewardModel(
        AutoModelForSequenceClassification.from_pretrained(FOLDER / "reward_model"), batch_size=64
    )

    @torch.inference_mode()
    def score(answers: list[str]) -> list[float]:
        texts = [
            tokenizer.apply_chat_template([{"role": "assistant", "content": answer}], tokenize=False)
            for answer in answers
        ]
        inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        return model(**inputs).logits[:, 0].tolist()

    return score


def vader_judge() -> Callable[[list[str]], list[float]]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda answers: [analyzer.polarity_scores(answer)["compound"] for answer in answers]


def _save(output_dir: Path, prompts, answers, scores, results: dict[str, WinRate]) -> None:
    with open(output_dir / "completions.jsonl", "w") as file:
        for i, prompt in enumerate(prompts):
            row = {"prompt": prompt, **{name: groups[i] for name, groups in answers.items()}}
            row["scores"] = {judge: {n: s[i].tolist() for n, s in each.items()} for judge, each in scores.items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    win_rates = {judge: vars(result) for judge, result in results.items()}
    (output_dir / "win_rates.json").write_text(json.dumps(win_rates, indent=2) + "\n")


def _show(console: Console, prompts, answers, scores, results: dict[str, WinRate]) -> None:
    examples = Table(
        title="Held-out prompts, first sample of each policy (score of the reward model)", show_lines=True
    )
    for column in ("prompt", "initial", "trained"):
        examples.add_column(column)
    reward = scores["training reward model"]
    for i in range(EXAMPLES):
        cells = [
            f"{answers[name][i][0].strip()} ({reward[name][i, 0].item():+.2f})" for name in ("initial", "trained")
        ]
        examples.add_row(prompts[i][-1]["content"], *cells)
    console.print(examples, markup=False)

    table = Table(title="Win rate of the trained policy against the initial one")
    for column in ("judge", "win rate", "95 % interval", "prompts"):
        table.add_column(column)
    for judge, result in results.items():
        table.add_row(judge, f"{result.mean:.3f}", f"{result.low:.3f} to {result.high:.3f}", str(result.num_prompts))
    console.print(table)


def _draw(path: Path, history: list[dict], results: dict[str, WinRate]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def curve(axis, name: str, **kwargs) -> None:
        points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
        axis.plot(*zip(*points, strict=True), marker="o", **kwargs)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    curve(left, "reward", color="tab:blue")
    left.set(title="Reward of the rollouts", xlabel="optimizer step", ylabel="mean score")
    curve(middle, "winner_log_ratio", color="tab:green", label="winners")
    curve(middle, "loser_log_ratio", color="tab:red", label="losers")
    middle.axhline(0, color="grey", linewidth=0.8)
    middle.set(title="Log-ratio to the rollout policy", xlabel="optimizer step", ylabel="nats per completion")
    middle.legend()
    names = [judge.replace(" (", "\n(") for judge in results]
    means = [result.mean for result in results.values()]
    errors = [[r.mean - r.low for r in results.values()], [r.high - r.mean for r in results.values()]]
    right.bar(names, means, yerr=errors, capsize=6, color=["tab:blue", "tab:orange"], width=0.5)
    right.axhline(0.5, color="grey", linewidth=0.8)
    right.set(title="Win rate against the initial policy", ylim=(0, 1), ylabel="held-out prompts, 95 % interval")
    figure.savefig(path, dpi=120)
    plt.close(figure)
