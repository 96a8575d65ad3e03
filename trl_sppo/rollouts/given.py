"""Given rollouts: stored groups to train on."""

import os
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from ..rows import ROW
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
            without which the current policy counts as that one.
        num_generations (`int`):
            K.

    Raises `ValueError` if there is nothing to train on, or a column is missing.
    """
    try:
        if os.path.isfile(path):
            kind = {".jsonl": "json", ".json": "json", ".csv": "csv"}.get(Path(path).suffix, "parquet")
            loaded = datasets.load_dataset(kind, data_files=path)
        else:
            loaded = datasets.load_dataset(path)
    except (OSError, ValueError, IndexError, DatasetGenerationError) as error:
        raise ValueError(
            f"rollouts={path!r} is neither a folder nor a file that `datasets` reads. ({error})"
        ) from error
    dataset = datasets.concatenate_datasets(list(loaded.values())) if isinstance(loaded, DatasetDict) else loaded
    if not {"prompt", "completions"} <= set(dataset.column_names):
        raise ValueError(f"rollouts={path!r} must have columns 'prompt' and 'completions': {dataset.column_names}.")
    unscored = dataset.data.column("preferences").null_count if _some(dataset, "preferences") else 0
    if unscored:  # yet, when their run ended
        logger.warning(f"rollouts={path!r}: {unscored} rows without preferences are left out.")
        dataset = dataset.filter(
            lambda preferences: preferences is not None, input_columns="preferences"
        ).flatten_indices()
    if _some(dataset, "tool_mask"):
        raise ValueError(
            f"rollouts={path!r} have tokens of tools in their completions (column 'tool_mask'), which would count "
            "as the policy's. Train where they are sampled."
        )
    for i, row in enumerate(dataset.select_columns(["prompt", "completions"])):
        found = None if row["completions"] is None else len(row["completions"])
        if row["prompt"] is None or found != num_generations:
            raise ValueError(
                f"row {i} of rollouts={path!r} has {found} completions, but num_generations is {num_generations}."
            )
    return dataset


def _some(dataset: Dataset, name: str) -> bool:
    """Whether a column exists and has values."""
    return name in dataset.column_names and dataset.data.column(name).null_count < len(dataset)


def is_judged(dataset: Dataset) -> bool:
    """Whether rollouts bring preferences or scores, so that no oracle is needed."""
    return any(_some(dataset, name) for name in ("preferences", "scores"))


def prompts_of(rollouts: Dataset) -> Dataset:
    """The prompts of rollouts and their row numbers: TRL copies rows many times, so it gets no more."""
    light = [name for name in rollouts.column_names if name not in COLUMNS]
    return rollouts.select_columns(light).add_column(ROW, list(range(len(rollouts))))
