"""Starting processes: the options of `accelerate launch`, and whether the launch has done what they ask for."""

import os
from argparse import Namespace
from typing import Any, NoReturn

from accelerate import PartialState
from accelerate.commands.config import config_args
from accelerate.commands.launch import launch_command_parser
from trl import TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..config import SPPOConfig
from ..option_rules import find_launch_problems
from .foreign_options import advice
from .recipes import check_recipe, read_recipe


# Options of `accelerate launch` that say what to run
_SCRIPT = "training_script", "training_script_args", "module", "no_python"


def launch_arguments(parser: TrlParser, argv: list[str]) -> list[str]:
    """The arguments of `accelerate launch`, the recipe's first. Raises `ValueError` for those of no option."""
    launcher: Any = launch_command_parser()
    launcher.error = _refuse  # not accelerate's usage and exit
    training = {action.dest for action in parser._actions} - {"help"} | {"env"}
    launching = {action.dest for action in launcher._actions} - training - {"help", *_SCRIPT} | {"accelerate_config"}

    def check(named: dict[str, Any], where: str) -> None:
        options, mappings = training | launching | {"config"}, {*SPPOConfig._VALID_DICT_FIELDS, "env"}
        problems = [
            f"{where}: there is no option {name!r}. {advice(name, value, options, mappings)}"
            for name, value in named.items()
            if name not in training | launching
        ]
        if problems:
            raise ValueError("\n".join(problems))

    found: list[str] = []
    recipe: dict[str, Any] = {}
    argv = list(argv)
    if argv.count("--config") > 1:
        raise ValueError("command line: --config is given more than once. Keep one recipe.")
    if "--config" in argv:
        position = argv.index("--config")
        path = argv[position + 1] if position + 1 < len(argv) else ""
        del argv[position : position + 2]
        recipe = read_recipe(path)
        check({str(name): value for name, value in recipe.items()}, f"recipe {path}")
        for name, value in recipe.items():
            if name in launching and value is not None and value is not False:
                found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        try:
            check_recipe(parser, recipe)
        except ValueError as error:
            raise ValueError(f"recipe {path}: {error}") from error
    options, remaining = parser.parse_known_args(argv, Namespace(use_cpu=recipe.get("use_cpu", False)))
    names = [token[2:].split("=")[0].replace("-", "_") for token in remaining if token.startswith("--")]
    check(dict.fromkeys(names), "command line")
    try:
        found = resolve_accelerate_config_argument(found + remaining)
    except (OSError, ValueError) as error:
        raise ValueError(f"accelerate_config: {error}") from error
    # accelerate would run an argument without an option as the script
    launch = launcher.parse_args([*found, "--module", "trl_sppo.train"])
    script = launch.training_script
    if script != "trl_sppo.train":
        hint = " Options are written `--name value`." if "=" in script else ""
        hint = " A recipe is given with --config." if script.endswith((".yaml", ".yml")) else hint
        raise ValueError(f"command line: {script!r} belongs to no option.{hint}")
    if launch.config_file is not None:
        accelerate_config(launch.config_file)  # accelerate would read it too, and end in a traceback
    # accelerate starts several processes on the CPU only with mpirun, or with --multi_gpu
    strategies = "config_file", "multi_gpu", "cpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm"
    strategy = any(getattr(launch, name) for name in (*strategies, "mpirun_hostfile"))
    if options.use_cpu and (launch.num_processes or 1) > 1 and not strategy:
        found.append("--multi_gpu")
    return found


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def accelerate_config(file: str | None) -> Any:
    """accelerate's own object, from a file or its default one. `None` if neither is there."""
    if file is None and not os.path.isfile(config_args.default_config_file):
        return None
    try:
        config = config_args.load_config_from_file(file)
        if not isinstance(getattr(config, "num_processes", 1), int):
            raise ValueError(f"num_processes must be a whole number, got {config.num_processes!r}")
        return config
    except Exception as error:  # of YAML, of JSON, or whatever else a wrong entry ends in
        if isinstance(error, (AttributeError, TypeError)):
            error = ValueError("it is not a mapping of the options of `accelerate config`")
        how = (
            "Correct the file, or set accelerate_config to another"
            if file
            else "Correct or delete the file, which `accelerate config` has written"
        )
        file, said = file or config_args.default_config_file, str(error).rstrip(".")
        raise ValueError(
            f"the configuration of accelerate {file} cannot be read: {said}. {how}; `accelerate config --config_file "
            "FILE` writes a new one."
        ) from error


def check_num_processes(launch: list[str]) -> None:
    """Raise `ValueError` if the launch has silently fallen back to fewer processes, or to unsharded models."""
    for problem in find_launch_problems():
        raise ValueError(problem)
    options = launch_command_parser().parse_args([*launch, "--module", "trl_sppo.train"])
    state = PartialState()  # the training options have created it
    asked, source = state.num_processes, ""
    if options.num_processes is not None:
        asked, source = options.num_processes, f"num_processes is {options.num_processes}"
    elif options.config_file is not None:
        asked = accelerate_config(options.config_file).num_processes
        source = f"num_processes is {asked} in {options.config_file}"
    elif "WORLD_SIZE" in os.environ:
        asked = int(os.environ["WORLD_SIZE"])
        source = f"{asked} processes were launched (WORLD_SIZE)"
    if asked != state.num_processes:
        raise ValueError(
            f"{source}, but training would run in {state.num_processes}, with other batches than requested. "
            "accelerate starts a single process if it finds fewer than two GPUs, and processes without a GPU work "
            "together only with use_cpu. Set num_processes to the number of GPUs. On the CPU: `trl-sppo train "
            "--num_processes 2 --use_cpu`, which is short for `accelerate launch --multi_gpu --num_processes 2 "
            "--module trl_sppo.train --use_cpu`."
        )
    kind = accelerate_config(options.config_file).distributed_type if options.config_file else None
    for name in ("FSDP", "DEEPSPEED"):
        asked_for = kind == name or getattr(options, f"use_{name.lower()}")
        if asked_for and os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() != "true":
            raise ValueError(
                f"accelerate_config (or use_{name.lower()}) asks for {name}, but this launch has not set it up, so "
                "each process would train a whole model. Launch with `trl-sppo train`, or with `accelerate launch "
                "--config_file FILE`."
            )
    if state.device.type == "cpu" and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "FSDP on the CPU: accelerate shards on GPUs only, so each process would train a whole model. Remove the "
            "FSDP configuration, or use DeepSpeed, which also shards on a CPU."
        )
