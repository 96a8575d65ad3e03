"""`trl-sppo quickstart`: prepare, train on an ordinary recipe, and show the results of its evaluations."""

import json
import time
from pathlib import Path

from transformers.trainer_utils import IntervalStrategy

from .. import train
from ..arguments import options
from ..evaluation.files import Groups
from ..evaluation.ladder import stored_players
from ..evaluation.play import play_stored
from ..evaluation.statistics import WinRate
from ..runs.report import write_report
from ..tables import as_table
from . import assets


FOLDER = Path("quickstart")
EXAMPLES = 4
JUDGES = {
    "reward_model": "training reward model",
    "vader": "VADER (not trained on)",
    "on_topic": "on topic (not trained on)",
}


def main(argv: list[str]) -> None:
    """Run the quickstart in the working directory. `argv` overrides options of its recipe."""
    start = time.monotonic()
    with assets.recipe("quickstart.yaml") as recipe:
        argv = ["--config", str(recipe), *argv]
        args = options.check_arguments(argv)  # before anything is prepared
        strategy = IntervalStrategy(args.eval_strategy).value
        if not args.save_rollouts or strategy == "no":
            options.fail(
                f"the quickstart shows the results of its evaluations, and save_rollouts={args.save_rollouts} or "
                f"eval_strategy={strategy} leaves none. Remove this option, or use `trl-sppo train`."
            )
        print("\n1/3 Preparing models and prompts")
        assets.prepare(FOLDER)
        print("\n2/3 Training with SPPO")
        trainer = train.main(argv)
    args = trainer.args
    history = trainer.state.log_history
    del trainer

    print("\n3/3 The trained policy against the initial one, on held-out prompts")
    output_dir = Path(args.output_dir)
    players = stored_players(output_dir)  # the evaluations of the training
    initial, trained = players[0], players[max(players)]
    results = {judge: plain for judge, (plain, _) in play_stored(trained, initial).items()}
    win_rates = {judge: vars(result) for judge, result in results.items()}
    (output_dir / "win_rates.json").write_text(json.dumps(win_rates, indent=2) + "\n")
    _draw(output_dir / "quickstart.png", history, results)
    write_report(output_dir)
    _show(initial, trained, results)
    print(
        f"\nSaved in {output_dir}: the adapter, report.html, quickstart.png, win_rates.json, and all completions in "
        f"evaluations ({time.monotonic() - start:.0f} s in all)"
    )


def _show(initial: Groups, trained: Groups, results: dict[str, WinRate]) -> None:
    examples = []
    for before, after in list(zip(initial, trained, strict=True))[:EXAMPLES]:
        cells = [
            f"{group['completions'][0][0]['content'].strip()} ({group['scores']['reward_model'][0]:+.2f})"
            for group in (before, after)
        ]
        examples.append([before["prompt"][-1]["content"], *cells])
    print("\nHeld-out prompts, first completion of each policy (score of the reward model)\n")
    print(as_table(["prompt", "initial", "trained"], examples, width=118))
    print("\nWin rate of the trained policy against the initial one\n")
    rows = [[JUDGES.get(judge, judge), str(rate), str(rate.num_prompts)] for judge, rate in results.items()]
    print(as_table(["judge", "win rate, 95 % interval", "prompts"], rows))


def _draw(path: Path, history: list[dict], results: dict[str, WinRate]) -> None:
    from matplotlib.figure import Figure

    def curve(axis, name: str, **kwargs) -> None:
        points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
        axis.plot(*zip(*points, strict=True), marker="o", **kwargs)

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    curve(left, "reward", color="tab:blue")
    left.set(title="Reward of the rollouts", xlabel="optimizer step", ylabel="mean score")
    curve(middle, "winner_log_ratio", color="tab:green", label="winners")
    curve(middle, "loser_log_ratio", color="tab:red", label="losers")
    middle.axhline(0, color="grey", linewidth=0.8)
    middle.set(title="Log-ratio to the rollout policy", xlabel="optimizer step", ylabel="nats per completion")
    middle.legend()
    names = [JUDGES.get(judge, judge).replace(" (", "\n(") for judge in results]
    means = [result.mean for result in results.values()]
    errors = [[r.mean - r.low for r in results.values()], [r.high - r.mean for r in results.values()]]
    right.bar(names, means, yerr=errors, capsize=6, color=["tab:blue", "tab:orange", "tab:green"], width=0.5)
    right.axhline(0.5, color="grey", linewidth=0.8)
    right.tick_params(axis="x", labelsize="small")
    right.set(title="Win rate against the initial policy", ylim=(0, 1), ylabel="held-out prompts, 95 % interval")
    figure.savefig(path, dpi=120)
