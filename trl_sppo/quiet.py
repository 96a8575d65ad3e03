"""Known harmless warnings that are silenced, and Ctrl-C without a traceback."""

import ctypes
import logging
import os
import signal
import sys
import time
import warnings
from types import FrameType
from typing import Any


# A launcher may forward a signal that its processes already got from the terminal: it counts once
SAME_SIGNAL = 3.0  # seconds
LAUNCHER = "TRL_SPPO_LAUNCHER"  # the environment variable with its process id
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def hush() -> None:
    """Silences known harmless warnings. Must be called before their libraries are imported."""
    # TRL 1.16 and PEFT call it as transformers did before 5.23
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
    # On CPUs with AVX-512 bf16: a faster kernel for 4 bit could be installed
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in str(record.msg))
    logging.getLogger("accelerate.commands.launch").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for accelerate's list of defaults, unless it starts a process on each GPU."""
    said = record.getMessage()
    return "More than one GPU" in said or not said.startswith("The following values were not passed to")


def say_interrupts() -> None:
    """On Ctrl-C, one line instead of a traceback. For a process's own module, before its other imports."""

    last = -SAME_SIGNAL

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        is_same, last = time.monotonic() - last < SAME_SIGNAL, time.monotonic()
        if not is_same:
            raise KeyboardInterrupt

    def say(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("trl-sppo: interrupted.", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    signal.signal(signal.SIGINT, interrupt)
    sys.excepthook = say
    if sys.platform == "linux" and os.environ.get(LAUNCHER) == str(os.getppid()):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a launcher that is killed can pass nothing on
