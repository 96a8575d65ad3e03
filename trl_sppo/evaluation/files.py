"""Evaluation files: one Parquet file per evaluation of a training."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset
from transformers.utils import logging
from trl.data_utils import is_conversational

from ..rollouts.files import COLUMNS, unused, write_parquet
from ..rows import IMAGES


logger = logging.get_logger(__name__)

# Dataset columns of these names are in a group's "dataset_columns": a group uses the names, or files cannot hold them
TAKEN = (*COLUMNS, *IMAGES, "lengths", "dataset_columns")
FOLDER = "evaluations"  # in the output directory
NO_PROMPT = [{"role": "user", "content": ""}]  # TRL's placeholder if environments bring the prompts

Groups = list[dict[str, Any]]


def group_of(row: dict[str, Any], **own: Any) -> dict[str, Any]:
    """A row of the dataset as a group, with columns of the group's own."""
    taken = {name: value for name, value in row.items() if name in TAKEN}
    free = {name: value for name, value in row.items() if name not in TAKEN}
    return {**free, **({"dataset_columns": taken} if taken else {}), **own}


def row_of(group: dict[str, Any]) -> dict[str, Any]:
    """The dataset row of a group, which judges get."""
    free = {name: value for name, value in group.items() if name not in TAKEN}
    return {**free, **(group.get("dataset_columns") or {})}


def without_images(group: dict[str, Any]) -> dict[str, Any]:
    """A group without its images, which are too large to store."""
    taken = {name: value for name, value in group.get("dataset_columns", {}).items() if name not in IMAGES}
    rest = {name: value for name, value in group.items() if name != "dataset_columns"}
    return {**rest, "dataset_columns": taken} if taken else rest  # Parquet cannot hold an empty struct


def with_json(group: dict[str, Any]) -> dict[str, Any]:
    """A group with completions as JSON: messages with tool calls have many shapes, which Parquet cannot hold."""
    return {**group, "completions": [json.dumps(completion, default=str) for completion in group["completions"]]}


def with_messages(group: dict[str, Any]) -> dict[str, Any]:
    """A group with messages again, if `with_json` wrote it."""
    texts = group["completions"]
    if is_conversational({"prompt": group.get("prompt")}) and all(str(text)[:3] == '[{"' for text in texts):
        return {**group, "completions": [json.loads(text) for text in texts]}
    return group


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


class EvaluationFiles:
    """The evaluations in an output directory: a file each, in a folder for each of several evaluation sets."""

    def __init__(self, output_dir: str):
        self.folder = Path(output_dir) / FOLDER

    def path(self, name: str, step: int) -> Path:
        return self.folder / name / f"step-{step:06d}.parquet"

    def steps(self, name: str) -> list[int]:
        """Optimizer steps at which there is an evaluation, in order."""
        return sorted(int(path.stem.split("-")[1]) for path in (self.folder / name).glob("step-*.parquet"))

    def names(self) -> list[str]:
        """The evaluation sets: `"."` if there is only one."""
        return sorted({str(path.parent.relative_to(self.folder)) for path in self.folder.rglob("step-*.parquet")})

    def read(self, name: str, step: int) -> Groups | None:
        """The rows of an evaluation, or `None` if there is none."""
        path = self.path(name, step)
        return [*map(with_messages, pyarrow.parquet.read_table(path).to_pylist())] if path.is_file() else None

    def set_aside(self) -> None:
        """Move the evaluations of an earlier run out of the way."""
        if self.folder.exists():
            aside = unused(self.folder)
            self.folder.rename(aside)
            logger.warning(f"{self.folder} holds evaluations of an earlier run: they are now in {aside}.")

    def rotate(self, step: int, limit: int | None) -> None:
        """Of the evaluations up to a checkpoint at this step, keep the first and the last `limit`."""
        if limit is not None:
            for name in self.names():
                for old in [each for each in self.steps(name) if each <= step][1:-limit]:
                    self.path(name, old).unlink()
