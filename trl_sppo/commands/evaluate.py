"""`trl-sppo eval`: one policy against another, on the same prompts, under one or several judges."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging
from trl.data_utils import is_conversational

from ..arguments.options import fail
from ..arguments.recipes import check_output_dir
from ..errors import RunError
from ..evaluation.files import Groups, mean_length, prompts_of, row_of, write_groups
from ..evaluation.play import aligned, play, score_groups
from ..evaluation.policies import check_policy, load_completions, read_prompts, run_of, sample
from ..evaluation.statistics import WinRate
from ..files import write_atomically
from ..runs.alone import alone_in
from ..tables import as_table
from .judging import JudgeArguments, parse


logger = logging.get_logger(__name__)


@dataclass
class EvalArguments(JudgeArguments):
    """Options of `trl-sppo eval`. The metadata describes each."""

    model_name_or_path: str = field(default="", metadata={"help": "A model, an adapter, or a file of completions."})
    opponent_name_or_path: str = field(default="", metadata={"help": "Its opponent, given in the same way."})
    output_dir: str = field(default="eval", metadata={"help": "Folder for the completions and the results."})
    at_least: float | None = field(
        default=None, metadata={"help": "Exit with status 1 if the lower bound of a win rate is below this value."}
    )


def main(argv: list[str]) -> int:
    """Run `trl-sppo eval` and return its exit status."""
    try:
        args = parse(EvalArguments, "trl-sppo eval", argv)
        results = evaluate(args)
    except (ValueError, ImportError, OSError, RunError, torch.OutOfMemoryError) as error:
        fail(error)
    low = min(plain.low for plain, _ in results.values())
    if args.at_least is not None and low < args.at_least:
        print(f"The lowest bound is {low:.3f}, below --at_least {args.at_least}.", file=sys.stderr)
        return 1
    return 0


def evaluate(args: EvalArguments) -> dict[str, tuple[WinRate, WinRate]]:
    """
    Compare two policies, write completions and results to `args.output_dir`, and print tables. Returns the win rate
    and the length-controlled win rate by judge. Raises `ValueError` if the two cannot be compared.
    """
    sides = {"model": args.model_name_or_path, "opponent": args.opponent_name_or_path}
    folder = Path(args.output_dir)
    check_output_dir(args.output_dir)
    for side, policy in sides.items():
        if not policy:
            raise ValueError(f"{side}_name_or_path is missing. Pass a model, an adapter, or a file of completions.")
        check_policy(policy, args.trust_remote_code, args.use_vllm)
        if Path(policy).resolve().parent == folder.resolve():
            raise ValueError(
                f"{side}_name_or_path={policy!r} lies in output_dir={args.output_dir!r}, where its files would be "
                "overwritten. Pass another output_dir."
            )
    players = {side: load_completions(policy) for side, policy in sides.items() if Path(policy).is_file()}
    if len(players) == 2:
        players = dict(zip(players, aligned(*players.values()), strict=True))
    first = next(iter(players.values()), None)
    prompts = args.load_prompts() if first is None else prompts_of(first[: args.max_prompts])
    players = {side: groups[: len(prompts)] for side, groups in players.items()}
    templates = _templates_of(sides, args.chat_template_kwargs, prompts["prompt"][0])
    hide = args.hide_reasoning
    if hide is None and any(run_of(each).get("config", {}).get("hide_reasoning") is False for each in sides.values()):
        hide = False  # as in the training, and for both sides alike
    samplings = {
        # A seed for each side, or a policy would be compared with its own completions
        side: replace(args, seed=args.seed + number, chat_template_kwargs=templates[side], hide_reasoning=hide)
        for number, side in enumerate(sides)
        if side not in players
    }
    for side, sampling in samplings.items():  # before anything is sampled
        read_prompts(sides[side], prompts, sampling)
    panel = None
    if args.has_judges or samplings or not all("scores" in group for groups in players.values() for group in groups):
        columns = [set(prompts.column_names), *(set(row_of(groups[0])) for groups in players.values())]
        template = next((each for each in templates.values() if each), None)
        panel = args.load_panel(prompts["prompt"][0], set.intersection(*columns), template, args.both_orders)
        panel.check_prompts(prompts["prompt"])
    with alone_in(args.output_dir):
        if samplings:
            files = " and ".join(f"--{side}_name_or_path {folder / side}.parquet" for side in samplings)
            print(f"Completions are kept. To continue from them: {files}, another --output_dir", file=sys.stderr)
        for side, policy in sides.items():
            if side in samplings:
                players[side] = sample(policy, prompts, samplings[side])
                (folder / "win_rates.json").unlink(missing_ok=True)  # of other completions
                write_groups(folder / f"{side}.parquet", players[side])
            if panel is not None:
                score_groups(panel, players[side])
        unit = _unit_of_lengths(players)
        pair = players["model"], players["opponent"]
        results = play(*pair, panel)
        for side, groups in players.items():
            write_groups(folder / f"{side}.parquet", groups)
        if not results:
            raise ValueError("no judge gave both policies a score, so there is nothing to compare.")
        lengths = {side: mean_length(players[side]) for side in sides}
        table = {
            judge: {"win_rate": vars(plain), "length_controlled": vars(controlled)}
            for judge, (plain, controlled) in results.items()
        }
        facts = {"mean_length": lengths, "unit_of_length": unit, "num_prompts": len(prompts), "win_rates": table}
        write_atomically(folder / "win_rates.json", json.dumps({**sides, **facts}, indent=2) + "\n")
    rows = [[side, policy, f"{lengths[side]:.1f} {unit}"] for side, policy in sides.items()]
    print(f"{as_table(['', 'policy', 'mean length'], rows)}\n")
    rows = [[judge, f"{a}", f"{b}", f"{a.num_prompts}"] for judge, (a, b) in results.items()]
    print(f"{as_table(['judge', 'win rate, 95 % interval', 'length-controlled', 'prompts'], rows)}\n")
    print(f"Saved in {folder}: win_rates.json, model.parquet, opponent.parquet.")
    return results


def _templates_of(sides: dict[str, str], given: Any, prompt: Any) -> dict[str, Any]:
    """`chat_template_kwargs` by side: the given ones, or else its training's, or else the other side's."""
    if given is not None:
        return dict.fromkeys(sides, given)
    runs = {side: run_of(policy) for side, policy in sides.items() if not Path(policy).is_file()}
    known = {side: run["config"].get("chat_template_kwargs") for side, run in runs.items() if run}
    found = {side: known.get(side, next(iter(known.values()), None)) for side in runs}
    texts = {side: json.dumps(value, sort_keys=True) for side, value in found.items()}
    is_sure = len(known) == len(found) and len(set(texts.values())) == 1
    if any(found.values()) and not is_sure and is_conversational({"prompt": prompt}):
        logger.warning(
            f"chat_template_kwargs are {' and '.join(f'{text} for {side}' for side, text in texts.items())}, taken "
            f"from the training of {' and '.join(known)}. Reward models get the first. Pass --chat_template_kwargs to "
            "set them for all."
        )
    return found


def _unit_of_lengths(players: dict[str, Groups]) -> str:
    """Tokens, or words on both sides if the tokens of one are unknown. Words are counted here."""
    groups = [group for each in players.values() for group in each]
    if all("lengths" in group for group in groups):
        return "tokens"
    for group in groups:
        texts = [
            text if isinstance(text, str) else " ".join(message["content"] for message in text)
            for text in group["completions"]
        ]
        group["lengths"] = [len(text.split()) for text in texts]
    return "words"
