"""Matches: the completions of one policy against those of another, under the same judges."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import logging
from trl.data_utils import is_conversational

from ..arguments.recipes import check_output_dir
from ..files import write_atomically
from ..oracles.panel import Panel
from ..rollouts.files import write_parquet
from .files import Groups, row_of, with_json, without_images
from .play import aligned, play, play_stored, score_groups
from .policies import Sampling, check_policy, is_file, load_completions, run_of, sample
from .statistics import WinRate


logger = logging.get_logger(__name__)

# The sides of a match, "model" and "opponent": models, adapters, or files of completions
Sides = dict[str, str]


def check_sides(sides: Sides, output_dir: str, sampling: Sampling) -> None:
    """Raise `ValueError` if a side cannot play. No weights are loaded."""
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


def read_files(sides: Sides) -> dict[str, Groups]:
    """The completions of the sides that are files: of two files, the rows with the same prompts."""
    files = {side: load_completions(policy) for side, policy in sides.items() if is_file(policy)}
    return dict(zip(files, aligned(*files.values()), strict=True)) if len(files) == 2 else files


def templates_of(sides: Sides, given: Any, prompt: Any) -> dict[str, Any]:
    """`chat_template_kwargs` by side: those given, or those of its training, or else of the other side's."""
    if given is not None:
        return dict.fromkeys(sides, given)
    runs = {side: run_of(policy) for side, policy in sides.items() if not is_file(policy)}
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


def play_match(
    sides: Sides,
    players: dict[str, Groups],
    prompts: Dataset,
    samplings: Mapping[str, Sampling],
    panel: Panel | None,
    folder: Path,
) -> tuple[dict[str, tuple[WinRate, WinRate]], dict[str, Any]]:
    """
    Sample the sides that are no files, judge both, and write completions and results to `folder`. Without judges, the
    scores in the files count. Returns win rates by judge, and what is in `win_rates.json`.
    """
    players = dict(players)
    for side, policy in sides.items():
        if side in samplings:
            players[side] = sample(policy, prompts, samplings[side])
            (folder / "win_rates.json").unlink(missing_ok=True)  # of other completions
            write_groups(folder / f"{side}.parquet", players[side])
        if panel is not None:
            score_groups(panel, players[side])
    players = {side: players[side] for side in sides}
    unit = _unit_of_lengths(players)
    ours, theirs = players.values()
    results = play_stored(ours, theirs) if panel is None else play(ours, theirs, panel)
    for side, groups in players.items():
        write_groups(folder / f"{side}.parquet", groups)
    if not results:
        raise ValueError("no judge gave both policies a score, so there is nothing to compare.")
    lengths = {side: mean_length(groups) for side, groups in players.items()}
    table = {
        judge: {"win_rate": vars(plain), "length_controlled": vars(controlled)}
        for judge, (plain, controlled) in results.items()
    }
    facts = {**sides, "mean_length": lengths, "unit_of_length": unit, "num_prompts": len(prompts), "win_rates": table}
    write_atomically(folder / "win_rates.json", json.dumps(facts, indent=2) + "\n")
    return results, facts


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


def prompts_of(groups: Groups) -> Dataset:
    """The prompts of completions, with the other columns of the dataset."""
    return Dataset.from_list([row_of(group) for group in groups])


def mean_length(groups: Groups) -> float:
    """The mean length of all completions."""
    lengths = [length for group in groups for length in group["lengths"]]
    return sum(lengths) / len(lengths)
