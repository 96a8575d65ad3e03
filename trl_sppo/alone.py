"""One run at a time in an output directory."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from transformers.utils import logging


logger = logging.get_logger(__name__)

LOCK, OWNER = (
    ".run.lock",
    ".run.json",
)  # in the output directory; the operating system frees the lock of a dead process


@contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """
    Hold a folder, so that no other run writes to it.

    Args:
        folder (`str`):
            Output directory, which is made.

    Raises:
        `ValueError`: if a process that is alive holds it.
    """
    owner = Path(folder) / OWNER
    owner.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(owner.with_name(LOCK)), timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        _refuse_if_alive(folder, owner)
    except (OSError, NotImplementedError) as error:
        logger.warning_once(f"{folder} cannot be locked ({error}): do not start a second run in it.")
    if lock.is_locked:
        facts = {"process": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat()}
        owner.write_text(json.dumps(facts) + "\n")
    try:
        yield
    finally:
        if lock.is_locked:
            owner.unlink(missing_ok=True)
            lock.release()


def _refuse_if_alive(folder: str, owner: Path) -> None:
    try:
        facts = json.loads(owner.read_text())
        process, host, since = facts["process"], facts["host"], facts["since"]
    except (OSError, ValueError, LookupError):  # it begins, or ends, right now
        process = host = since = None
    if host == socket.gethostname() and not psutil.pid_exists(process):
        return  # its children hold the lock for a moment longer
    who = "another process" if process is None else f"process {process} on {host}, which began at {since}"
    raise ValueError(
        f"output_dir={folder!r} is in use by {who}. Two runs would mix up their files: wait for its end, stop it, or "
        "give another output_dir."
    )
