"""Whole and torn checkpoints: a run may be killed while it writes one."""

import json
import re
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..files import _now, read_beginning, write_atomically
from .forms import differences


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"  # in each checkpoint
FORMAT = 2  # of what a checkpoint holds besides what transformers saves
REPLACED = ".replaced"  # a whole checkpoint, while one of the same step is being written

# Options that say how an iteration is cut into micro-batches. What a checkpoint holds of one fits these only
LAYOUT = (
    "num_generations", "per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps",
    "num_iterations",
)  # fmt: skip


def write_manifest(checkpoint: Path, **facts: Any) -> None:
    """Declare a checkpoint whole, with facts that a run which resumes from it must know. It is written last."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    manifest = {
        "format": FORMAT,
        "written_at": _now(),
        "files": {str(path.relative_to(checkpoint)): path.stat().st_size for path in files},
        **facts,
    }
    write_atomically(checkpoint / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises `ValueError`, with the reason, if the checkpoint is torn."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = dict(manifest["files"])
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, which is written last") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read: {error}") from error
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"its file {name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"its file {name} has {path.stat().st_size} bytes instead of {size}")
    return manifest


def asked_checkpoint(resume_from_checkpoint: Any) -> Path | None:
    """
    The checkpoint asked for by its path, `None` if it is the last one. Raises `ValueError` if it is no checkpoint.
    """
    if isinstance(resume_from_checkpoint, bool) or str(resume_from_checkpoint).lower() in ("true", "false", "none"):
        return None
    path = Path(resume_from_checkpoint)
    if not path.is_dir() or (_step(path) is None and not (path / MANIFEST).exists()):
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint's folder, with its {MANIFEST}, got "
            f"{str(path)!r}; or `true`, for the last whole one in output_dir."
        )
    return path


def _checkpoints(folder: Path) -> tuple[dict[Path, str], dict[Path, str]]:
    """The whole checkpoints in a folder and when they were written; and the torn ones and why they are."""
    whole: dict[Path, str] = {}
    torn: dict[Path, str] = {}
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and _step(path) is not None:
            try:
                whole[path] = read_manifest(path)["written_at"]
            except ValueError as error:
                torn[path] = str(error)
    return whole, torn


def last_whole_checkpoint(folder: str) -> Path | None:
    """The whole checkpoint that was written last by the run that began last in a folder."""
    whole, _ = _checkpoints(Path(folder))
    began_at = read_beginning(folder).get("began_at", "")
    whole = {path: time for path, time in whole.items() if time >= began_at}
    return max(whole, key=lambda path: whole[path], default=None)


def checkpoints_of_run(folder: str) -> dict[int, Path]:
    """By step, the whole checkpoints of the run that began last in a folder; all if no SPPOTrainer has written it."""
    whole, why_not = _checkpoints(Path(folder))
    beginning = read_beginning(folder)
    if not beginning:
        return {_number(path): path for path in (*whole, *why_not)}
    for path, written_at in whole.items():
        if written_at < beginning["began_at"]:
            why_not[path] = "an earlier run has written it"
    for path, why in why_not.items():
        logger.warning_once(f"{path} is left out: {why}.")
    return {_number(path): path for path in whole if path not in why_not}


def find_checkpoint(resume_from_checkpoint: Any, output_dir: str) -> str | None:
    """
    Path of the checkpoint to continue from: the one asked for (`True`: the last in `output_dir`), or the last whole
    one before it; `None` if there is none yet. Raises `ValueError` if it is torn and none is before it.
    """
    asked = asked_checkpoint(resume_from_checkpoint)
    if asked is None:
        _, torn = _checkpoints(Path(output_dir))
        found = last_whole_checkpoint(output_dir)
        torn = {path: why for path, why in torn.items() if found is None or _number(path) >= _number(found)}
    else:
        try:
            read_manifest(asked)
            return str(asked)
        except ValueError as error:
            torn = {asked: str(error)}
        before = [path for path in _checkpoints(asked.parent)[0] if _number(path) < _number(asked)]
        found = max(before, key=_number, default=None)
        if found is None:
            raise ValueError(
                f"resume_from_checkpoint={str(asked)!r} is torn ({torn[asked]}), and there is no whole checkpoint "
                "before it. Give another one, or leave the option out to begin anew."
            )
    for path, why in torn.items():
        logger.warning_once(
            f"{path} is torn ({why}): the run ended while it was written, or it is no checkpoint of an SPPOTrainer. "
            f"Going on from {found or 'the start'}."
        )
    if found is None:
        logger.warning_once(f"There is no checkpoint in {output_dir} yet: the run begins at step 0.")
    return None if found is None else str(found)


def layout_of(args: Any) -> dict[str, int]:
    """How a run with these arguments cuts an iteration into micro-batches."""
    return {"num_processes": args.world_size, **{name: getattr(args, name) for name in LAYOUT}}


def check_fits(checkpoint: str, args: Any, form: dict[str, Any] | None = None) -> None:
    """
    Raise `ValueError` if a run with these arguments, and this form as far as it is known ([`~forms.form_of`]), cannot
    continue from a whole checkpoint: it has no optimizer, other batches, or another policy or optimizer.
    """
    manifest = read_manifest(Path(checkpoint))
    new_run = f"or begin a new run from its weights with model_name_or_path={checkpoint!r} and another output_dir."
    if not manifest["can_be_resumed"]:
        raise ValueError(
            f"{checkpoint} was saved with save_only_model=True, without the optimizer: it cannot be resumed. To begin "
            f"a new run from its weights, set model_name_or_path={checkpoint!r} and another output_dir."
        )
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{checkpoint} was written by another version of trl_sppo, with its rollouts and counters in another "
            f"form. Resume it with that version, {new_run}"
        )
    now, then = layout_of(args), manifest["layout"]
    changed = [f"{name} was {then[name]}, now {now[name]}" for name in now if then[name] != now[name]]
    if changed:
        raise ValueError(
            f"{checkpoint} belongs to a run with other batches ({'; '.join(changed)}), of which it holds rollouts and "
            f"a place in the data. Set these options back, {new_run}"
        )
    changed = differences(manifest.get("form", {}), form or {})  # earlier versions wrote none
    if changed:
        raise ValueError(
            f"{checkpoint} belongs to a run of another kind ({'; '.join(changed)}), whose weights and optimizer it "
            f"holds. Set these options back, {new_run}"
        )


def check_resume(args: Any, form: dict[str, Any] | None = None) -> None:
    """Raise `ValueError` if the checkpoint to resume from is missing, or belongs to a different run."""
    resume: Any = args.resume_from_checkpoint
    if resume and str(resume).lower() != "false":
        checkpoint = find_checkpoint(resume, str(args.output_dir))
        if checkpoint is not None:
            check_fits(checkpoint, args, form)


def _step(path: Path) -> int | None:
    match = re.fullmatch(rf"checkpoint-(\d+)(?:{re.escape(REPLACED)})?", path.name)
    return int(match[1]) if match else None


def _number(path: Path) -> int:
    return _step(path) or 0
