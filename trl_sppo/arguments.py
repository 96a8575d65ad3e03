"""What a recipe and a command line may say: the file, the types of its values, and where the result goes."""

import os
import reprlib
from argparse import Action, ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser
from trl.scripts.utils import DatasetConfig

from .option_checks import find_number_texts


MAX_BYTES = 100_000  # of a recipe; the longest of this package has 3,000
MAX_DEPTH = 20  # of a value in a recipe

_NAMES = {float: "a number", int: "a whole number", bool: "true or false", str: "text", dict: "a mapping"}

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 2, 80, 80, 40


class _Loader(yaml.SafeLoader):
    """YAML without what a list of options has no use for, and what would be dropped or blown up without a word."""

    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            if not isinstance(self.anchors.get(event.anchor, yaml.ScalarNode("", "")), yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem=f"*{event.anchor} repeats a list or a mapping: write it out", problem_mark=event.start_mark
                )
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels of nesting", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given more than once. Keep one", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_recipe(path: str) -> dict[str, Any]:
    """Read a YAML recipe. Raises `ValueError` if it is missing, is no YAML, or no mapping."""
    if not os.path.isfile(path):
        raise ValueError(f"recipe {path!r} (--config) is not a file. The recipes of this package are in recipes/.")
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise ValueError(f"recipe {path} has {size:,} bytes: that is no list of options.")
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path} is not valid YAML: it is no text in UTF-8 ({error}).") from error
    except OSError as error:
        raise ValueError(f"recipe {path} (--config) cannot be read: {error}") from error
    try:
        recipe = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:  # itself it would show the line, which may hold a key
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"recipe {path} is not valid YAML: {error.problem}{where}") from None
    except Exception as error:  # values such as `2024-13-01` or `!!int x` end in errors that are none of YAML's
        raise ValueError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(
            f"recipe {path} must be a YAML mapping of `option: value` lines, got {type(recipe).__name__}."
        )
    return recipe


def check_recipe(parser: TrlParser, recipe: dict[str, Any]) -> None:
    """
    Check the types of a recipe's values: TRL's parser makes them defaults, at which argparse does not look.

    Args:
        parser ([`~trl.TrlParser`]):
            The training parser.
        recipe (`dict[str, Any]`):
            Values by option. Names that are none of the parser's are no matter of this check.

    Raises:
        `ValueError`: if one is no value of its option.
    """
    hints: dict[str, Any] = {}
    for dataclass in parser.dataclass_types:
        hints |= get_type_hints(dataclass)
    hints["resume_from_checkpoint"] = str | bool | None  # what `Trainer.train` takes
    actions = {action.dest: action for action in reversed(parser._actions)}  # of two, that without no_
    for name, value in recipe.items():
        if name == "env":
            _check_environment(value)
        elif name in hints:
            _check_value(parser, actions[name], hints[name], value)


def _check_value(parser: TrlParser, action: Action, hint: Any, value: Any) -> None:
    if isinstance(value, str) and (str in _members(hint) or not _items(hint)):
        try:
            parser._check_value(action, parser._get_value(action, value))
        except ArgumentError as error:
            raise ValueError(error) from error
        if "\0" in value:
            raise ValueError(f"{action.dest} must not contain a NUL character, got {value!r}.")
    elif isinstance(value, str) and _items(hint) is str:
        _check_value(parser, action, str, value)  # one name instead of a list
    elif _items(hint) is DatasetConfig and isinstance(value, list):
        for i, dataset in enumerate(value):
            _check_dataset(f"{action.dest}[{i}]", dataset)
    elif _items(hint) is float and isinstance(value, (int, float)):
        return  # SPPOConfig says that these are lists, and of what
    elif value is True and action.const is True:
        return  # the option without a value
    elif not _matches(value, hint):
        raise ValueError(
            f"{action.dest} must be {_describe(action, hint)}, got {_short.repr(value)}.{_cure(action, hint, value)}"
        )


def _check_environment(env: Any) -> None:
    if not isinstance(env, dict):
        raise ValueError(f"env must be a mapping of environment variables to values, got {_short.repr(env)}.")
    for name, value in env.items():
        if not isinstance(name, str) or not name or set("=\0") & set(name):
            raise ValueError(f"env: {name!r} is no name of an environment variable.")
        if not isinstance(value, (str, int, float)) or "\0" in str(value):
            raise ValueError(f"env: {name} must be text or a number, got {_short.repr(value)}.")


def _check_dataset(where: str, dataset: Any) -> None:
    """An entry of a mixture of datasets."""
    hints = get_type_hints(DatasetConfig)
    if not isinstance(dataset, dict):
        raise ValueError(f"{where} must be a mapping with a `path`, got {_short.repr(dataset)}.")
    for name, value in dataset.items():
        if name not in hints:
            raise ValueError(f"{where} has no option {_short.repr(name)}. It has {', '.join(hints)}.")
        if not _matches(value, hints[name]):
            raise ValueError(f"{where}: {name} must be {_describe(None, hints[name])}, got {_short.repr(value)}.")
    for field in fields(DatasetConfig):
        if field.default is MISSING and field.name not in dataset:
            raise ValueError(f"{where} has no {field.name}.")


def _members(hint: Any) -> tuple:
    """The types of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _items(hint: Any) -> Any:
    """The type of the items, if lists are wanted."""
    return next((get_args(member)[0] for member in _members(hint) if get_origin(member) is list), None)


def _matches(value: Any, hint: Any) -> bool:
    """Whether what YAML gave is of a type."""
    for member in _members(hint):
        origin = get_origin(member) or member
        if origin is Any:
            return True
        if origin is Literal:
            matches = any(
                value is choice or (isinstance(value, str) and value == choice) for choice in get_args(member)
            )
        elif origin is list:
            matches = isinstance(value, list) and all(_matches(item, get_args(member)[0]) for item in value)
        elif origin is dict:
            keys, values = get_args(member) or (str, Any)
            matches = isinstance(value, dict) and all(
                _matches(k, keys) and _matches(v, values) for k, v in value.items()
            )
        elif issubclass(origin, Enum):
            matches = value in [choice.value for choice in origin]
        elif origin is float:
            matches = isinstance(value, (int, float)) and not isinstance(value, bool)
        else:
            matches = isinstance(value, origin) and (origin is bool or not isinstance(value, bool))
        if matches:
            return True
    return False


def _describe(action: Action | None, hint: Any) -> str:
    if action is not None and action.choices is not None:
        return " or ".join(repr(choice) for choice in action.choices)
    words = []
    for member in _members(hint):
        items = _items(member)
        if items is not None:
            words.append(f"a list, each {_NAMES.get(items, items.__name__)}")
        elif get_origin(member) is Literal:
            words += [repr(choice) for choice in get_args(member)]
        elif member is not NoneType:
            words.append(_NAMES.get(get_origin(member) or member, getattr(member, "__name__", str(member))))
    return " or ".join(words)


def _cure(action: Action, hint: Any, value: Any) -> str:
    if value is None:
        return " Leave it out for its default."
    number = next(find_number_texts(action.dest, value), None) if isinstance(value, list) else None
    if number is not None:
        return f" {number.partition('. ')[2]}"
    if value is False and "no" in (action.choices or ()):
        return " YAML reads a bare no as false: write 'no', in quotes."
    if str in _members(hint) and not isinstance(value, (list, dict)):
        return " Put it in quotes if it is meant as text."
    return ""


def check_output_dir(path: str | None) -> None:
    """
    Check that a folder can be made and written to, without making it.

    Args:
        path (`str`, *optional*):
            What `output_dir` is.

    Raises:
        `ValueError`: if not.
    """
    problem = None
    try:
        if not path or "\0" in path:
            raise ValueError("that is no name of a folder")
        parent = Path(path).absolute()
        longest = max(len(os.fsencode(part)) for part in parent.parts)
        while not os.path.lexists(parent):  # the first that is there
            parent = parent.parent
        if not parent.is_dir():
            problem = f"{parent} is no folder"
        elif not os.access(parent, os.W_OK | os.X_OK):
            problem = f"{parent} cannot be written to"
        elif hasattr(os, "pathconf"):  # not on Windows
            limits = os.pathconf(parent, "PC_NAME_MAX"), os.pathconf(parent, "PC_PATH_MAX")
            if longest > limits[0] or len(os.fsencode(path)) >= limits[1]:
                problem = "the name is too long"
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem is not None:
        raise ValueError(
            f"output_dir must be a folder that can be made and written to, got {_short.repr(path)}: {problem}."
        )


@contextmanager
def unmade(path: str) -> Iterator[None]:
    """If what is done here fails, take away the empty folders that it has made of `path`."""
    folder = Path(path).absolute()
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # it was not made, or something is in it
                each.rmdir()
        raise


# What errors of libraries say, and the option that each is about
_OPTION_OF = {
    "No `target_modules` passed": "lora_target_modules, or lora_target_parameters",
    "Target modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "No modules were targeted": "lora_target_modules, or lora_modules_to_save",
    "modules_to_save": "lora_modules_to_save",
    "Invalid task type": "lora_task_type",
    "8 bit and 4 bit precision": "load_in_8bit and load_in_4bit",
    "purely quantized models": "use_peft is needed to train a quantized model",
}


@contextmanager
def naming_options(init_kwargs: dict[str, Any]) -> Iterator[None]:
    """Say in the errors of libraries which option they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        option = next((_OPTION_OF[text] for text in _OPTION_OF if text in str(error)), None)
        if any(f"{quote}{name}{quote}" in str(error) for name in init_kwargs for quote in "'`"):
            option = "model_init_kwargs"
        if option is None and isinstance(error, TypeError):
            raise
        raise ValueError(f"{option}: {error}" if option else str(error)) from error
