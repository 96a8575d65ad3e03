"""Recipes: YAML files of options, the types of their values, and the output folder."""

import os
import reprlib
from argparse import Action, ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model
from trl import TrlParser
from trl.scripts.utils import DatasetConfig

from ..option_rules import find_number_texts


# A dataset of a mixture. TRL's own class raises a bare `TypeError` for unknown options
_Dataset: Any = create_model(
    "Dataset",
    __config__=ConfigDict(extra="forbid"),
    **{f.name: (f.type, ... if f.default is MISSING else f.default) for f in fields(DatasetConfig)},  # type: ignore
)
# Types that are wider or narrower than in the dataclasses
_HINTS: dict[str, Any] = {
    "datasets": list[_Dataset],
    "preference_funcs": list[str | dict[str, dict[str, Any]]] | None,
    "eval_preference_funcs": list[str | dict[str, dict[str, Any]]] | None,
    "resume_from_checkpoint": str | bool | None,  # what `Trainer.train` takes
    "env": dict[
        Annotated[str, Field(pattern=r"^[^=\x00]+$")],
        Annotated[str, Field(pattern=r"^[^\x00]*$")] | bool | int | float,
    ],
}


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error. PyYAML would keep the last."""

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
    """Read a YAML recipe. Raises `ValueError` if it is missing, is not valid YAML, or is not a mapping."""
    if not os.path.isfile(path):
        raise ValueError(f"recipe {path!r} (--config) is not a file. The recipes of this package are in recipes/.")
    try:
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:  # its own text shows the line, which may hold a key
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"recipe {path} is not valid YAML: {error.problem}{where}") from None
    except Exception as error:  # values such as `2024-13-01` or `!!int x` raise other errors than YAML's
        raise ValueError(f"recipe {path} cannot be read: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(
            f"recipe {path} must be a YAML mapping of `option: value` lines, got {type(recipe).__name__}."
        )
    return recipe


def check_recipe(parser: TrlParser, recipe: dict[str, Any]) -> None:
    """Raise `ValueError` for values of a wrong type. TRL's parser does not check recipes."""
    hints: dict[str, Any] = {}
    for dataclass in parser.dataclass_types:
        hints |= get_type_hints(dataclass)
    hints |= _HINTS
    actions = {action.dest: action for action in reversed(parser._actions)}  # of two, the one without no_
    for name in [name for name in recipe if name in hints]:
        value, hint, action = recipe[name], hints[name], actions.get(name)
        if action is not None and isinstance(value, str) and hint not in (bool, bool | None, _HINTS["datasets"]):
            _check_text(parser, action, value)
            continue
        try:
            TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(next(find_number_texts(name, value), None) or _explain(name, error)) from None


def _check_text(parser: TrlParser, action: Action, value: str) -> None:
    """Parse text as on the command line: YAML reads numbers such as 1e-5 as text."""
    try:
        parser._check_value(action, parser._get_value(action, value))
    except ArgumentError as error:
        raise ValueError(error) from error
    if "\0" in value:
        raise ValueError(f"{action.dest} must not contain a NUL character, got {value!r}.")


def _explain(name: str, error: ValidationError) -> str:
    """Explain in pydantic's words. Of a union, the members that fit best count."""
    depth = max(len(each["loc"]) for each in error.errors())
    problems = [each for each in error.errors() if len(each["loc"]) == depth]
    rules = " or ".join(dict.fromkeys(each["msg"] for each in problems)).replace(" or Input should be ", " or ")
    is_union = len(problems) > 1 and rules.startswith("Input")  # its members' names end the locations
    where = ".".join(map(str, (name, *problems[0]["loc"][: -1 if is_union else None])))
    fix = " Put it in quotes if it is meant as text: YAML reads a bare no as false." if "string" in rules else ""
    return f"{where}: {rules}, got {reprlib.repr(problems[0]['input'])}.{fix}"


def check_output_dir(path: str | None) -> None:
    """Raise `ValueError` unless a folder can be created and written to. Does not create it."""
    folder = Path(path or "").absolute()
    try:
        with suppress(FileNotFoundError):
            folder.stat()  # raises other errors for a name that no file can have
        folder = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
        writable = bool(path) and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except (OSError, ValueError):
        writable = False
    if not writable:
        raise ValueError(f"output_dir must be a folder that can be created and written to, got {reprlib.repr(path)}.")


@contextmanager
def unmade(path: str) -> Iterator[None]:
    """Remove the empty folders of `path` that the block created, if the block fails."""
    folder = Path(path).absolute()
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # it was not created, or it is not empty
                each.rmdir()
        raise
