"""Matches: the completions of one policy against those of another, under the same judges."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl.data_utils import is_conversational

from ..arguments.recipes import check_output_dir
from ..checks.arguments import check_vllm_is_installed
from ..errors import RunError
from ..files import write_atomically
from ..oracles.panel import Panel
from ..rollouts.files import write_parquet
from .files import Groups, row_of, with_json, without_images
from .play import matched, play, play_stored, score_groups
from .policies import Sampling, check_policy, is_file, load_completions, run_of, sample
from .statistics import WinRate


# The sides of a match, "model" and "opponent": models, adapters, or files of completions
Sides = dict[str, str]


@dataclass
class Match:
    """The result of a match: win rates by judge, and facts about the completions of each side."""

    results: dict[str, tuple[WinRate, WinRate]]
    num_completions: dict[str, int]
    mean_length: dict[str, float]
    unit_of_length: str


def check_sides(sides: Sides, output_dir: str, sampling: Sampling) -> None:
    """Raise `ValueError` if a side cannot play. No weights are loaded."""
    if sampling.use_vllm:
        check_vllm_is_installed()
    for side, policy in sides.items():
        if not policy:
            raise ValueError(f"{side}_name_or_path is missing. Pass a model, an adapter, or a file of completions.")
        check_policy(policy, sampling.trust_remote_code, sampling.use_vllm)
    check_output_dir(output_dir)
    for side, policy in sides.items():
        if Path(policy).resolve().parent == Path(output_dir).resolve():
            raise ValueError(
                f"{side}_name_or_path={policy!r} lies in output_dir={output_dir!r}, where its files would be "
                "overwritten. Pass another output_dir."
            )


def read_files(sides: Sides) -> tuple[dict[str, Groups], int]:
    """The completions of the sides that are files, and the number of rows left out. Two files share their prompts."""
    files = {side: load_completions(policy) for side, policy in sides.items() if is_file(policy)}
    if len(files) < 2:
        return files, 0
    found = matched(*files.values())
    if not found[0]:
        raise ValueError("the two files of completions have no prompt in common.")
    return dict(zip(files, found, strict=True)), sum(map(len, files.values())) - sum(map(len, found))


def templates_of(sides: Sides, given: dict[str, Any] | None, prompt: Any) -> tuple[dict[str, Any], str]:
    """
    `chat_template_kwargs` by side, and a note, empty if there is nothing to say. Without the option they are those of
    the training of that side, or else of the other side.
    """
    if given is not None:
        return dict.fromkeys(sides, given), ""
    runs = {side: run_of(policy) for side, policy in sides.items() if not is_file(policy)}
    known = {side: run["config"].get("chat_template_kwargs") for side, run in runs.items() if run}
    found = {side: known.get(side, next(iter(known.values()), None)) for side in runs}
    if not is_conversational({"prompt": prompt}):
        return found, ""
    texts = {side: json.dumps(value, sort_keys=True) for side, value in found.items()}
    if len(set(texts.values())) > 1:
        return found, (
            "The two policies were trained with different chat_template_kwargs: "
            f"{' and '.join(f'{text} for {side}' for side, text in texts.items())}. Each is prompted as it was "
            "trained, and reward models as the first. Pass --chat_template_kwargs for the same prompts."
        )
    if len(known) == 1 < len(found) and any(found.values()):
        unknown = next(side for side in found if side not in known)
        return found, (
            f"The training of {unknown} is unknown. It is prompted with chat_template_kwargs={texts[unknown]}, as the "
            "other policy was in its training. Pass --chat_template_kwargs for other prompts."
        )
    return found, ""


def play_match(
    sides: Sides,
    players: dict[str, Groups],
    prompts: Dataset,
    samplings: dict[str, Sampling],
    panel: Panel | None,
    folder: Path,
) -> Match:
    """
    Sample the sides that are no files, judge both, and write completions and results to `folder`. Without judges, the
    scores in the files count. A `ValueError` says where the sampled completions are.
    """
    players = dict(players)
    sampled: dict[str, Path] = {}
    try:
        for side, policy in sides.items():
            if side in samplings:
                players[side] = sample(policy, prompts, samplings[side])
                (folder / "win_rates.json").unlink(missing_ok=True)  # of other completions
                write_groups(folder / f"{side}.parquet", players[side])
                sampled[side] = folder / f"{side}.parquet"
            if panel is not None:
                score_groups(panel, players[side])
        players = {side: players[side] for side in sides}
        unit = _unit_of_lengths(players)
        ours, theirs = players.values()
        results = play_stored(ours, theirs) if panel is None else play(ours, theirs, panel)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted. {_kept(sampled)}".strip()) from None
    except Exception as error:  # of a judge, or for memory: sampled completions are kept
        said = str(error) if isinstance(error, (ValueError, RunError)) else f"{type(error).__name__}: {error}."
        raise ValueError(f"{said} {_kept(sampled)}".strip()) from error
    for side, groups in players.items():
        write_groups(folder / f"{side}.parquet", groups)
    if not results:
        raise ValueError("no judge gave both policies a score, so there is nothing to compare.")
    sizes = {side: sum(len(group["completions"]) for group in groups) for side, groups in players.items()}
    lengths = {side: mean_length(groups) for side, groups in players.items()}
    table = {
        judge: {"win_rate": vars(plain), "length_controlled": vars(controlled)}
        for judge, (plain, controlled) in results.items()
    }
    facts = {**sides, "mean_length": lengths, "unit_of_length": unit, "num_prompts": len(prompts), "win_rates": table}
    write_atomically(folder / "win_rates.json", json.dumps(facts, indent=2) + "\n")
    return Match(results, sizes, lengths, unit)


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


def write_groups(path: Path, groups: Groups) -> None:
    """Write completions as Parquet, without images."""
    groups = [without_images(group) for group in groups]
    texts = [completion for group in groups for completion in group["completions"]]
    if any("tool_calls" in message for messages in texts if isinstance(messages, list) for message in messages):
        groups = [*map(with_json, groups)]
    write_parquet(path, groups, None)


def _kept(sampled: dict[str, Path]) -> str:
    if not sampled:
        return ""
    options = " and ".join(f"--{side}_name_or_path {path}" for side, path in sampled.items())
    return f"The completions are kept: {options}, with another --output_dir, continues from them."


def prompts_of(groups: Groups) -> Dataset:
    """The prompts of completions, with the other columns of the dataset."""
    return Dataset.from_list([row_of(group) for group in groups])


def mean_length(groups: Groups) -> float:
    """The mean length of all completions."""
    lengths = [length for group in groups for length in group["lengths"]]
    return sum(lengths) / len(lengths)
