"""Datasets that are not folders of data files: single files, and what `save_to_disk` has written."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig


_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def dataset_source(name: str, config: str | None = None, option: str = "dataset_name") -> dict[str, Any]:
    """
    What `datasets.load_dataset` takes for a dataset.

    Args:
        name (`str`):
            An id on the hub, a folder of data files, a file, or a folder that `save_to_disk` has written. A file and a
            single saved dataset are the split `"train"`.
        config (`str`, *optional*):
            The dataset's configuration, which only an id and a folder of data files have.
        option (`str`, *optional*, defaults to `"dataset_name"`):
            Where it is given.

    Returns:
        `dict[str, Any]`: keyword arguments.

    Raises:
        `ValueError`: for a file of another kind, a saved dataset that is incomplete, or a configuration of either.
    """
    files: dict[str, list[str]] | None
    if os.path.isfile(name):
        kind = _KINDS.get(Path(name).suffix)
        if kind is None:
            raise ValueError(f"{option}={name!r} is a file, but none that ends in {', '.join(_KINDS)}.")
        files = {"train": [name]}
    elif (files := _saved(name, option)) is not None:
        kind = "arrow"  # no format and no code of a saved dataset is looked at, only its tables
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
