"""What libraries say at every start of a command, and its user can do nothing about."""

import logging
import os
import signal
import warnings


def hush() -> None:
    """Leave it out. To be called before those libraries are imported."""
    # TRL 1.16 and PEFT call it as transformers did before 5.23
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
    # On CPUs with AVX-512 bf16: a faster kernel for 4 bit could be installed
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in str(record.msg))
    logging.getLogger("accelerate.commands.launch").addFilter(_is_news)


def end_quietly_on_interrupt() -> None:
    """Let Ctrl-C end the process with status 130 and no traceback, wherever it is. For the time of its imports."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))


def _is_news(record: logging.LogRecord) -> bool:
    """That accelerate has taken its defaults is none, unless it starts a process on each GPU."""
    said = record.getMessage()
    return "More than one GPU" in said or not said.startswith("The following values were not passed to")
