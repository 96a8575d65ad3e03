"""`trl-sppo ladder`: the policies of a run against each other. Is each harder to beat than the last?"""

import json
import sys
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import Any, cast

from datasets import Dataset

from .checkpoints import checkpoints_of_run, read_beginning, write_atomically
from .checks import check_vllm_is_installed
from .matches import JudgeArguments, parse, prompts_of, write_groups
from .evaluation import WinRate
from .opponents import EvaluationFiles, Groups, play_stored
from .policies import check_policy, read_prompts, sample
from .train import fail


# matrix[a][b]: win rate of a against b
Matrix = dict[str, dict[str, WinRate]]


@dataclass
class LadderArguments(JudgeArguments):
    """
    Arguments of `trl-sppo ladder`, besides those of [`JudgeArguments`].

    Args:
        evaluation_set (`str`, *optional*):
            Which one, of a run with several.
    """

    evaluation_set: str | None = field(
        default=None, metadata={"help": "Evaluation set, of a run with several. By default the first."}
    )


def main(argv: list[str]) -> int:
    """Run `trl-sppo ladder` and return its exit status."""
    try:
        run, argv = run_and_options(argv, "trl-sppo ladder")
        check_matplotlib("trl-sppo ladder")
        args = parse(LadderArguments, "trl-sppo ladder RUN", argv, defaults=_sampling_of(run))
        ladders = climb(run, args)
        if not ladders:
            raise ValueError(
                "no reward source has scored these evaluations, and what pairwise oracles say of two policies is not "
                "kept: give --preference_funcs, or another judge."
            )
    except KeyboardInterrupt:
        kept = _sampled(run, 0).parent
        said = f"Completions that were sampled are in {kept}, for `trl-sppo eval`." if kept.exists() else ""
        raise KeyboardInterrupt(f"interrupted. {said}".strip()) from None
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    for judge, matrix in ladders.items():
        print(f"\n{judge}: win rate of the row against the column\n{as_text(matrix)}")
        print("\n".join(verdict(matrix)))
    facts = {
        judge: {a: {b: vars(rate) for b, rate in row.items()} for a, row in matrix.items()}
        for judge, matrix in ladders.items()
    }
    write_atomically(run / "ladder.json", json.dumps(facts, indent=2) + "\n")
    figure = draw(ladders)
    figure.savefig(run / "ladder.png", dpi=120)
    print(f"\nSaved ladder.json and ladder.png in {run}.")
    return 0


def run_and_options(argv: list[str], prog: str) -> tuple[Path, list[str]]:
    """The run's folder, which comes first, and the options. Raises `ValueError` if it is none."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        raise ValueError(f"give the output directory of a run first: {prog} RUN.")
    if argv[0] in ("-h", "--help"):
        return Path(), argv
    run = Path(argv[0])
    if not run.is_dir():
        raise ValueError(f"{argv[0]!r} is no folder: give the output directory of a run.")
    return run, argv[1:]


def check_matplotlib(prog: str) -> None:
    if find_spec("matplotlib") is None:
        raise ImportError(f"`{prog}` draws with matplotlib, which is not installed: pip install 'trl-sppo[report]'.")


def climb(run: Path, args: LadderArguments) -> dict[str, Matrix]:
    """
    Let all policies of a run play against each other.

    Args:
        run (`Path`):
            Its output directory, with evaluations, or with checkpoints that are sampled now.
        args ([`LadderArguments`]):
            Options. With judges, they score all completions; without, those of the evaluations count.

    Returns:
        `dict`: a matrix of win rates by judge.

    Raises:
        `ValueError`: if fewer than two policies can play.
    """
    players = stored_players(run, args.evaluation_set)
    checkpoints = checkpoints_of_run(str(run))
    missing = sorted(checkpoints.keys() - players.keys())
    if args.has_judges:
        prompts = _prompts(players, args)
        panel = args.load_panel(prompts["prompt"][0], prompts.column_names, cast(Any, args.chat_template_kwargs))
        if missing and args.use_vllm:
            check_vllm_is_installed()
        for step in missing:
            check_policy(str(checkpoints[step]), args.trust_remote_code, args.use_vllm)
            read_prompts(str(checkpoints[step]), prompts, args.sampling)
        panel.check_prompts(prompts["prompt"])
        for number, step in enumerate(missing):
            sampling = replace(args.sampling, seed=args.seed + number)
            players[step] = sample(str(checkpoints[step]), prompts, sampling)
            write_groups(_sampled(run, step), players[step])
        for groups in players.values():
            panel.score(groups)
    elif missing:
        print(
            f"Left out: the checkpoints of steps {missing}, which no evaluation has sampled. With judges "
            "(--reward_funcs ...) they are sampled now; eval_steps equal to save_steps does it during the training.",
            file=sys.stderr,
        )
    if len(players) < 2:
        cure = (
            "Save more checkpoints (save_steps, save_total_limit); `trl-sppo eval` plays one against the policy that "
            "the run began with."
            if args.has_judges
            else "Train with eval_strategy, or give judges and --dataset_name to sample the checkpoints now."
        )
        raise ValueError(
            f"a ladder needs two policies, and {str(run)!r} has {len(players)} to play: "
            f"{'checkpoints' if args.has_judges else 'evaluations'} of steps {sorted(players)}. {cure}"
        )
    ladders: dict[str, Matrix] = {}
    for a, b in combinations(sorted(players), 2):
        results = panel.compare(players[b], players[a]) if args.has_judges else play_stored(players[b], players[a])
        for judge, (rate, _) in results.items():
            matrix = ladders.setdefault(judge, {str(step): {} for step in sorted(players)})
            matrix[str(b)][str(a)] = rate
            matrix[str(a)][str(b)] = WinRate(1 - rate.mean, 1 - rate.high, 1 - rate.low, rate.num_prompts)
    # A judge may not have scored all of them: those that it has not played for are no rungs of its ladder
    return {
        judge: {a: row for a, row in matrix.items() if row and len(row) == max(map(len, matrix.values()))}
        for judge, matrix in ladders.items()
    }


def which_evaluation_set(run: Path, evaluation_set: str | None) -> str:
    """The name of the one asked for, or of the first; `"."` if there is only one. `ValueError` if it is unknown."""
    names = EvaluationFiles(str(run)).names()
    if evaluation_set is not None and evaluation_set not in names:
        raise ValueError(f"evaluation_set={evaluation_set!r} is none of this run's: {names}.")
    return evaluation_set or (names[0] if names else ".")


def stored_players(run: Path, evaluation_set: str | None = None) -> dict[int, Groups]:
    """The evaluations of a run by step. Raises `ValueError` for an unknown evaluation set."""
    files = EvaluationFiles(str(run))
    name = which_evaluation_set(run, evaluation_set)
    found = {step: files.read(name, step) for step in files.steps(name)}
    return {step: groups for step, groups in found.items() if groups}


def _sampled(run: Path, step: int) -> Path:
    """Where completions of a checkpoint are written that no evaluation has sampled."""
    return run / "ladder" / f"step-{step:06d}.parquet"


def _prompts(players: dict[int, Groups], args: LadderArguments) -> Dataset:
    return prompts_of(next(iter(players.values()))) if players else args.load_prompts()


def _sampling_of(run: Path) -> dict[str, Any]:
    """How a run has sampled for its evaluations, as far as it says so."""
    config = read_beginning(str(run)).get("config", {})
    found = {name: config.get(name) for name in ("max_completion_length", "temperature", "chat_template_kwargs")}
    found["num_generations"] = config.get("num_generations_eval") or config.get("num_generations")
    return {name: value for name, value in found.items() if value is not None}


def circles(matrix: Matrix) -> list[tuple[tuple[str, str, str], WinRate]]:
    """Triples in which each beats the next and the last the first, with the weakest of the three win rates."""
    found = []
    for a, b, c in permutations(matrix, 3):
        rates = [matrix[x].get(y) for x, y in ((a, b), (b, c), (c, a))]
        if a == min((a, b, c), key=int) and all(rate is not None and rate.mean > 0.5 for rate in rates):
            known = [rate for rate in rates if rate is not None]
            found.append(((a, b, c), min(known, key=lambda rate: rate.mean)))
    return found


def verdict(matrix: Matrix) -> list[str]:
    """What a matrix of win rates says, in words."""
    steps = sorted(matrix, key=int)
    lines = []
    pairs = [*pairwise(steps), (steps[0], steps[-1])]
    for earlier, later in dict.fromkeys(pairs):
        rate = matrix[later][earlier]
        word = "beats" if rate.low > 0.5 else "loses to" if rate.high < 0.5 else "cannot be told from"
        lines.append(f"step {later} {word} step {earlier}: {rate}")
    found = circles(matrix)
    sure = [circle for circle in found if circle[1].low > 0.5]
    for (a, b, c), rate in sure:
        lines.append(f"circle: step {a} beats {b}, {b} beats {c}, {c} beats {a} (weakest: {rate})")
    if not found:
        lines.append("no circles: the later win rates are what the earlier ones promise")
    elif not sure:
        lines.append(f"{len(found)} circle(s), none beyond the noise of {found[0][1].num_prompts} prompts")
    return lines


def as_text(matrix: Matrix) -> str:
    steps = sorted(matrix, key=int)
    lines = ["step".rjust(8) + "".join(step.rjust(8) for step in steps)]
    for a in steps:
        cells = ["-" if a == b else f"{matrix[a][b].mean:.3f}" for b in steps]
        lines.append(a.rjust(8) + "".join(cell.rjust(8) for cell in cells))
    return "\n".join(lines)


def draw(ladders: dict[str, Matrix]) -> Any:
    """A matplotlib figure with a matrix for each judge."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(ladders), 4), layout="constrained")
    axes = figure.subplots(1, len(ladders), squeeze=False)[0]
    for axis, (judge, matrix) in zip(axes, ladders.items(), strict=True):
        steps = sorted(matrix, key=int)
        values = [[0.5 if a == b else matrix[a][b].mean for b in steps] for a in steps]
        image = axis.imshow(values, cmap="RdBu", vmin=0, vmax=1)
        axis.set(title=f"{judge}", xlabel="opponent: step", ylabel="policy: step")
        axis.set_xticks(range(len(steps)), steps)
        axis.set_yticks(range(len(steps)), steps)
        if len(steps) <= 12:
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    if i != j:
                        colour = "white" if abs(value - 0.5) > 0.3 else "black"
                        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=list(axes), label="win rate of the row against the column", shrink=0.8)
    return figure
