"""The model card: how the model was trained, and how often it beats the one it started from, besides TRL's text."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files import write_atomically


RATE = re.compile(r"eval_(?:(?P<set>.+?)_)?win_rate_vs_initial/(?P<judge>.+)")


def add_to_card(path: Path, trainer: Any) -> None:
    """Add the training and the win rates of a trainer's log to a model card that TRL has just written."""
    text = path.read_text()
    # TRL has no name for a model that was loaded from a folder, nor for one that goes nowhere but into a folder
    text = text.replace("[None](https://huggingface.co/None)", "a model in a folder")
    text = text.replace('model="None"', f'model="{path.parent.resolve().name}"')
    text = text.replace("- TRL: ", f"- TRL-SPPO: {version('trl_sppo')}\n- TRL: ", 1)
    own = "\n\n".join([_training(trainer), _win_rates(trainer)])
    before, heading, after = text.partition("### Framework versions")
    write_atomically(path, f"{before}{own}\n\n{heading}{after}")


def _training(trainer: Any) -> str:
    args, described = trainer.args, trainer.describe()
    voters = [*described["reward_sources"], *described["preference_funcs"]]
    without_vote = set(described["without_vote"])
    adapter = next(iter(getattr(trainer.model, "peft_config", {}).values()), None)
    rows = {
        "win rates from": ", ".join(name for name in voters if name not in without_vote),
        "eta (1 / beta of DPO)": f"{args.eta:g}",
        "completions per prompt": args.num_generations,
        "trained on": args.train_on
        if args.win_rate_threshold is None
        else f"win rates from {args.win_rate_threshold:g}, and up to {1 - args.win_rate_threshold:g}",
        "comparison, loss, baseline": f"{args.comparison}, {args.loss_type}, {args.baseline}",
        "KL to the initial model": f"{args.beta:g}",
        "sampling": f"temperature {args.temperature:g}, at most {args.max_completion_length} tokens",
        "completions per iteration": args.generation_batch_size,
        "optimizer steps": trainer.state.global_step,
        "learning rate": f"{args.learning_rate:g}",
        "seed": args.seed,
        "adapter": "none" if adapter is None else _adapter(adapter, trainer),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"### How\n\n| | |\n|---|---|\n{table}"


def _adapter(config: Any, trainer: Any) -> str:
    rank = f", r = {config.r}" if hasattr(config, "r") else ""
    continued = f", continued from {trainer.policy_name}" if trainer.adapter else ""
    return f"{config.peft_type.value}{rank}{continued}"


def _win_rates(trainer: Any) -> str:
    heading = "### Win rates against the model it started from\n\n"
    found: dict[tuple[str | None, str], tuple[int, dict[str, float]]] = {}
    for row in trainer.state.log_history:  # the last of each evaluation set counts
        for name in row:
            match = RATE.fullmatch(name)
            if match and f"{name}/low" in row:
                values = {part: row[name + part] for part in ("", "/low", "/high")}
                values["/length_controlled"] = row.get(f"{name}/length_controlled")
                found[match["set"], match["judge"]] = row["step"], values
    if not found:
        return heading + "Not measured in this training. `trl-sppo eval` compares two models."
    described = trainer.describe()
    trained_on = {*described["reward_sources"], *described["preference_funcs"]} - set(described["without_vote"])
    several = len({each for each, _ in found}) > 1
    lines = []
    for (evaluation_set, judge), (step, values) in found.items():
        controlled = values["/length_controlled"]
        cells = [
            f"{judge}{f' ({evaluation_set})' if several else ''}",
            "yes" if judge in trained_on else "no",
            f"{values['']:.3f} [{values['/low']:.3f}, {values['/high']:.3f}]",
            "" if controlled is None else f"{controlled:.3f}",
            str(step),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return (
        heading + "On held-out prompts, with 95 % intervals. A judge that it was trained on proves little.\n\n"
        "| judge | trained on | win rate | at equal length | optimizer step |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
    )
