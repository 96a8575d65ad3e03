"""Launch options: the arguments of `accelerate launch`, and a check that the launch obeys them."""

import os
import socket
from argparse import Namespace
from difflib import get_close_matches
from ipaddress import ip_address
from typing import Any, NoReturn

from accelerate import PartialState
from accelerate.commands.config import config_args
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import parse_flag_from_env
from transformers.utils.generic import flatten_dict
from trl import TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..config import SPPOConfig
from ..option_rules import find_launch_problems
from .recipes import check_recipe, read_recipe


# Options of `accelerate launch` that name the program
_SCRIPT = "training_script", "training_script_args", "module", "no_python"

_FLAT = "A recipe is one flat list of options. Write this section's options at the top level, by their names here."
# Replacements of frequent options of older TRL and transformers, alignment-handbook, open-r1 and others
INSTEAD = {
    "torch_dtype": "Write dtype.",
    "use_flash_attention_2": "Write attn_implementation: flash_attention_2.",
    "evaluation_strategy": "Write eval_strategy.",
    "no_cuda": "Write use_cpu.",
    "per_gpu_train_batch_size": "Write per_device_train_batch_size.",
    "warmup_ratio": "Write warmup_steps: below 1 it is a share of all steps.",
    "overwrite_output_dir": "Remove it: a run writes into output_dir. resume_from_checkpoint: true continues one.",
    "save_safetensors": "Remove it: weights are always saved as safetensors.",
    "wandb_project": "Write env: {WANDB_PROJECT: ...}, which transformers reads.",
    "dataset_mixer": "Write dataset_name, or a mixture as datasets: [{path: ...}].",
    "dataset_splits": "Write dataset_train_split and dataset_test_split.",
    "dataset_prompt_column": "The column must be named prompt: rename it with `dataset.rename_column`.",
    **dict.fromkeys(("preprocessing_num_workers", "dataset_num_proc"), "Remove it: prompts are tokenized on use."),
    "max_prompt_length": "Remove it: prompts are never cut. Filter long ones, or set vllm_max_model_length.",
    **dict.fromkeys(("max_length", "max_new_tokens", "response_length"), "Write max_completion_length."),
    "reward_model_path": "Write reward_model_name_or_path.",
    "judge": "Write preference_funcs, with the import path of a judge (docs/judges.md).",
}
# Options of verl, in its sections
VERL = {
    **dict.fromkeys(("algorithm.group_size", "actor_rollout_ref.rollout.n"), "num_generations"),
    "algorithm.beta": "eta (1 / beta)",
    "algorithm.sppo_eta": "eta",
    "algorithm.win_rate_threshold": "win_rate_threshold",
    **dict.fromkeys(("actor.model_name", "actor_rollout_ref.model.path"), "model_name_or_path"),
    **dict.fromkeys(("actor.learning_rate", "actor_rollout_ref.actor.optim.lr"), "learning_rate"),
    **dict.fromkeys(("rollout.engine", "actor_rollout_ref.rollout.name"), "use_vllm: true"),
    **dict.fromkeys(("rollout.temperature", "actor_rollout_ref.rollout.temperature"), "temperature"),
    **dict.fromkeys(("rollout.max_new_tokens", "data.max_response_length"), "max_completion_length"),
    **dict.fromkeys(("reward.model_name", "reward_model.model.path"), "reward_model_name_or_path"),
    **dict.fromkeys(("algorithm.name", "reward.type"), "left out"),
    "custom_reward_function.path": "reward_funcs",
    "data.train_files": "dataset_name",
    "trainer.n_gpus_per_node": "num_processes",
}


def advice(name: str, value: Any, options: set[str], mappings: set[str]) -> str:
    """Advice on an unknown option with this value. `mappings` are the options that take a mapping."""
    if name in INSTEAD:
        return INSTEAD[name]
    is_section = isinstance(value, dict) or "." in name
    nearest = get_close_matches(name, sorted(mappings if is_section else options), n=1, cutoff=0.8)
    if nearest:
        return f"Did you mean {nearest[0]}?"
    keys = flatten_dict(value, name) if isinstance(value, dict) else {}
    if translated := ", ".join(f"{key} is {VERL[key]}" for key in keys if key in VERL):
        return f"{_FLAT} Here {translated}."
    return _FLAT if is_section else "`trl-sppo train --help` lists all options."


def launch_arguments(parser: TrlParser, argv: list[str], here: bool = False) -> list[str]:
    """
    Arguments of `accelerate launch`, the recipe's first. `here` is whether they are for a launch on this machine.
    Raises `ValueError` for unknown options.
    """
    launcher: Any = launch_command_parser()
    launcher.error = _refuse  # instead of accelerate's usage text and exit
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
    # accelerate would run an argument that belongs to no option as the script
    launch = launcher.parse_args([*found, "--module", "trl_sppo.train"])
    if launch.training_script != "trl_sppo.train":
        raise ValueError(
            f"command line: {launch.training_script!r} belongs to no option. Options are written `--name value`, and "
            "a recipe is given with --config."
        )
    config = None
    if launch.config_file is not None:
        config = accelerate_config(launch.config_file)  # accelerate reads it too, a wrong one would end in a traceback
    machines, env = launch.num_machines or getattr(config, "num_machines", 1), {**os.environ, **recipe.get("env", {})}
    if here and options.use_cpu and machines > 1 and "GLOO_SOCKET_IFNAME" not in env:
        _check_own_name(machines)
    # accelerate starts several processes on the CPU only with mpirun, or with --multi_gpu
    strategies = "config_file", "multi_gpu", "cpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm"
    strategy = any(getattr(launch, name) for name in (*strategies, "mpirun_hostfile"))
    if options.use_cpu and (launch.num_processes or 1) > 1 and not strategy:
        found.append("--multi_gpu")
    return found


def _check_own_name(machines: int) -> None:
    """Raise `ValueError` if gloo would listen on the loopback address, which other machines cannot reach."""
    name = socket.gethostname()
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    except OSError:
        addresses = set()
    if all(ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        raise ValueError(
            f"num_machines={machines}: this machine's name {name!r} does not resolve to an address that others can "
            "reach, and processes on the CPU would listen on the loopback address. Name the network interface in the "
            "recipe, as `env: {GLOO_SOCKET_IFNAME: eth0}`, or export GLOO_SOCKET_IFNAME."
        )


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def accelerate_config(file: str | None) -> Any:
    """accelerate's configuration, from a file or the default file. `None` if neither exists."""
    if file is None and not os.path.isfile(config_args.default_config_file):
        return None
    try:
        config = config_args.load_config_from_file(file)
        if not isinstance(getattr(config, "num_processes", 1), int):
            raise ValueError(f"num_processes must be a whole number, got {config.num_processes!r}")
        return config
    except Exception as error:  # of YAML or JSON, or any other that a wrong entry causes
        raise ValueError(
            f"the configuration of accelerate {file or config_args.default_config_file} cannot be read "
            f"({type(error).__name__}: {error}). Correct or delete the file; `accelerate config` writes a new one."
        ) from error


def check_num_processes(launch: list[str]) -> None:
    """Raise `ValueError` if the launch silently fell back to fewer processes, or to unsharded models."""
    for problem in find_launch_problems():
        raise ValueError(problem)
    options = launch_command_parser().parse_args([*launch, "--module", "trl_sppo.train"])
    config = accelerate_config(options.config_file) if options.config_file else None
    state = PartialState()  # the training options have created it
    asked, source = int(os.environ.get("WORLD_SIZE", state.num_processes)), "WORLD_SIZE"
    if options.num_processes is not None:
        asked, source = options.num_processes, "num_processes"
    elif config is not None:
        asked, source = config.num_processes, f"num_processes in {options.config_file}"
    if asked != state.num_processes:
        raise ValueError(
            f"{source} is {asked}, but training would run in {state.num_processes}, with other batches than requested."
            " accelerate starts a single process if it finds fewer than two GPUs, so set num_processes to the number "
            "of GPUs. On the CPU: `trl-sppo train --num_processes 2 --use_cpu`."
        )
    kind = getattr(config, "distributed_type", None)
    for name in ("FSDP", "DEEPSPEED"):
        if (kind == name or getattr(options, f"use_{name.lower()}")) and not parse_flag_from_env(
            f"ACCELERATE_USE_{name}"
        ):
            raise ValueError(
                f"accelerate_config (or use_{name.lower()}) asks for {name}, but this launch has not set it up, so "
                "each process would train a whole model. Launch with `trl-sppo train`, or with `accelerate launch "
                "--config_file FILE`."
            )
    if state.device.type == "cpu" and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "FSDP on the CPU: accelerate shards on GPUs only, so each process would train a whole model. Use "
            "DeepSpeed, which also shards on a CPU."
        )
