"""The `trl-sppo` command. Imports what a command needs only when it runs."""

import argparse
import sys
from importlib.resources import as_file, files

from . import __version__


COMMANDS = {
    "train": "train a policy as a YAML recipe and the command line say",
    "quickstart": "train a small real model on this machine and show its win rate against itself",
}


def main(argv: list[str] | None = None) -> int:
    """Run a `trl-sppo` command and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
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
    return {"train": train, "quickstart": quickstart}[args.command](argv[1:])


def train(argv: list[str]) -> int:
    """Start `trl_sppo.train` in one or more processes, through `accelerate launch` like `trl grpo`."""
    from .train import fail, launch_arguments, make_parser

    parser = make_parser()
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        launch = resolve_accelerate_config_argument(launch_arguments(parser, argv))
    except ValueError as error:
        fail(error)
    # --quiet: a failing process has said why; no traceback of the launcher on top of it
    launch_command(launch_command_parser().parse_args([*launch, "--quiet", "--module", "trl_sppo.train", *argv]))
    return 0


def quickstart(argv: list[str]) -> int:
    """Prepare real assets, train on `recipes/quickstart.yaml`, and show the result."""
    from .quickstart.run import main as run

    run(argv)
    return 0


def recipe(name: str):
    """A context manager of the path of a recipe of this package, installed or beside it in the repository."""
    installed = files("trl_sppo") / "recipes" / name
    return as_file(installed if installed.is_file() else files("trl_sppo") / ".." / "recipes" / name)


if __name__ == "__main__":
    raise SystemExit(main())
