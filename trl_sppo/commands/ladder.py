"""`trl-sppo ladder`: the policies of a run against each other."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ..arguments.options import fail
from ..errors import RunError
from ..evaluation.files import prompts_of, write_groups
from ..evaluation.ladder import Matrix, climb, draw, stored_players, verdict
from ..evaluation.policies import check_policy, read_prompts, sample
from ..files import read_beginning, write_atomically
from ..runs.checkpoints import checkpoints_of_run
from ..tables import as_table
from .judging import JudgeArguments, RunArguments, parse_run


SAMPLED = "ladder"  # folder in the run, for the completions of checkpoints that no evaluation sampled


@dataclass
class LadderArguments(JudgeArguments, RunArguments):
    """Options of `trl-sppo ladder`."""


def main(argv: list[str]) -> int:
    """Run `trl-sppo ladder` and return its exit status."""
    try:
        run, args = parse_run(LadderArguments, "trl-sppo ladder", argv, _sampling_of)
        ladders = climb_run(run, args)
    except (ValueError, ImportError, OSError, RunError) as error:
        fail(error)
    for judge, matrix in ladders.items():
        steps = sorted(matrix, key=int)
        rows = [[a, *("-" if a == b else f"{matrix[a][b].mean:.3f}" for b in steps)] for a in steps]
        print(f"\n{judge}: win rate of the row against the column\n{as_table(['step', *steps], rows)}")
        print("\n".join(verdict(matrix)))
    write_atomically(run / "ladder.json", json.dumps(ladders, default=vars, indent=2) + "\n")
    draw(ladders).savefig(run / "ladder.png", dpi=120)
    print(f"\nSaved ladder.json and ladder.png in {run}.")
    return 0


def climb_run(run: Path, args: LadderArguments) -> dict[str, Matrix]:
    """Let all policies of a run play against each other. Raises `ValueError` if there are fewer than two."""
    players = stored_players(run, args.evaluation_set)
    missing = {step: path for step, path in sorted(checkpoints_of_run(str(run)).items()) if step not in players}
    panel = None
    if args.has_judges:
        prompts = prompts_of(next(iter(players.values()))) if players else args.load_prompts()
        template = cast(Any, args.chat_template_kwargs)
        panel = args.load_panel(prompts["prompt"][0], prompts.column_names, template, args.both_orders)
        for checkpoint in missing.values():
            check_policy(str(checkpoint), args.trust_remote_code, args.use_vllm)
            read_prompts(str(checkpoint), prompts, args)
        panel.check_prompts(prompts["prompt"])
        if missing:
            print(f"Completions of the checkpoints of steps {list(missing)} go to {run / SAMPLED}.", file=sys.stderr)
        for number, (step, checkpoint) in enumerate(missing.items()):
            players[step] = sample(str(checkpoint), prompts, replace(args, seed=args.seed + number))
            write_groups(run / SAMPLED / f"step-{step:06d}.parquet", players[step])
    elif missing:
        print(
            f"Left out: the checkpoints of steps {list(missing)}, which no evaluation sampled. Pass a judge "
            "(--reward_funcs ...) to sample them now, or train with eval_steps equal to save_steps.",
            file=sys.stderr,
        )
    if len(players) < 2:
        raise ValueError(
            f"a ladder needs two policies, but {str(run)!r} has only steps {sorted(players)}. Save more "
            "checkpoints (save_steps, save_total_limit), and evaluate them (eval_strategy) or pass a judge and "
            "--dataset_name to sample them now."
        )
    ladders = climb(players, panel)
    if not ladders:
        raise ValueError(
            "no reward source scored these evaluations, and the comparisons of pairwise oracles are not stored. Pass "
            "--preference_funcs or another judge."
        )
    return ladders


def _sampling_of(run: Path) -> dict[str, Any]:
    """The sampling options of a run's evaluations, as far as they are known."""
    config = read_beginning(str(run)).get("config", {})
    names = "max_completion_length", "temperature", "chat_template_kwargs", "hide_reasoning"
    found = {name: config.get(name) for name in names}
    found["num_generations"] = config.get("num_generations_eval") or config.get("num_generations")
    return {name: value for name, value in found.items() if value is not None}
