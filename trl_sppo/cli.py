"""The `trl-sppo` command. The modules of a command are imported only when it runs."""

import argparse
import signal
import sys
from importlib import import_module
from typing import Any

from . import __version__
from .quiet import hush


# The module whose `main` runs a command, further arguments of `main`, and the help
COMMANDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "train": ("commands.launch", {}, "train a policy from a YAML recipe and options"),
    "check": ("commands.check", {}, "report what a recipe does and needs, and what looks wrong, without a GPU"),
    "rollout": (
        "commands.launch",
        {"module": "trl_sppo.sample"},
        "sample and score completions from a recipe, without training, for `train --rollouts`",
    ),
    "eval": ("commands.evaluate", {}, "compare two policies on the same prompts, under one or several judges"),
    "ladder": ("commands.ladder", {}, "compare the checkpoints of a run with each other"),
    "judge-check": ("commands.judge_check", {}, "test judges on labelled pairs: agreement, biases, consistency, cost"),
    "report": ("commands.report", {}, "write a page about a run: curves, win rates, diagnostics, samples"),
    "quickstart": ("quickstart", {}, "train a small model on this machine and show its win rate against the original"),
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
    for name, (_, _, description) in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    args, _ = parser.parse_known_args(argv[:1])
    module, more, _ = COMMANDS[args.command]
    return import_module(f"trl_sppo.{module}").main(argv[1:], **more)
