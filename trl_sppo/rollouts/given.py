"""Given rollouts: stored groups to train on."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers.utils import logging

from ..rows import ROW, to_tensor
from .files import COLUMNS


logger = logging.get_logger(__name__)


def load_rollouts(path: str, num_generations: int) -> Dataset:
    """
    Load rollouts to train on.

    Args:
        path (`str`):
            A folder or a file that `datasets` reads, such as `OUTPUT_DIR/rollouts`. One row is one group: a `"prompt"`
            and its K `"completions"`, texts or lists of messages. Optional: `"preferences"` (K x K) or `"scores"` (K,
            or by the name of each source), without which a reward source has to score them; `"completion_ids"`,
            without which completions are tokenized here; `"logps"` (of each token under the policy that sampled them),
            without which the policy at hand is taken for that one.
        num_generations (`int`):
            K.

    Returns:
        [`~datasets.Dataset`].

    Raises:
        `ValueError`: if there is nothing, or not what is needed.
    """
    try:
        if os.path.isfile(path):
            kind = {".jsonl": "json", ".json": "json", ".csv": "csv"}.get(Path(path).suffix, "parquet")
            loaded = datasets.load_dataset(kind, data_files=path)
        else:
            loaded = datasets.load_dataset(path)
    except (
        OSError,
        ValueError,
        IndexError,
        DatasetGenerationError,
        DatasetNotFoundError,
    ) as error:
        raise ValueError(
            f"rollouts={path!r} is neither a folder nor a file that `datasets` reads. Give the folder `rollouts` of a "
            f"run's output_dir. ({error})"
        ) from error
    dataset = datasets.concatenate_datasets(list(loaded.values())) if isinstance(loaded, DatasetDict) else loaded
    missing = [name for name in ("prompt", "completions") if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"rollouts={path!r} have no column {' and no '.join(map(repr, missing))}, but {dataset.column_names}. One "
            "row is a 'prompt' with its 'completions'."
        )
    dataset = _judged_rows(dataset, path)
    if _some(dataset, "tool_mask"):
        raise ValueError(
            f"rollouts={path!r} have tokens of tools in their completions (column 'tool_mask'), which a training "
            "without these tools would take for the policy's. Train where they are sampled."
        )
    for i, row in enumerate(dataset.select_columns(["prompt", "completions"])):
        found = None if row["completions"] is None else len(row["completions"])
        if row["prompt"] is None or found != num_generations:
            raise ValueError(
                f"row {i} of rollouts={path!r} has {found} completions, but num_generations is {num_generations}. Set "
                "num_generations to the size of the groups, which must be the same in all rows."
            )
    return dataset


def _some(dataset: Dataset, name: str) -> bool:
    """Whether a column is there with something in it."""
    return name in dataset.column_names and dataset.data.column(name).null_count < len(dataset)


def _judged_rows(dataset: Dataset, path: str) -> Dataset:
    """The rows without those that a run had sampled and not yet scored when it ended, if others are scored."""
    if not _some(dataset, "preferences") or dataset.data.column("preferences").null_count == 0:
        return dataset
    judged = dataset.filter(lambda preferences: preferences is not None, input_columns="preferences")
    logger.warning(f"rollouts={path!r}: {len(dataset) - len(judged)} rows without preferences are left out.")
    return judged


def is_judged(dataset: Dataset) -> bool:
    """Whether rollouts bring preferences or scores, so that no oracle has to be asked."""
    return any(_some(dataset, name) for name in ("preferences", "scores"))


def prompts_of(rollouts: Dataset) -> Dataset:
    """The prompts of rollouts, and where each stands: TRL copies rows many times, so it gets no more."""
    light = [name for name in rollouts.column_names if name not in COLUMNS]
    return rollouts.select_columns(light).add_column(ROW, list(range(len(rollouts))))


def stored_panel(groups: Sequence[dict[str, Any]], size: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """
    The preferences of stored groups: matrices of shape `(groups, K, K)`, one or none; or else their scores, of shape
    `(sources, groups, K)`. Raises `ValueError` if they have another shape.
    """
    if groups[0].get("preferences") is not None:
        preferences = to_tensor([group["preferences"] for group in groups])
        if preferences.shape[1:] != (size, size):
            raise ValueError(
                f"the preferences in the rollouts have shape {tuple(preferences.shape[1:])} per group, but groups "
                f"have {size} completions: they must be {size} x {size}, [i][j] for P(i beats j)."
            )
        return [preferences], None
    scores = [group["scores"] for group in groups]
    sources = list(scores[0]) if isinstance(scores[0], dict) else [None]
    table = to_tensor([[row if name is None else row[name] for row in scores] for name in sources])
    if table.shape[2:] != (size,):
        raise ValueError(f"the scores in the rollouts must be {size} per group and source, got {table.size(2)}.")
    return [], table
