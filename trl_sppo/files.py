"""Files that are there whole or not at all, and what a run writes when it begins."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


BEGINNING = "run_began.json"  # in the output directory


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all, whenever the process ends."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def mark_beginning(output_dir: str, **facts: Any) -> None:
    """
    Write down that a run begins here, and facts about it: checkpoints of earlier runs are then not taken for its own.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"began_at": _now(), **facts}, indent=2, default=str)
    write_atomically(Path(output_dir) / BEGINNING, text + "\n")


def read_beginning(output_dir: str) -> dict[str, Any]:
    """What was written down when the run in a folder began; empty if nothing was."""
    path = Path(output_dir) / BEGINNING
    return json.loads(path.read_text()) if path.is_file() else {}


def _now() -> str:
    return datetime.now(UTC).isoformat()
