"""Atomically written files, and the record of a run's start."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


BEGINNING = "run_began.json"  # in the output directory


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that exists whole or not at all, even if the process is killed."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def mark_beginning(output_dir: str, **facts: Any) -> None:
    """Record the start of a run in its folder, with facts about it. Checkpoints of earlier runs then do not count."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"began_at": _now(), **facts}, indent=2, default=str)
    write_atomically(Path(output_dir) / BEGINNING, text + "\n")


def read_beginning(output_dir: str) -> dict[str, Any]:
    """The record of the start of the run in a folder; empty if there is none."""
    path = Path(output_dir) / BEGINNING
    return json.loads(path.read_text()) if path.is_file() else {}


def _now() -> str:
    return datetime.now(UTC).isoformat()
