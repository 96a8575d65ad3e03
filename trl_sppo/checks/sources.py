"""Checks of reward sources, oracles, judges and datasets, before any model is loaded."""

from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from torch import nn
from transformers.trainer_utils import IntervalStrategy
from trl.data_utils import is_conversational

from ..config import SPPOConfig
from ..oracles.asking import check_oracle, oracle_name
from ..trust import is_url


AnyDataset: TypeAlias = Dataset | IterableDataset

# Columns that hold prompts as texts in frequent layouts of datasets
TEXTS = ("question", "problem", "query", "instruction", "input", "text")

# Arguments of reward functions besides the dataset's columns
ARGUMENTS_OF_FUNCTIONS = {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}


def named_datasets(
    train_dataset: AnyDataset | None, eval_dataset: AnyDataset | dict[str, AnyDataset] | None
) -> dict[str, AnyDataset]:
    """Datasets by their names in messages."""
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    else:
        datasets["eval_dataset"] = eval_dataset
    return {name: dataset for name, dataset in datasets.items() if dataset is not None}


def columns_of(dataset: AnyDataset) -> list[str]:
    """Names of its columns. Reads a row of a stream that does not know them."""
    return list(dataset.column_names or next(iter(dataset), {}))


def how_to_make_prompts(row: dict[str, Any]) -> str:
    """Advice on adding prompts to a dataset, given its first row: the rule, and a line of Python."""
    for name in ("messages", "conversations"):
        if row.get(name):
            return (
                "A prompt is the conversation before the assistant's last message: `dataset.map(lambda row: "
                f"{{'prompt': row[{name!r}][:-1]}})`."
            )
    for name in TEXTS:
        if isinstance(row.get(name), str):
            return (
                "A prompt has no completion in it. For a model with a chat template: `dataset.map(lambda row: "
                f"{{'prompt': [{{'role': 'user', 'content': row[{name!r}]}}]}})`; for one without: "
                f"`dataset.rename_column({name!r}, 'prompt')`."
            )
    if isinstance(row.get("chosen"), list):
        return "A prompt is what 'chosen' and 'rejected' both begin with: `dataset.map(trl.extract_prompt)`."
    return "Rename the column that holds prompts without completions: `dataset.rename_column('...', 'prompt')`."


def check_columns(
    args: SPPOConfig,
    datasets: dict[str, AnyDataset],
    functions: list,
    eval_functions: list,
    has_environment: bool = False,  # which may bring a reward function
) -> None:
    """Raise `ValueError` if a column has the name of another argument of the reward functions that get the columns."""
    for name, dataset in datasets.items() if not args.remove_unused_columns else ():
        sources = functions if name == "train_dataset" else [*functions, *eval_functions]
        called = has_environment or any(_is_called(source) for source in sources)
        names = ARGUMENTS_OF_FUNCTIONS | ({"environments"} if has_environment else set())
        taken = sorted(names.intersection(columns_of(dataset)))
        if called and taken:
            raise ValueError(
                f"{name} has columns {taken}, but reward functions get something else under these names. Rename them "
                f"(`dataset.rename_column({taken[0]!r}, 'my_{taken[0]}')`), or remove them."
            )


def check_needed_columns(datasets: dict[str, AnyDataset], oracles: list) -> None:
    """Raise `ValueError` if a dataset lacks a column that an oracle reads, such as a rubric."""
    needed = [(oracle_name(oracle), column) for oracle in oracles for column in getattr(oracle, "columns", ())]
    for name, dataset in datasets.items() if needed else ():
        columns = columns_of(dataset)
        for oracle, column in needed:
            if column not in columns:
                raise ValueError(
                    f"{name} has no column {column!r}, which {oracle} reads (rubric={column!r}). It has {columns}. "
                    "Add the column, or give the judge a list of criteria."
                )


def _is_called(source: Any) -> bool:
    """Whether a reward source gets the dataset's columns: a function, or a model behind a server."""
    return is_url(source) if isinstance(source, str) else not isinstance(source, nn.Module)


def check_sources(
    args: SPPOConfig,
    reward_funcs: list,
    reward_processing_classes: list,
    preference_funcs: list,
    has_environment: bool,  # which may bring a reward of its own
    judged: bool = False,  # whether the rollouts to train on bring preferences or scores
) -> None:
    """Raise `ValueError` if there is no reward source or oracle, or an option does not fit them."""
    nobody = not reward_funcs and not preference_funcs and not has_environment
    evaluate = IntervalStrategy(args.eval_strategy).value
    if nobody and (evaluate != "no" or not judged):
        raise ValueError(
            "no reward source and no preference oracle given. Pass `reward_funcs` or `preference_func` (in a recipe, "
            "reward_model_name_or_path, reward_funcs or preference_funcs). Rollouts with scores need none if "
            "eval_strategy='no'."
        )
    for oracle in preference_funcs:
        check_oracle(oracle)
    for option in ("comparisons_per_group", "judge_token_budget"):
        if getattr(args, option) is not None and not preference_funcs:
            raise ValueError(
                f"{option}={getattr(args, option)} is for pairwise oracles, and there are none. Remove it, or pass "
                "`preference_func` (in a recipe, preference_funcs)."
            )
    check_number("reward_weights", args.reward_weights, "reward source", reward_funcs)
    check_number("preference_weights", args.preference_weights, "preference_func", preference_funcs)
    check_number("reward_processing_classes", reward_processing_classes, "reward source", reward_funcs)
    votes = [
        *(args.reward_weights or [1.0] * len(reward_funcs)),
        *[1.0] * has_environment,
        *(args.preference_weights or [1.0] * len(preference_funcs)),
    ]
    if votes and not sum(votes) > 0:
        raise ValueError(
            f"reward_weights={args.reward_weights} and preference_weights={args.preference_weights} are all zero: "
            "no source has a vote. Leave out the option to give each source one vote."
        )
    if args.missing_eos_penalty is not None and not reward_funcs and not has_environment:
        raise ValueError(
            f"missing_eos_penalty={args.missing_eos_penalty} is subtracted from scores, but there are only pairwise "
            "oracles, which give none. Remove it; mask_truncated_completions=True leaves such completions out."
        )


def check_number(option: str, values: list | None, what: str, sources: list) -> None:
    """Raise `ValueError` unless there is one value per source."""
    if values is not None and len(values) != len(sources):
        raise ValueError(f"{option} must have one entry per {what} ({len(sources)}), got {len(values)}.")


def check_judges(
    args: SPPOConfig, reward_funcs: list, judges: list, processing_classes: list, preference_funcs: list
) -> None:
    """Raise `ValueError` for judges without evaluations, and options that do not fit judges."""
    for oracle in preference_funcs:
        check_oracle(oracle)
    if (judges or preference_funcs) and IntervalStrategy(args.eval_strategy).value == "no":
        raise ValueError(
            "judges for evaluations are given (eval_reward_funcs, eval_reward_model_name_or_path or "
            "eval_preference_funcs), but eval_strategy='no' evaluates nothing. Set eval_strategy, or leave them out."
        )
    check_number("eval_reward_processing_classes", processing_classes, "source in eval_reward_funcs", judges)
    paths = [source for source in [*reward_funcs, *judges] if isinstance(source, str) and not is_url(source)]
    for trusted in args.reward_trust_remote_code or []:
        if trusted.rstrip("/") not in paths:
            raise ValueError(
                f"reward_trust_remote_code names {trusted!r}, which is not one of the reward models loaded here "
                f"({paths}). Write it as it is given in reward_funcs (--reward_model_name_or_path), or remove it."
            )


def check_datasets(
    args: SPPOConfig,
    train_dataset: AnyDataset | None,
    eval_dataset: AnyDataset | dict[str, AnyDataset] | None,
    needs_prompts: bool = True,  # environments may have their own
) -> bool:
    """Raise an error for datasets of a wrong form. Returns whether the prompts are conversational."""
    if not needs_prompts:
        return True
    if not isinstance(train_dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"train_dataset must be a datasets.Dataset or IterableDataset, got {type(train_dataset).__name__}. "
            "`Dataset.from_list` makes one of a list of rows."
        )
    for name, dataset in named_datasets(train_dataset, eval_dataset).items():
        row = next(iter(dataset), None)
        if row is None:
            raise ValueError(f"{name} is empty. It needs rows with a 'prompt' column.")
        if "prompt" not in row:
            raise ValueError(f"{name} has no 'prompt' column, but {list(row)}. {how_to_make_prompts(row)}")
    assert args.generation_batch_size is not None and args.num_generations is not None  # GRPOConfig has set them
    num_prompts = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < num_prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {num_prompts} of one generation batch "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}). Lower "
            "per_device_train_batch_size or steps_per_generation, or add prompts."
        )
    # Of the prompt alone: other columns may have another format
    prompt = next(iter(train_dataset))["prompt"]
    return bool(prompt) and is_conversational({"prompt": prompt})
