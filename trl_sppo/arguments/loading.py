"""Datasets: ids on the hub, folders, single files, folders of `save_to_disk`, and mixtures of them."""

import json
import os
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
    """Keyword arguments of `load_dataset` for an id, a folder, a file, or what `save_to_disk` has written."""
    files: dict[str, list[str]] | None
    if os.path.isfile(name):
        kind = _KINDS.get(Path(name).suffix)
        if kind is None:
            raise ValueError(f"{option}={name!r} is a file, but must end in {', '.join(_KINDS)}.")
        files = {"train": [name]}
    elif (files := _saved(name, option)) is not None:
        kind = "arrow"  # only the tables of a saved dataset are read, not its format
    else:
        return {"path": name, "name": config}
    if config is not None:
        raise ValueError(
            f"dataset configuration {config!r} is given, but {option}={name!r} is one file, or was written by "
            "`save_to_disk`, and has none. Remove it."
        )
    return {"path": kind, "data_files": files}


def mixture_source(mixture: DatasetMixtureConfig) -> DatasetMixtureConfig:
    """A mixture, with the files of each dataset as TRL takes them. Raises `ValueError` like [`dataset_source`]."""
    parts = []
    for i, part in enumerate(mixture.datasets):
        source = dataset_source(part.path, part.name, f"datasets[{i}].path")
        if "data_files" in source and (part.data_files or part.data_dir):
            raise ValueError(
                f"datasets[{i}].path={part.path!r} is one file, or was written by `save_to_disk`: remove its "
                "data_files and data_dir."
            )
        parts.append(replace(part, **source) if "data_files" in source else part)
    return replace(mixture, datasets=parts)


def check_one_dataset(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> None:
    """Raise `ValueError` unless either a dataset or a mixture is given."""
    if dataset_args.datasets and script_args.dataset_name:
        raise ValueError("dataset_name and datasets are both given. Keep one: a dataset, or a mixture of them.")
    if not dataset_args.datasets and not script_args.dataset_name:
        raise ValueError(
            "no dataset: give dataset_name (a folder, a file, or an id on the hub) or datasets (a mixture)."
        )


def is_folder_or_id(name: str) -> bool:
    """Whether a path exists, or has the form of an id on the hub."""
    if os.path.exists(name):
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, evaluate: bool):
    """Load the training split, and the test split if `evaluate`."""
    check_one_dataset(script_args, dataset_args)
    name = f"dataset {script_args.dataset_name!r} (--dataset_name)"
    if script_args.dataset_name and not is_folder_or_id(script_args.dataset_name):
        raise ValueError(f"{name} does not exist here, and cannot be an id on the Hugging Face hub. Check the path.")
    if dataset_args.datasets:
        mixture = mixture_source(dataset_args)
        try:
            splits = get_dataset(mixture)
        except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:
            raise ValueError(f"datasets cannot be loaded: {error.__cause__ or error or 'a file is empty'}") from error
    else:
        source = dataset_source(str(script_args.dataset_name), script_args.dataset_config)
        try:
            splits = load_dataset(**source, streaming=script_args.dataset_streaming)
        except DatasetGenerationError as error:  # its cause says what is wrong, and where
            raise ValueError(f"{name} cannot be read: {error.__cause__}") from error
        except StopIteration as error:
            raise ValueError(f"{name} has an empty file.") from error
        except OSError as error:
            raise ValueError(
                f"{name} is neither a folder with data files nor a dataset available from the Hugging Face hub. Check "
                f"the path. ({error})"
            ) from error
        except ValueError as error:
            config = script_args.dataset_config
            raise ValueError(f"{name} cannot be loaded, with dataset_config={config!r}: {error}") from error
    wanted = [script_args.dataset_train_split] + ([script_args.dataset_test_split] if evaluate else [])
    for split in wanted:
        if split not in splits:
            raise ValueError(
                f"the dataset has no split {split!r}, but {sorted(splits)}. Set dataset_train_split and, if "
                "eval_strategy is not 'no', dataset_test_split."
            )
    return splits[wanted[0]], splits[wanted[1]] if evaluate else None


def _saved(name: str, option: str) -> dict[str, list[str]] | None:
    """The Arrow files of each split, or `None` if `save_to_disk` has not written this folder."""
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            return {split: _tables(folder / split) for split in splits}
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            return {"train": _tables(folder)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{option}={name!r} was written by `save_to_disk`, but is incomplete: {error}. Save it again."
        ) from error
    return None


def _tables(folder: Path) -> list[str]:
    state = json.loads((folder / "state.json").read_text())
    return [str(folder / file["filename"]) for file in state["_data_files"]]
