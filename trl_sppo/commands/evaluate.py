"""`trl-sppo eval`: one policy against another, on the same prompts, under one or several judges."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..arguments.options import fail
from ..errors import RunError
from ..evaluation.files import row_of
from ..evaluation.matches import check_sides, play_match, prompts_of, read_files, templates_of
from ..evaluation.policies import read_prompts
from ..evaluation.statistics import WinRate
from ..runs.alone import alone_in
from ..tables import as_table
from .judging import JudgeArguments, parse


@dataclass
class EvalArguments(JudgeArguments):
    """Options of `trl-sppo eval`. The metadata describes each."""

    model_name_or_path: str = field(
        default="", metadata={"help": "Policy: a model, an adapter, or a file of completions."}
    )
    opponent_name_or_path: str = field(
        default="", metadata={"help": "Its opponent: a model, an adapter, or a file of completions."}
    )
    output_dir: str = field(default="eval", metadata={"help": "Folder for the completions and the results."})
    at_least: float | None = field(
        default=None, metadata={"help": "Exit with status 1 if the lower bound of a win rate is below this value."}
    )


def main(argv: list[str]) -> int:
    """Run `trl-sppo eval` and return its exit status."""
    try:
        args = parse(EvalArguments, "trl-sppo eval", argv)
        results = evaluate(args)
    except (ValueError, ImportError, OSError, RunError) as error:
        fail(error)
    low = min(plain.low for plain, _ in results.values())
    if args.at_least is not None and low < args.at_least:
        print(f"The lowest bound is {low:.3f}, below --at_least {args.at_least}.", file=sys.stderr)
        return 1
    return 0


def evaluate(args: EvalArguments) -> dict[str, tuple[WinRate, WinRate]]:
    """
    Compare two policies, write completions and results to `args.output_dir`, and print tables. Returns the win rate
    and the length-controlled win rate by judge. Raises `ValueError` if the two cannot be compared, mostly before a
    model is loaded.
    """
    sides = {"model": args.model_name_or_path, "opponent": args.opponent_name_or_path}
    check_sides(sides, args.output_dir, args)
    players = read_files(sides)
    first = next(iter(players.values()), None)
    prompts = args.load_prompts() if first is None else prompts_of(first[: args.max_prompts])
    players = {side: groups[: len(prompts)] for side, groups in players.items()}
    templates = templates_of(sides, args.chat_template_kwargs, prompts["prompt"][0])
    samplings = {
        # Another seed for each side: the same policy must not be compared with the same completions
        side: replace(args, seed=args.seed + number, chat_template_kwargs=templates[side])
        for number, side in enumerate(sides)
        if side not in players
    }
    for side, sampling in samplings.items():  # before anything is sampled
        read_prompts(sides[side], prompts, sampling)
    panel = None
    if args.has_judges or samplings or not all("scores" in group for groups in players.values() for group in groups):
        columns = [set(prompts.column_names), *(set(row_of(groups[0])) for groups in players.values())]
        template = next((each for each in templates.values() if each), None)
        panel = args.load_panel(prompts["prompt"][0], set.intersection(*columns), template)
        panel.check_prompts(prompts["prompt"])
    folder = Path(args.output_dir)
    with alone_in(args.output_dir):
        if samplings:
            files = " and ".join(f"--{side}_name_or_path {folder / side}.parquet" for side in samplings)
            print(f"Completions are kept once they are sampled, also after an error: {files}", file=sys.stderr)
        results, facts = play_match(sides, players, prompts, samplings, panel, folder)
    rows = [[side, sides[side], f"{facts['mean_length'][side]:.1f} {facts['unit_of_length']}"] for side in sides]
    print(f"{as_table(['', 'policy', 'mean length'], rows)}\n")
    rows = [[judge, f"{a}", f"{b}", f"{a.num_prompts}"] for judge, (a, b) in results.items()]
    print(f"{as_table(['judge', 'win rate, 95 % interval', 'length-controlled', 'prompts'], rows)}\n")
    print(f"Saved in {folder}: win_rates.json, model.parquet, opponent.parquet.")
    return results
