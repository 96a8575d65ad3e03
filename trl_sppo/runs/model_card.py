"""Model card: TRL's text, the training, and the win rates against the initial model."""

import re
import textwrap
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import write_atomically


RATE = re.compile(r"eval_(?:(?P<set>.+?)_)?win_rate_vs_initial/(?P<judge>.+)")
PAPER = {
    "title": "Self-Play Preference Optimization for Language Model Alignment",
    "id": "2405.00675",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @inproceedings{wu2025selfplay,
            title        = {{Self-Play Preference Optimization for Language Model Alignment}},
            author       = {Yue Wu and Zhiqing Sun and Huizhuo Yuan and Kaixuan Ji and Yiming Yang and
                            Quanquan Gu},
            year         = 2025,
            booktitle    = {International Conference on Learning Representations},
            eprint       = {arXiv:2405.00675},
        }"""),
}


def add_to_card(path: Path, trainer: Any) -> None:
    """Add the training and the win rates of a trainer's log to a model card that TRL has just written."""
    text = path.read_text()
    # TRL has no name for a model that is loaded from, or saved to, a folder only
    text = text.replace("[None](https://huggingface.co/None)", "a model in a folder")
    text = text.replace('model="None"', f'model="{path.parent.resolve().name}"')
    text = text.replace("- TRL: ", f"- TRL-SPPO: {__version__}\n- TRL: ", 1)
    before, heading, after = text.partition("### Framework versions")
    write_atomically(path, f"{before}{_training(trainer)}\n\n{_win_rates(trainer)}\n\n{heading}{after}")


def last_win_rates(history: list[dict[str, Any]]) -> dict[tuple[str | None, str], dict[str, Any]]:
    """The last win rates against the initial policy in a log, by evaluation set (`None` if there is one) and judge."""
    found = {}
    for row in history:
        for name in row:
            match = RATE.fullmatch(name)
            if match and f"{name}/low" in row:
                parts = {part: row[f"{name}/{part}"] for part in ("low", "high", "length_controlled")}
                found[match["set"], match["judge"]] = {"step": row["step"], "mean": row[name], **parts}
    return found


def _training(trainer: Any) -> str:
    args, described = trainer.args, trainer.describe()
    voters = [*described["reward_sources"], *described["preference_funcs"]]
    trained_on = args.train_on
    if args.win_rate_threshold is not None:
        trained_on = f"win rates from {args.win_rate_threshold:g}, and up to {1 - args.win_rate_threshold:g}"
    adapter = "none"
    if hasattr(trainer.model, "peft_config"):
        config = next(iter(trainer.model.peft_config.values()))
        adapter = config.peft_type.value + (f", r = {config.r}" if hasattr(config, "r") else "")
    if trainer.adapter:
        adapter += f", continued from {trainer.policy_name}"
    rows = {
        "win rates from": ", ".join(name for name in voters if name not in described["without_vote"]),
        "eta (1 / beta of DPO)": f"{args.eta:g}",
        "completions per prompt": args.num_generations,
        "trained on": trained_on,
        "comparison, loss, baseline": f"{args.comparison}, {args.loss_type}, {args.baseline}",
        "KL to the initial model": f"{args.beta:g}",
        "sampling": f"temperature {args.temperature:g}, at most {args.max_completion_length} tokens",
        "completions per iteration": args.generation_batch_size,
        "optimizer steps": trainer.state.global_step,
        "learning rate": f"{args.learning_rate:g}",
        "seed": args.seed,
        "adapter": adapter,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"### How\n\n| | |\n|---|---|\n{table}"


def _win_rates(trainer: Any) -> str:
    heading = "### Win rates against the model it started from\n\n"
    rates = last_win_rates(trainer.state.log_history)
    if not rates:
        return heading + "Not measured in this training. `trl-sppo eval` compares two models."
    described = trainer.describe()
    trained_on = {*described["reward_sources"], *described["preference_funcs"]} - set(described["without_vote"])
    several = len({each for each, _ in rates}) > 1
    lines = [
        heading + "On held-out prompts, with 95 % intervals. A judge that it was trained on proves little.\n",
        "| judge | trained on | win rate | at equal length | optimizer step |",
        "|---|---|---|---|---|",
    ]
    for (evaluation_set, judge), rate in rates.items():
        place = f" ({evaluation_set})" if several else ""
        interval = f"{rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
        yes_or_no = "yes" if judge in trained_on else "no"
        lines.append(
            f"| {judge}{place} | {yes_or_no} | {interval} | {rate['length_controlled']:.3f} | {rate['step']} |"
        )
    return "\n".join(lines)
