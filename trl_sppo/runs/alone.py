"""One run at a time in an output directory."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from transformers.utils import logging

from ..files import _now


logger = logging.get_logger(__name__)

# In the output directory. Names that begin with _ are not pushed to a hub. The system frees the lock of a dead process
LOCK, OWNER = "_run.lock", "_run.json"
ORPHANS = 30.0  # seconds that the children of a dead process may hold its lock


@contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Hold an output directory, which is made. Raises `ValueError` if a process that is alive holds it."""
    owner = Path(folder) / OWNER
    owner.parent.mkdir(parents=True, exist_ok=True)
    with open(owner.with_name(LOCK), "a") as lock:
        deadline = time.monotonic() + ORPHANS
        while not _is_locked_now(lock, folder):
            who, is_dead = _who_holds(owner)
            if not is_dead or time.monotonic() > deadline:
                raise ValueError(
                    f"output_dir={folder!r} is in use by {who}. Wait for its end, stop it, or give another output_dir."
                )
            time.sleep(0.2)
        facts = {"process": os.getpid(), "host": socket.gethostname(), "since": _now()}
        owner.write_text(json.dumps(facts) + "\n")
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)


def _is_locked_now(lock: Any, folder: str) -> bool:
    """Take the lock. `False` if another process has it; where there are no locks, `True` with a warning."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning_once(f"{folder} cannot be locked ({error}): do not start a second run in it.")
    return True


def _who_holds(owner: Path) -> tuple[str, bool]:
    """The process in words, and whether it is known to be dead."""
    try:
        facts = json.loads(owner.read_text())
    except (OSError, ValueError):  # it begins, or ends, right now
        return "another process", False
    who = f"process {facts['process']} on {facts['host']}, which began at {facts['since']}"
    return who, facts["host"] == socket.gethostname() and not psutil.pid_exists(facts["process"])
