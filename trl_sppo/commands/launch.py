"""`trl-sppo train` and `trl-sppo rollout`: start the processes that train or sample."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..arguments.launching import accelerate_config, launch_arguments
from ..arguments.options import fail, make_parser, split_config
from ..arguments.recipes import read_recipe
from ..quiet import LAUNCHER


def main(argv: list[str], module: str = "trl_sppo.train") -> int:
    """Run a module in one or more processes, through `accelerate launch` like `trl grpo`. Returns the status."""
    parser = make_parser()
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    argv = split_config(argv)
    try:
        launch = launch_arguments(parser, argv, here=True)
        if "--cpu" not in launch:
            accelerate_config(None)  # the default one, which the launcher reads
        env = read_recipe(argv[argv.index("--config") + 1]).get("env", {}) if "--config" in argv else {}
    except ValueError as error:
        fail(error)
    env |= {LAUNCHER: os.getpid()}
    os.environ.update({name: str(value) for name, value in env.items()})  # the processes inherit it
    arguments = launch_command_parser().parse_args([*launch, "--module", module, *argv])
    arguments.signals_to_handle = "SIGHUP,SIGQUIT"  # torch's launcher kills processes 30 s after a signal
    # A failing process has reported the reason, so the launcher's traceback is not shown
    try:
        with passing_on_signals():
            launch_command(arguments)
    except subprocess.CalledProcessError as error:
        codes = {0: error.returncode}
    except (ValueError, OSError) as error:  # of the launcher itself
        fail(f"accelerate launch: {error}")
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    else:
        return 0
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGINT:  # it could not report this itself
            print(
                f"trl-sppo: error: process {rank} was ended by {signal.Signals(-code).name}. If you did not send this "
                "signal, the machine may be out of memory. The same command with --resume_from_checkpoint true "
                "continues from the last checkpoint.",
                file=sys.stderr,
            )
    return next((128 - code if code < 0 else code for code in codes.values() if code), 1)  # 128 + a signal's number


@contextmanager
def passing_on_signals() -> Iterator[None]:
    """Forward SIGTERM and SIGINT to the child processes, and wait for their end."""

    def pass_on(number: int, frame: Any) -> None:
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
