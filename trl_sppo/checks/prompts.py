"""Checks of the prompts themselves, through each chat template that will read them."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from datasets import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..config import SPPOConfig
from ..errors import RunError
from ..rows import IMAGES
from .readers import LEAVE_OUT, Problem, Reader, key_of_prompt, room_for_prompts
from .sources import AnyDataset, columns_of, from_sharegpt


logger = logging.get_logger(__name__)

BATCH = 1000  # prompts that are rendered at once
MANY = 20_000  # prompts, from which on there is a progress bar


def _does_not_fit(what: str, longest: int, args: SPPOConfig, context: int, room: int) -> str:
    completions = "" if args.use_vllm else f" with max_completion_length={args.max_completion_length}"
    return (
        f"{what} into the policy's context of {context} tokens{completions}: a prompt may have {room}, and the "
        f"longest has {longest}. Leave out such prompts before training (docs/memory.md has a filter)"
        f"{', or raise vllm_max_model_length' if args.use_vllm else ', or lower max_completion_length'}."
    )


def check_prompt_ids(prompt_ids: list[list[int]], args: SPPOConfig, config: Any) -> None:
    """Raise `RunError` if a prompt is empty or too long. Those of a streamed dataset are not known earlier."""
    room = room_for_prompts(args, config)
    if min(map(len, prompt_ids), default=1) == 0:
        raise RunError("a prompt has no tokens: there is nothing to begin a completion with. Leave out such prompts.")
    longest = max(map(len, prompt_ids), default=0)
    if room is not None and longest > room[1]:
        raise RunError(_does_not_fit("a prompt does not fit", longest, args, *room))


def check_rows(rows: Sequence[dict[str, Any]], readers: Sequence[Reader], training: bool) -> None:
    """Raise `RunError` if a row to complete next cannot be read. Those of a streamed dataset come unchecked."""
    prompts = [row.get("prompt") for row in rows]
    found = _first_problem(prompts, type(prompts[0]))
    for reader in readers if not any(column in rows[0] for column in IMAGES) else ():
        if found is None and not (training and reader.only_eval):
            _, found = reader.read_new(prompts)
    if found is not None:
        i, problem, cure = found
        raise RunError(f"a row of the dataset {problem}: {rows[i]}. {cure}")


def check_prompts(readers: Sequence[Reader], datasets: dict[str, AnyDataset]) -> None:
    """Raise `ValueError` for a prompt that a model cannot read, or that is too long. Of a stream, only the first."""
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
    """A dataset, or a `dict` of them, without columns of images that hold none: TRL would look for images there."""
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
    long: dict[int, int] = {}
    policy = next((reader for reader in readers if reader.is_policy), None)
    for start, prompts in _batches(name, dataset, readers):
        kind = kind or type(prompts[0])
        found = _first_problem(prompts, kind)
        for reader in readers:
            if found is None:
                read, found = reader.read_new(prompts)
                reader.lengths |= {key_of_prompt(prompts[i]): len(ids) for i, ids in read.items()}
                if found is None and reader.is_policy and kind is str:
                    reader.remark(name, {start + i: ids for i, ids in read.items()})
        if found is not None:
            i, problem, cure = found
            raise ValueError(f"row {start + i} of {name} {problem}. {cure}")
        if policy is not None and policy.room is not None:
            lengths = {start + i: policy.lengths.get(key_of_prompt(prompt), 0) for i, prompt in enumerate(prompts)}
            long |= {i: length for i, length in lengths.items() if length > policy.room[1]}
    if long and policy is not None and policy.room is not None:
        rows = ", ".join(map(str, list(long)[:5])) + (", ..." if len(long) > 5 else "")
        of = f"of {len(dataset)} " if isinstance(dataset, Dataset) else ""
        what = f"{len(long)} {of}prompts of {name} (rows {rows}) do not fit"
        raise ValueError(_does_not_fit(what, max(long.values()), policy.args, *policy.room))


def _batches(name: str, dataset: AnyDataset, readers: Sequence[Reader]) -> Iterator[tuple[int, list]]:
    """Prompts in batches, with the row of the first."""
    if not isinstance(dataset, Dataset):
        yield 0, [next(iter(dataset))["prompt"]]
        return
    start = 0
    hidden = len(dataset) < MANY or any(r.args.disable_tqdm or r.args.local_process_index != 0 for r in readers)
    with tqdm(desc=f"prompts of {name}", total=len(dataset), leave=False, disable=hidden) as bar:
        column, size = dataset.select_columns("prompt"), BATCH
        has_images = "Image(" in str(column.features)
        if has_images:  # which are not decoded here
            column, size = column.with_format("arrow"), 50
        for batch in column.iter(size):
            values: Any = cast(Any, batch)["prompt"]
            prompts = values.to_pylist() if has_images else list(values)
            yield start, prompts
            start += len(prompts)
            bar.update(len(prompts))


def _first_problem(prompts: list, kind: type) -> Problem | None:
    """Of prompts as such, whoever reads them."""
    for i, prompt in enumerate(prompts):
        problem = _what_is_wrong(prompt)
        if problem is not None:
            return i, *problem
        if not isinstance(prompt, kind):
            is_text, of_first = ("a text", "lists of messages") if kind is list else ("a list of messages", "texts")
            return i, f"has {is_text} as its prompt, but the prompts before are {of_first}", (
                "All prompts of a dataset must be of one kind: `[{'role': 'user', 'content': text}]` makes a list of "
                "messages of a text."
            )  # fmt: skip
    return None


def _what_is_wrong(prompt: Any) -> tuple[str, str] | None:
    """With a prompt as such, and what helps."""
    rule = "A prompt is a text, or a list of messages such as `{'role': 'user', 'content': 'Hello'}`."
    if prompt is None:
        return "has no prompt (None)", LEAVE_OUT
    if isinstance(prompt, str):
        return None
    if isinstance(prompt, dict):
        return f"has a dict as its prompt ({prompt})", f"{rule} Put a single message into a list: `[message]`."
    if not isinstance(prompt, list):
        return f"has {prompt!r} as its prompt, of type {type(prompt).__name__}", rule
    if not prompt:
        return "has a prompt without messages", LEAVE_OUT
    for message in prompt:
        if message is not None and not isinstance(message, dict):
            return f"has a prompt that is a list of {type(message).__name__} ({message!r})", rule
        if message is not None and "from" in message and "value" in message:
            return (
                f"has a message with 'from' and 'value' ({message})",
                f"{rule} Convert them: {from_sharegpt('prompt')}.",
            )
        if message is None or message.get("role") is None or not _says_something(message):
            return f"has a message without role or content ({message})", LEAVE_OUT
        content = message["content"]
        if not isinstance(message["role"], str) or not isinstance(content, (str, list, type(None))):
            return f"has a message whose role or content is no text ({message})", rule
        if isinstance(content, list) and not all(isinstance(part, dict) and "type" in part for part in content):
            return f"has a message whose content is a list without types ({message})", (
                f"{rule} Parts of a content are such as `{{'type': 'text', 'text': 'Hello'}}`."
            )  # fmt: skip
    return None


def _says_something(message: dict[str, Any]) -> bool:
    """TRL reads the content of each message, be it None."""
    return message.get("content") is not None or ("content" in message and bool(message.get("tool_calls")))
