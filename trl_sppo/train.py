"""What `trl-sppo train` runs in each process: arguments in, a trained and saved policy out."""

import importlib
import os
import re
import signal
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .quiet import hush, say_interrupts


hush()  # before the imports that would speak
if __name__ == "__main__":
    say_interrupts()

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser  # noqa: E402

from .arguments import check_output_dir, check_recipe, naming_options, read_recipe, unmade  # noqa: E402
from .config import SPPOConfig  # noqa: E402
from .foreign_options import advice  # noqa: E402
from .loading import dataset_source, mixture_source  # noqa: E402
from .option_checks import find_launch_problems  # noqa: E402


@dataclass
class SPPOScriptArguments(ScriptArguments):
    """
    Arguments of the SPPO training script, besides those of [`SPPOConfig`] and [`~trl.ModelConfig`].

    Args:
        reward_model_name_or_path (`list[str]`, *optional*):
            Reward models: ids on the hub or folders. Each is an oracle of its own.
        reward_funcs (`list[str]`, *optional*):
            Reward functions: names in `trl.rewards`, or dotted import paths such as `my_rewards.brevity`.
        preference_funcs (`list[str]`, *optional*):
            Pairwise oracles: dotted import paths of functions or of judges, such as `my_judges.judge`.
        eval_reward_model_name_or_path, eval_reward_funcs, eval_preference_funcs (`list[str]`, *optional*):
            Likewise, judges for evaluations only.
    """

    reward_model_name_or_path: list[str] | None = field(
        default=None,
        metadata={"help": "Reward models (sequence classifiers with one label): ids on the hub or folders."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions: names in trl.rewards, or dotted import paths ('my_rewards.brevity')."},
    )
    preference_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Pairwise oracles: dotted import paths of functions or judges ('my_judges.judge')."},
    )
    eval_reward_model_name_or_path: list[str] | None = field(
        default=None,
        metadata={"help": "Reward models that judge in evaluations only."},
    )
    eval_reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions that judge in evaluations only."},
    )
    eval_preference_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Pairwise oracles that judge in evaluations only."},
    )

    def __post_init__(self):
        # A YAML recipe may give one name instead of a list
        for name in ("reward_model_name_or_path", "reward_funcs", "preference_funcs"):
            for each in (name, f"eval_{name}"):
                if isinstance(getattr(self, each), str):
                    setattr(self, each, [getattr(self, each)])


# Options of `accelerate launch` that say what to run
_SCRIPT = "training_script", "training_script_args", "module", "no_python"


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def fail(message: object) -> NoReturn:
    """End the program with a one-message error, status 2."""
    print(f"trl-sppo: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_parser(prog: str = "trl-sppo train", config: type[SPPOConfig] = SPPOConfig) -> TrlParser:
    types: Any = (SPPOScriptArguments, config, ModelConfig, DatasetMixtureConfig)
    return _Parser(types, prog=prog, allow_abbrev=False)


def launch_arguments(parser: TrlParser, argv: list[str]) -> list[str]:
    """
    Find the arguments that are for `accelerate launch` and not for training, in the recipe and on the command line.

    Args:
        parser ([`~trl.TrlParser`]):
            The training parser.
        argv (`list[str]`):
            Arguments, possibly with `--config recipe.yaml`.

    Returns:
        `list[str]`: those arguments, the recipe's first.

    Raises:
        `ValueError`: if the recipe is missing or is no mapping, or an argument is known to neither.
    """
    from accelerate.commands.launch import launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

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
    except ValueError as error:
        raise ValueError(f"accelerate_config: {error}") from error
    # What accelerate would take for the script to run is an argument that belongs to no option
    launch = launcher.parse_args([*found, "--module", "trl_sppo.train"])
    script = launch.training_script
    if script != "trl_sppo.train":
        hint = " Options are written `--name value`." if "=" in script else ""
        hint = " A recipe is given with --config." if script.endswith((".yaml", ".yml")) else hint
        raise ValueError(f"command line: {script!r} belongs to no option.{hint}")
    if launch.config_file is not None:
        accelerate_config(launch.config_file)  # which it would read, and end in a traceback
    # accelerate starts several processes for the CPU only by mpirun, or if told that there were several GPUs
    strategies = "config_file", "multi_gpu", "cpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm"
    strategy = any(getattr(launch, name) for name in (*strategies, "mpirun_hostfile"))
    if options.use_cpu and (launch.num_processes or 1) > 1 and not strategy:
        found.append("--multi_gpu")
    return found


def accelerate_config(file: str | None) -> Any:
    """
    Read a configuration of accelerate.

    Args:
        file (`str`, *optional*):
            Its file. By default the one that `accelerate config` writes.

    Returns:
        What accelerate makes of it, or `None` if no file is given and there is no default one.

    Raises:
        `ValueError`: if it cannot be read.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if file is None and not os.path.isfile(default_config_file):
        return None
    try:
        config = load_config_from_file(file)
        if not isinstance(getattr(config, "num_processes", 1), int):
            raise ValueError(f"num_processes must be a whole number, got {config.num_processes!r}")
        return config
    except Exception as error:  # of YAML, of JSON, or whatever else a wrong entry ends in
        if isinstance(error, (AttributeError, TypeError)):
            error = ValueError("it is no mapping of what `accelerate config` asks for")
        how = "Correct the file" if file else "Correct or delete the file, which `accelerate config` has written"
        raise ValueError(
            f"the configuration of accelerate {file or default_config_file} cannot be read: {error}. {how}; "
            "`accelerate config --config_file FILE` writes a new one."
        ) from error


def check_num_processes(launch: list[str]) -> None:
    """
    Stop a launch that has fallen back, without a word, to fewer processes than were asked for, or to whole models.

    Args:
        launch (`list[str]`):
            What `launch_arguments` has found: the recipe and the command line may say how many are asked for.

    Raises:
        `ValueError`: if it has.
    """
    from accelerate import PartialState
    from accelerate.commands.launch import launch_command_parser

    for problem in find_launch_problems():
        raise ValueError(problem)
    options = launch_command_parser().parse_args([*launch, "--module", "trl_sppo.train"])
    state = PartialState()  # made by the options of training
    if options.num_processes is not None:
        asked, source = options.num_processes, f"num_processes is {options.num_processes}"
    elif options.config_file is not None:
        asked = accelerate_config(options.config_file).num_processes
        source = f"num_processes is {asked} in {options.config_file}"
    elif "WORLD_SIZE" in os.environ:
        asked = int(os.environ["WORLD_SIZE"])
        source = f"{asked} processes were launched (WORLD_SIZE)"
    elif "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("MASTER_ADDR") == "127.0.0.1":
        # `accelerate launch` that starts one process tells it this address only if more were asked for
        asked = max(2, state.num_processes)
        source = (
            "`accelerate launch` was asked for several processes (or else something has set MASTER_ADDR: unset it)"
        )
    else:
        asked = state.num_processes
    if asked != state.num_processes:
        raise ValueError(
            f"{source}, but training would run in {state.num_processes}, with other batches than asked for. "
            "accelerate quietly starts one process where it finds fewer than two GPUs, and processes without a GPU "
            "find each other only with use_cpu. Ask for as many processes as there are GPUs. On the CPU: `trl-sppo "
            "train --num_processes 2 --use_cpu`, which stands for `accelerate launch --multi_gpu --num_processes 2 "
            "--module trl_sppo.train --use_cpu` (with --cpu instead, accelerate starts one)."
        )
    kind = accelerate_config(options.config_file).distributed_type if options.config_file else None
    for name in ("FSDP", "DEEPSPEED"):
        asked_for = kind == name or getattr(options, f"use_{name.lower()}")
        if asked_for and os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() != "true":
            raise ValueError(
                f"accelerate_config (or use_{name.lower()}) asks for {name}, but this launch has not set it up, and "
                "each process would train a whole model. Launch with `trl-sppo train`, or with `accelerate launch "
                "--config_file FILE`."
            )
    if state.device.type == "cpu" and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "FSDP on the CPU: accelerate shards on GPUs only, and would go on with a whole model in each process. "
            "Leave out the FSDP configuration, or use DeepSpeed, which shards on a CPU too."
        )


def split_config(argv: list[str]) -> list[str]:
    """TRL's parser knows `--config recipe.yaml` only: write `--config=recipe.yaml` as that."""
    return [part for token in argv for part in (token.split("=", 1) if token.startswith("--config=") else [token])]


def load_reward_funcs(names: list[str], option: str = "reward_funcs") -> list:
    """Import reward functions: names in `trl.rewards`, or dotted paths, also of modules in the working directory."""
    functions = []
    for name in names:
        if name == "get_soft_overlong_punishment":  # a factory, which `trl grpo` calls with these values
            from trl.rewards import get_soft_overlong_punishment

            functions.append(get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256))
        else:
            check_dotted(name, f"reward function {name!r} (--{option})", option.replace("funcs", "model_name_or_path"))
            path = name if "." in name else f"trl.rewards.{name}"
            hint = "Give a name in trl.rewards or a dotted path, my_rewards.brevity for `brevity` in my_rewards.py"
            functions.append(import_callable(path, f"reward function {name!r} (--{option})", hint))
    return functions


def load_preference_funcs(names: list[str], option: str = "preference_funcs") -> list:
    """Import pairwise oracles by dotted paths, also of modules in the working directory."""
    hint = "Give a dotted path, such as my_judges.judge for `judge` in my_judges.py"
    for name in names:
        check_dotted(name, f"pairwise oracle {name!r} (--{option})")
    return [import_callable(name, f"pairwise oracle {name!r} (--{option})", hint) for name in names]


def check_dotted(name: str, what: str, model_option: str | None = None) -> None:
    """Raise `ValueError` if a path of a file, or of a model, stands where a dotted import path should."""
    is_file = re.search(r"\.py\b", name)
    if not is_file and not {"/", ":"} & set(name):
        return
    folder, _, module = name.rpartition("/")
    parts = [part for part in re.split("[.:]+", re.sub(r"\.py\b", "", module)) if part]
    is_dotted = len(parts) > 1 and all(part.isidentifier() for part in parts) and "://" not in name
    if not is_file and (os.path.isdir(name) or not is_dotted):
        hint = f" A model is given with {model_option}." if model_option else ""
        raise ValueError(f"{what} is no dotted import path, such as my_rewards.brevity.{hint}")
    path = ".".join(parts) if is_dotted else f"{parts[0]}.NAME, with the name of the function"
    where = f", and start in the folder {folder}, or add it to PYTHONPATH" if folder not in ("", ".") else ""
    raise ValueError(f"{what} is written as a file, but must be a dotted import path. Write {path}{where}.")


def import_callable(path: str, what: str, hint: str) -> Any:
    """Import by a dotted path, also from the working directory. `what` and `hint` are for the `ValueError` if not."""
    module, _, attribute = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{what} could not be imported: {error}. {hint}.") from error
    if not callable(function):
        raise ValueError(f"{what} is no function, but {function!r}.")
    return function


def check_one_dataset(script_args: SPPOScriptArguments, dataset_args: DatasetMixtureConfig) -> None:
    if dataset_args.datasets and script_args.dataset_name:
        raise ValueError("dataset_name and datasets are both given. Keep one: a dataset, or a mixture of them.")
    if not dataset_args.datasets and not script_args.dataset_name:
        raise ValueError(
            "no dataset: give dataset_name (a folder, a file, or an id on the hub) or datasets (a mixture)."
        )


def is_folder_or_id(name: str) -> bool:
    """Whether it is there, or has the form of an id on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if os.path.exists(name):
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_data(script_args: SPPOScriptArguments, dataset_args: DatasetMixtureConfig, evaluate: bool):
    """Load the training split, and the test split if `evaluate`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from trl import get_dataset

    check_one_dataset(script_args, dataset_args)
    if script_args.dataset_name and not is_folder_or_id(script_args.dataset_name):
        raise ValueError(
            f"dataset {script_args.dataset_name!r} (--dataset_name) is no folder that is there, and cannot be an id "
            "on the Hugging Face hub. Check the path."
        )
    if dataset_args.datasets:
        mixture = mixture_source(dataset_args)
        try:
            splits = get_dataset(mixture)
        except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:
            raise ValueError(f"datasets cannot be loaded: {error.__cause__ or error or 'a file is empty'}") from error
    else:
        source = dataset_source(str(script_args.dataset_name), script_args.dataset_config)
        try:
            splits = load_dataset(**source, streaming=script_args.dataset_streaming)
        except DatasetGenerationError as error:  # its cause says what is wrong, and where
            raise ValueError(
                f"dataset {script_args.dataset_name!r} (--dataset_name) cannot be read: {error.__cause__}"
            ) from error
        except StopIteration as error:
            raise ValueError(f"dataset {script_args.dataset_name!r} (--dataset_name) has an empty file.") from error
        except (OSError, ConnectionError) as error:
            raise ValueError(
                f"dataset {script_args.dataset_name!r} (--dataset_name) is neither a folder with data files nor a "
                f"dataset that can be had from the Hugging Face hub. Check the path. ({error})"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"dataset {script_args.dataset_name!r} (--dataset_name) cannot be loaded, with dataset_config="
                f"{script_args.dataset_config!r}: {error}"
            ) from error
    wanted = [script_args.dataset_train_split] + ([script_args.dataset_test_split] if evaluate else [])
    for split in wanted:
        if split not in splits:
            raise ValueError(
                f"the dataset has no split {split!r}, but {sorted(splits)}. Set dataset_train_split and, if "
                "eval_strategy is not 'no', dataset_test_split."
            )
    return splits[wanted[0]], splits[wanted[1]] if evaluate else None


def parse_arguments(argv: list[str]) -> tuple[SPPOScriptArguments, SPPOConfig, ModelConfig, DatasetMixtureConfig]:
    """The options of a training process. Raises `ValueError` for unknown or contradictory ones."""
    parser = make_parser()
    argv = split_config(argv)
    launch = launch_arguments(parser, argv)  # refuses what is unknown; what is accelerate's has done its work by now
    try:
        with naming_options({}):
            parsed: Any = parser.parse_args_and_config(argv, return_remaining_strings=True)[:4]
    except ValueError:
        check_num_processes(launch)  # which may be why: what fits two processes need not fit one
        raise
    check_num_processes(launch)
    check_output_dir(parsed[1].output_dir)
    return parsed


def check_arguments(argv: list[str]) -> SPPOConfig:
    """The training's options. Ends the program with a message if they are wrong, or with the list of them for help."""
    if {"-h", "--help"} & set(argv):
        make_parser().print_help()
        raise SystemExit(0)
    try:
        return parse_arguments(argv)[1]
    except ValueError as error:
        fail(error)


def build_trainer(argv: list[str]):
    """Parse arguments and build the trainer. Raises `ValueError` and the like for what a user can mend."""
    from trl import get_peft_config, get_quantization_config

    from .adapters import adopt_options, is_adapter
    from .alone import alone_in
    from .checks import check_activation_checkpointing, check_adapter, check_optimizer, check_resume, check_vllm
    from .trainer import SPPOTrainer

    script_args, training_args, model_args, dataset_args = parse_arguments(argv)
    if not model_args.model_name_or_path:
        raise ValueError("no model: give model_name_or_path, a folder or an id on the hub.")
    init_kwargs: Any = training_args.model_init_kwargs or {}
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **init_kwargs,
    }
    check_vllm(training_args)
    if training_args.process_index == 0 and os.path.isdir(str(training_args.output_dir)):
        with alone_in(str(training_args.output_dir)):
            pass  # the trainer holds it once it runs: this is to fail before anything is loaded
    check_resume(training_args)
    check_optimizer(training_args)
    check_activation_checkpointing(training_args)
    adopt_options(model_args)
    check_adapter(model_args)
    evaluate = training_args.eval_strategy != "no"
    train_dataset = eval_dataset = None
    if training_args.rollouts is None or evaluate:
        train_dataset, eval_dataset = load_data(script_args, dataset_args, evaluate)
    if training_args.rollouts is not None:  # they bring the prompts
        train_dataset = None
    with unmade(str(training_args.output_dir)), naming_options(init_kwargs):
        return SPPOTrainer(
            model=model_args.model_name_or_path,
            reward_funcs=[
                *(script_args.reward_model_name_or_path or []),
                *load_reward_funcs(script_args.reward_funcs or []),
            ],
            preference_func=load_preference_funcs(script_args.preference_funcs or []),
            eval_reward_funcs=[
                *(script_args.eval_reward_model_name_or_path or []),
                *load_reward_funcs(script_args.eval_reward_funcs or [], "eval_reward_funcs"),
            ],
            eval_preference_func=load_preference_funcs(
                script_args.eval_preference_funcs or [], "eval_preference_funcs"
            ),
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=None if is_adapter(model_args.model_name_or_path) else get_peft_config(model_args),
        )


def main(argv: list[str] | None = None, only_rollouts: bool = False):
    """Train as the arguments say, save the policy to `output_dir`, and return the trainer."""
    from .faults import how_to_go_on, report

    try:
        trainer = build_trainer(sys.argv[1:] if argv is None else argv)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:  # before there is anything to go on from
        print("trl-sppo: interrupted.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    try:
        if only_rollouts:
            folder = trainer.rollout()
            trainer.accelerator.print(f"Wrote rollouts to {folder}, for `trl-sppo train --rollouts {folder}`.")
            return trainer
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except KeyboardInterrupt:  # training has said how to go on
        if only_rollouts:
            print("trl-sppo: sampling ended. The same command goes on.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if only_rollouts:
            report(error, "sampling ended", "The same command goes on.")
        else:
            step, output_dir = trainer.state.global_step, trainer.args.output_dir
            report(error, f"training ended at step {step}", how_to_go_on(output_dir))
        raise SystemExit(1) from error
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()
    trainer.create_model_card(model_name=Path(trainer.args.output_dir).resolve().name)
    trainer.accelerator.print(f"Saved the policy to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return trainer


def make_rollouts(argv: list[str] | None = None):
    """Sample and score completions as the arguments say, write them to `output_dir`, and return the trainer."""
    return main(argv, only_rollouts=True)


if __name__ == "__main__":
    trainer = main()
    if hasattr(trainer, "end"):  # finishes trackers and processes, since transformers 5.18
        trainer.end()
