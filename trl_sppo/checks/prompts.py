"""Checks of prompts, with each chat template that will render them."""

import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

from datasets import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..config import SPPOConfig
from ..errors import RunError
from ..rows import IMAGES
from .readers import Reader, Unreadable, check_length, key_of_prompt, room_for_prompts
from .sources import AnyDataset, columns_of


logger = logging.get_logger(__name__)

BATCH = 1000  # prompts that are rendered at once
MANY = 20_000  # prompts from which a progress bar is shown


def check_prompt_ids(prompt_ids: list[list[int]], args: SPPOConfig, config: Any) -> None:
    """Raise `RunError` if a prompt is empty or too long. The length of prompts with images is not known earlier."""
    room = room_for_prompts(args, config)
    try:
        for i, ids in enumerate(prompt_ids):
            check_length(i, len(ids), room)
    except Unreadable as error:
        raise RunError(f"a row of the dataset {error}") from error


def check_rows(rows: Sequence[dict[str, Any]], readers: Sequence[Reader], training: bool) -> None:
    """Raise `RunError` if a row cannot be read. Rows of a streamed dataset arrive unchecked."""
    prompts = [row.get("prompt") for row in rows]
    try:
        _check_kinds(prompts, type(prompts[0]))
        for reader in readers if not any(column in rows[0] for column in IMAGES) else ():
            if not (training and reader.only_eval):
                reader.read_new(prompts)
    except Unreadable as error:
        raise RunError(f"a row of the dataset {error} The row: {rows[error.place]}") from error


def check_prompts(readers: Sequence[Reader], datasets: dict[str, AnyDataset]) -> None:
    """Raise `ValueError` for a prompt that a model cannot read, or that is too long. Checks only a stream's first."""
    for name, dataset in datasets.items():
        columns = columns_of(dataset)
        if "prompt" not in columns:
            continue
        image = next((column for column in IMAGES if column in columns), None)
        for reader in readers:
            if image is not None and reader.is_policy and not reader.reads_images:
                raise ValueError(
                    f"{name} has a column {image!r}, but {reader.name} has a tokenizer for texts only. Use a model "
                    f"that reads images, or remove the column: `dataset.remove_columns({image!r})`."
                )
        here = [reader for reader in readers if name != "train_dataset" or not reader.only_eval]
        _check_dataset(name, dataset, here if image is None else [])


def without_empty_images(name: str, dataset: Any) -> Any:
    """A dataset, or a `dict` of them, without image columns that are empty: TRL would look for images there."""
    if isinstance(dataset, dict):
        return {key: without_empty_images(f"{name}[{key!r}]", each) for key, each in dataset.items()}
    for column in IMAGES if isinstance(dataset, Dataset) else ():
        if column in dataset.column_names:
            tables: Any = dataset.select_columns(column).with_format("arrow").iter(100)
            if not any(any(table.column(column).to_pylist()) for table in tables):
                logger.warning(f"the column {column!r} of {name} is left out: it has no images.")
                dataset = dataset.remove_columns(column)
    return dataset


def _check_dataset(name: str, dataset: AnyDataset, readers: Sequence[Reader]) -> None:
    kind: type | None = None
    for start, prompts in _batches(name, dataset, readers):
        kind = kind or type(prompts[0])
        try:
            _check_kinds(prompts, kind)
            for reader in readers:
                read = reader.read_new(prompts)
                reader.seen |= {key_of_prompt(prompts[i]) for i in read}
                if reader.is_policy and kind is str:
                    reader.remark(name, {start + i: ids for i, ids in read.items()})
        except Unreadable as error:
            raise ValueError(f"row {start + error.place} of {name} {error}") from error


def _batches(name: str, dataset: AnyDataset, readers: Sequence[Reader]) -> Iterator[tuple[int, list]]:
    """Prompts in batches, with the row of the first."""
    if not isinstance(dataset, Dataset):
        yield 0, [next(iter(dataset))["prompt"]]
        return
    column, size = dataset.select_columns("prompt"), BATCH
    has_images = "Image(" in str(column.features)
    if has_images:  # which are not decoded here
        column, size = column.with_format("arrow"), 50
    hidden = len(dataset) < MANY or any(r.args.disable_tqdm or r.args.local_process_index != 0 for r in readers)
    starts = tqdm(range(0, len(dataset), size), desc=f"prompts of {name}", leave=False, disable=hidden)
    for start, batch in zip(starts, column.iter(size), strict=True):
        values: Any = cast(Any, batch)["prompt"]
        yield start, values.to_pylist() if has_images else list(values)


def _check_kinds(prompts: list, kind: type) -> None:
    """Raise [`Unreadable`] for a value that is no prompt, or a prompt of another kind."""
    for i, prompt in enumerate(prompts):
        if not _is_prompt(prompt):
            raise Unreadable(
                i,
                f"has no prompt, but {reprlib.repr(prompt)}. A prompt is a text, or a list of messages such as "
                "`{'role': 'user', 'content': 'Hello'}`. Convert such rows, or leave them out with `dataset.filter`.",
            )
        if not isinstance(prompt, kind):
            raise Unreadable(
                i, "has a prompt of another kind than the first: use only texts, or only lists of messages."
            )


def _is_prompt(prompt: Any) -> bool:
    return isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and all(map(_is_message, prompt)))


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        return False
    content = message["content"]
    if isinstance(content, list):
        return all(isinstance(part, dict) and "type" in part for part in content)
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
