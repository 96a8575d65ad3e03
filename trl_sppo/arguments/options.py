"""Options of the training commands: their parser, and the functions that they name."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from ..config import SPPOConfig
from .launching import check_num_processes, launch_arguments
from .recipes import check_output_dir


@dataclass
class SPPOScriptArguments(ScriptArguments):
    """Arguments of the training script besides [`SPPOConfig`] and [`~trl.ModelConfig`]: sources of preferences."""

    reward_model_name_or_path: list[str] | None = field(
        default=None,
        metadata={"help": "Reward models (sequence classifiers with one label): ids on the hub or folders."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions: names in trl.rewards, or dotted import paths ('my_rewards.brevity')."},
    )
    preference_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Pairwise oracles: dotted import paths of functions or judges ('my_judges.judge'). In a recipe "
            "also a judge's class with its arguments."
        },
    )
    eval_reward_model_name_or_path: list[str] | None = field(
        default=None, metadata={"help": "Reward models that judge in evaluations only."}
    )
    eval_reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Reward functions that judge in evaluations only."}
    )
    eval_preference_funcs: list[str] | None = field(
        default=None, metadata={"help": "Pairwise oracles that judge in evaluations only."}
    )

    def __post_init__(self):
        # A YAML recipe may give one name instead of a list
        for name in ("reward_model_name_or_path", "reward_funcs", "preference_funcs"):
            for each in (name, f"eval_{name}"):
                if isinstance(getattr(self, each), str):
                    setattr(self, each, [getattr(self, each)])


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: object) -> NoReturn:
    """Exit with one error message and status 2."""
    print(f"trl-sppo: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_parser(prog: str = "trl-sppo train", config: type[SPPOConfig] = SPPOConfig) -> TrlParser:
    types: Any = (SPPOScriptArguments, config, ModelConfig, DatasetMixtureConfig)
    return _Parser(types, prog=prog, allow_abbrev=False)


def split_config(argv: list[str]) -> list[str]:
    """Split `--config=recipe.yaml` into two arguments, the only form that TRL's parser accepts."""
    return [part for token in argv for part in (token.split("=", 1) if token.startswith("--config=") else [token])]


def parse_arguments(argv: list[str]) -> tuple[SPPOScriptArguments, SPPOConfig, ModelConfig, DatasetMixtureConfig]:
    """The options of a training process. Raises `ValueError` for unknown or contradictory ones."""
    parser = make_parser()
    argv = split_config(argv)
    launch = launch_arguments(parser, argv)  # refuses unknown options
    try:
        parsed: Any = parser.parse_args_and_config(argv, return_remaining_strings=True)[:4]
    except ValueError:
        check_num_processes(launch)  # too few processes may be the reason
        raise
    check_num_processes(launch)
    check_output_dir(parsed[1].output_dir)
    return parsed


def check_arguments(argv: list[str]) -> SPPOConfig:
    """The training options. Exits with a message if they are wrong, or with the list of options for --help."""
    if {"-h", "--help"} & set(argv):
        make_parser().print_help()
        raise SystemExit(0)
    try:
        return parse_arguments(argv)[1]
    except ValueError as error:
        fail(error)


def load_reward_funcs(names: list[str], option: str = "reward_funcs") -> list:
    """Import reward functions: names in `trl.rewards`, or dotted paths, also of modules in the working directory."""
    functions = []
    for name in names:
        function = import_callable(f"trl.rewards.{name}" if name.isidentifier() else name, option)
        if name == "get_soft_overlong_punishment":  # a factory, which `trl grpo` calls with these values
            function = function(max_completion_len=1280, soft_punish_cache=256)
        functions.append(function)
    return functions


def load_preference_funcs(entries: Sequence[str | dict[str, Any]], option: str = "preference_funcs") -> list:
    """Import pairwise oracles by dotted paths, or make them: of a class with its arguments, as a recipe may have."""
    oracles = []
    for entry in entries:
        path, arguments = path_and_arguments(entry, option)
        oracle = import_callable(path, option)
        if arguments is None and isinstance(oracle, type):
            raise ValueError(f"{path} ({option}) is a class. Give its arguments below it, in a recipe, or an object.")
        if arguments is not None:
            check_call(oracle, arguments, path, option)
            try:
                oracle = oracle(**arguments)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path} ({option}) cannot be made: {error}") from error
        oracles.append(oracle)
    return oracles


def check_call(oracle: Any, arguments: dict[str, Any], path: str, option: str) -> None:
    """Raise `ValueError` if a class does not have these arguments."""
    try:
        inspect.signature(oracle).bind(**arguments)
    except TypeError as error:
        names = ", ".join(inspect.signature(oracle).parameters)
        raise ValueError(f"{path} ({option}) cannot be made: {error}. Its arguments are {names}.") from error


def path_and_arguments(entry: str | dict[str, Any], option: str) -> tuple[str, dict[str, Any] | None]:
    """The dotted path of a pairwise oracle, and the arguments of its class, if it has some."""
    if isinstance(entry, str):
        return entry, None
    if len(entry) != 1 or not all(isinstance(arguments, dict) for arguments in entry.values()):
        raise ValueError(
            f"{option}: an entry with arguments must be one class and a mapping, such as `trl_sppo.judges.LLMJudge: "
            f"{{model: ..., base_url: ...}}`, got {entry!r}. Indent the arguments below the class."
        )
    ((path, arguments),) = entry.items()
    if re.search(r"'(api[_-]?key|(proxy-)?authorization)': ", repr(arguments), re.IGNORECASE):
        raise ValueError(f"{path} ({option}) has a key, and recipes are shared. Set OPENAI_API_KEY instead.")
    return path, arguments


def check_dotted(name: str, what: str) -> None:
    """Raise `ValueError` for the path of a file or of a model instead of a dotted import path."""
    if {"/", ":"} & set(name) or name.endswith(".py"):
        raise ValueError(
            f"{what} must be a dotted import path, such as my_rewards.brevity for `brevity` in my_rewards.py. A model "
            "is given with --reward_model_name_or_path (or --eval_reward_model_name_or_path)."
        )


def import_callable(path: str, option: str) -> Any:
    """Import by a dotted path, also from the working directory. Raises `ValueError` with the option's name."""
    what = f"{path!r} (--{option})"
    check_dotted(path, what)
    module, _, attribute = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{what} could not be imported: {error}. Give a dotted path, such as my_rewards.brevity for `brevity` in "
            "my_rewards.py."
        ) from error
    if not callable(function):
        raise ValueError(f"{what} is not a function: {function!r}.")
    return function
