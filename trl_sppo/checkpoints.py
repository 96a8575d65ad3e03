"""Which checkpoints are whole. A run may be killed while it writes one."""

import json
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all, whenever the process ends."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_manifest(checkpoint: Path, **facts: Any) -> None:
    """
    Declare a checkpoint whole. The last thing that is written into it.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        facts:
            What a run that resumes from it has to know before anything is loaded.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    manifest = {
        "written_at": datetime.now(timezone.utc).isoformat(),
        "files": {str(path.relative_to(checkpoint)): path.stat().st_size for path in files},
        **facts,
    }
    write_atomically(checkpoint / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """
    The manifest of a whole checkpoint.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.

    Returns:
        `dict`: what was declared when it was written.

    Raises:
        `ValueError`: if the checkpoint is torn; the message says in what way.
    """
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


def find_checkpoint(resume_from_checkpoint: str | bool, output_dir: str) -> str | None:
    """
    The checkpoint to go on from: the one that is asked for, or the last one before it that is whole.

    Args:
        resume_from_checkpoint (`str` or `bool`):
            Path of a checkpoint; or `True` (also `"true"`, from a command line), for the last one in `output_dir`.
        output_dir (`str`):
            Folder of the run.

    Returns:
        `str` or `None`: its path. `None` if there is none yet: the run begins anew.

    Raises:
        `ValueError`: if a path is given that is no checkpoint, or there is no whole one before it.
    """
    asked = None
    if isinstance(resume_from_checkpoint, str) and resume_from_checkpoint.lower() != "true":
        asked = Path(resume_from_checkpoint)
        if not asked.is_dir():
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} is not a folder. Give the path of a checkpoint, "
                "or `true` for the last whole one in output_dir."
            )
    folder = Path(output_dir) if asked is None else asked.parent
    whole: dict[Path, str] = {}
    torn: dict[Path, str] = {}
    for path in [*folder.glob("checkpoint-*"), *([asked] if asked else [])]:
        if _step(path) is not None and path.is_dir() or path == asked:
            try:
                whole[path] = read_manifest(path)["written_at"]
            except ValueError as error:
                torn[path] = str(error)
    if asked in whole:
        return str(asked)
    if asked is not None:
        # Those of another run, or of a later step, are not "the one before"
        whole = {path: time for path, time in whole.items() if (_step(path) or 0) < (_step(asked) or 0)}
    found = max(whole, key=lambda path: whole[path], default=None)
    for path, reason in torn.items():
        if path == asked or asked is None and (found is None or (_step(path) or 0) > (_step(found) or 0)):
            logger.warning(
                f"{path} is torn ({reason}): the run ended while it was written, or it is no checkpoint of an "
                f"SPPOTrainer. Going on from {found or 'the start'}."
            )
    if asked is not None and found is None:
        raise ValueError(
            f"resume_from_checkpoint={str(asked)!r} is torn ({torn[asked]}), and there is no whole checkpoint before "
            "it. Give another one, or leave the option out to begin anew."
        )
    if found is None:
        logger.warning(f"There is no checkpoint in {output_dir} yet: the run begins at step 0.")
    return None if found is None else str(found)


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None
