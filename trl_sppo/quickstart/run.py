"""`trl-sppo quickstart`: prepare, train on an ordinary recipe, and show the results of its evaluations."""

import json
import time
from pathlib import Path
from typing import Any

from transformers.trainer_utils import IntervalStrategy

from .. import train
from ..arguments import options
from ..evaluation.files import Groups
from ..evaluation.ladder import stored_players
from ..evaluation.play import play
from ..evaluation.statistics import WinRate
from ..runs.report import curve, write_report
from ..tables import as_table
from . import assets


FOLDER = Path("quickstart")
EXAMPLES = 4
JUDGES = {
    "vader": "VADER (not trained on)",
    "on_topic": "on topic (not trained on)",
    "reward_model": "reward model (trained on)",
    "relevance": "relevance (trained on)",
}


def main(argv: list[str]) -> None:
    """Run the quickstart in the working directory. `argv` overrides options of its recipe."""
    start = time.monotonic()
    with assets.recipe("quickstart.yaml") as recipe:
        argv = ["--config", str(recipe), *argv]
        args = options.check_arguments(argv)  # before anything is prepared
        if not args.save_rollouts or args.eval_strategy == IntervalStrategy.NO:
            options.fail(
                "the quickstart shows its evaluations, which save_rollouts=False and eval_strategy='no' do not leave. "
                "Remove this option, or use `trl-sppo train`."
            )
        print("\n1/3 Preparing models and prompts")
        assets.prepare(FOLDER)
        print("\n2/3 Training with SPPO")
        trainer = train.main(argv)
    history, output_dir = trainer.state.log_history, Path(trainer.args.output_dir)
    del trainer

    print("\n3/3 The trained policy against the initial one, on held-out prompts")
    players = stored_players(output_dir)  # the evaluations of the training
    initial, trained = players[0], players[max(players)]
    played = play(trained, initial)
    results = {judge: played[judge][0] for judge in sorted(played, key=[*JUDGES, *played].index)}
    (output_dir / "win_rates.json").write_text(json.dumps(results, default=vars, indent=2) + "\n")
    _draw(output_dir / "quickstart.png", history, results)
    write_report(output_dir)
    _show(initial, trained, results)
    saved = "the adapter, report.html, quickstart.png, win_rates.json, and all completions in evaluations"
    print(f"\nSaved in {output_dir}: {saved} ({time.monotonic() - start:.0f} s in all)")


def _show(initial: Groups, trained: Groups, results: dict[str, WinRate]) -> None:
    def cell(group: dict[str, Any]) -> str:
        scores = [group["scores"][name][0] for name in ("reward_model", "relevance")]  # None if there is none
        texts = ["no score" if score is None else f"{score:+.2f}" for score in scores]
        return f"{group['completions'][0][0]['content'].strip()} ({', '.join(texts)})"

    pairs = list(zip(initial, trained, strict=True))[:EXAMPLES]
    examples = [[before["prompt"][-1]["content"], cell(before), cell(after)] for before, after in pairs]
    print("\nHeld-out prompts, first completion of each policy (scores: reward model, relevance)\n")
    print(as_table(["prompt", "initial", "trained"], examples, width=118))
    print("\nWin rate of the trained policy against the initial one\n")
    rows = [[JUDGES.get(judge, judge), str(rate), str(rate.num_prompts)] for judge, rate in results.items()]
    print(as_table(["judge", "win rate, 95 % interval", "prompts"], rows))


def _draw(path: Path, history: list[dict], results: dict[str, WinRate]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name in ("reward_model", "relevance"):
        left.plot(*curve(history, f"rewards/{name}/mean"), marker="o", label=name.replace("_", " "))
    left.set(title="Scores of the rollouts", xlabel="optimizer step", ylabel="mean")
    left.legend()
    middle.plot(*curve(history, "winner_log_ratio"), marker="o", color="tab:green", label="winners")
    middle.plot(*curve(history, "loser_log_ratio"), marker="o", color="tab:red", label="losers")
    middle.axhline(0, color="grey", linewidth=0.8)
    middle.set(title="Log-ratio to the rollout policy", xlabel="optimizer step", ylabel="nats per completion")
    middle.legend()
    names = [JUDGES.get(judge, judge).replace(" (", "\n(") for judge in results]
    colors = ["tab:green" if "not trained" in name else "tab:grey" for name in names]
    errors = [[r.mean - r.low for r in results.values()], [r.high - r.mean for r in results.values()]]
    right.bar(names, [rate.mean for rate in results.values()], yerr=errors, capsize=6, color=colors, width=0.5)
    right.axhline(0.5, color="grey", linewidth=0.8)
    right.tick_params(axis="x", labelsize="small")
    right.set(title="Win rate against the initial policy", ylim=(0, 1), ylabel="held-out prompts, 95 % interval")
    figure.savefig(path, dpi=120)
