"""Datasets: ids on the hub, folders, single files, folders of `save_to_disk`, and mixtures of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset


_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def dataset_source(name: str, config: str | None = None, option: str = "dataset_name") -> dict[str, Any]:
    """Keyword arguments of `load_dataset` for an id, a folder, a file, or a folder written by `save_to_disk`."""
    folder = Path(name)
    if folder.is_file():
        if folder.suffix not in _KINDS:
            raise ValueError(f"{option}={name!r} is a file, but must end in {', '.join(_KINDS)}.")
        source: dict[str, Any] = {"path": _KINDS[folder.suffix], "data_files": {"train": [name]}}
    elif (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        source = {"path": "arrow", "data_files": {split: _tables(folder / split) for split in splits}}
    elif (folder / "state.json").is_file():
        source = {"path": "arrow", "data_files": {"train": _tables(folder)}}
    else:
        return {"path": name, "name": config}
    if config is not None:
        raise ValueError(
            f"dataset configuration {config!r} is given, but {option}={name!r} is one file, or was written by "
            "`save_to_disk`, which has no configurations. Remove it."
        )
    return source


def _tables(folder: Path) -> list[str]:
    """The Arrow files that `save_to_disk` wrote. Their format is not read."""
    state = json.loads((folder / "state.json").read_text())
    return [str(folder / file["filename"]) for file in state["_data_files"]]


def mixture_source(mixture: DatasetMixtureConfig) -> DatasetMixtureConfig:
    """A mixture, with the files of each dataset as TRL takes them. Raises `ValueError` like [`dataset_source`]."""
    parts = []
    for i, part in enumerate(mixture.datasets):
        source = dataset_source(part.path, part.name, f"datasets[{i}].path")
        if "data_files" in source and (part.data_files or part.data_dir):
            raise ValueError(f"datasets[{i}].path={part.path!r} is one dataset: remove its data_files and data_dir.")
        parts.append(replace(part, **source) if "data_files" in source else part)
    return replace(mixture, datasets=parts)


def check_one_dataset(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> None:
    """Raise `ValueError` unless either a dataset or a mixture is given."""
    if bool(dataset_args.datasets) == bool(script_args.dataset_name):
        raise ValueError("give either dataset_name (a folder, a file, or an id on the hub) or datasets (a mixture).")


def is_id(name: str) -> bool:
    """Whether a name has the form of an id on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, evaluate: bool):
    """Load the training split, and the test split if `evaluate`."""
    check_one_dataset(script_args, dataset_args)
    name = script_args.dataset_name
    try:
        if name:
            source = dataset_source(name, script_args.dataset_config)
            splits = load_dataset(**source, streaming=script_args.dataset_streaming)
        else:
            splits = get_dataset(mixture_source(dataset_args))
    except (OSError, ValueError, LookupError, StopIteration, DatasetGenerationError) as error:
        what = f"dataset_name={name!r}" if name else "datasets"
        cause = str(error.__cause__ if isinstance(error, DatasetGenerationError) else error)
        config = f" (dataset_config={script_args.dataset_config!r})" if script_args.dataset_config else ""
        raise ValueError(f"{what} cannot be loaded: {cause or 'a file is empty'}{config}") from error
    wanted = [script_args.dataset_train_split] + ([script_args.dataset_test_split] if evaluate else [])
    for split in wanted:
        if split not in splits:
            raise ValueError(
                f"the dataset has no split {split!r}, but {sorted(splits)}. Set dataset_train_split and, if "
                "eval_strategy is not 'no', dataset_test_split."
            )
    return splits[wanted[0]], splits[wanted[1]] if evaluate else None
