"""Errors that end a run, and their messages."""

import errno
import os
import sys
import traceback

import torch
from torch import distributed as dist


class RunError(RuntimeError):
    """A run cannot continue; the message says why and what to do. The cause, if there is one, is a user's code."""


def explain(error: BaseException) -> str:
    """The error's own words, and a fix if they do not contain one."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, RunError):
        return str(error)
    # safetensors and torch.save give no errno
    full = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    if any(words in text for words in (*full, "PytorchStreamWriter failed", "iostream error", "unexpected pos")):
        return (
            f"a file could not be written, most likely because the disk is full ({text.splitlines()[0]}). Make room, "
            "or lower save_total_limit and rollouts_total_limit."
        )
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU is out of memory ({error}). Lower reward_batch_size or per_device_train_batch_size (and raise "
            "steps_per_generation and gradient_accumulation_steps for the same iteration). See docs/memory.md."
        )
    if is_of_another_process(error) and "imed out" in text:
        return (
            f"no message from another process came within ddp_timeout ({text.splitlines()[0]}). That process hangs, "
            "or the network between the machines is interrupted: see its messages. If it only takes long, raise "
            "ddp_timeout (in seconds)."
        )
    if is_of_another_process(error):
        return f"another process of this run has ended, see its message ({text.splitlines()[0]})."
    return text


def report(error: BaseException, what: str, how: str) -> None:
    """Print what ended and where, the error, its traceback if that helps, and how to continue."""
    cause = error.__cause__ if isinstance(error, RunError) else error
    if cause is not None:
        traceback.print_exception(cause)
    print(f"trl-sppo: error: {what}: {explain(error)}\n{how}", file=sys.stderr)


def is_of_another_process(error: BaseException) -> bool:
    """Whether an error only says that another process of the run is gone."""
    words = "onnection closed by peer", "onnection reset by peer", "third_party/gloo", "NCCL error"
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def check_positive(**options: float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
