"""The process of `trl-sppo train`: arguments in, a trained and saved policy out."""

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from .quiet import hush, say_interrupts


hush()  # before the imports that would speak
if __name__ == "__main__":
    say_interrupts()

from accelerate.utils import gather_object  # noqa: E402
from trl import get_peft_config, get_quantization_config  # noqa: E402

from .arguments.loading import load_data  # noqa: E402
from .arguments.options import SPPOScriptArguments as SPPOScriptArguments  # noqa: E402
from .arguments.options import fail, load_preference_funcs, load_reward_funcs, parse_arguments  # noqa: E402
from .arguments.recipes import unmade  # noqa: E402
from .checks.arguments import check_activation_checkpointing, check_optimizer  # noqa: E402
from .checks.models import check_adapter  # noqa: E402
from .errors import report  # noqa: E402
from .models.adapters import adopt_options, is_adapter  # noqa: E402
from .runs.alone import alone_in  # noqa: E402
from .runs.checkpoints import how_to_go_on  # noqa: E402
from .trainer import SPPOTrainer  # noqa: E402


def build_trainer(argv: list[str]):
    """Parse arguments and build the trainer. Raises `ValueError`, `ImportError` or `OSError` for wrong arguments."""
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
    if training_args.process_index == 0 and os.path.isdir(str(training_args.output_dir)):
        with alone_in(str(training_args.output_dir)):
            pass  # fails before anything is loaded. The trainer holds it during the run
    check_optimizer(training_args)
    check_activation_checkpointing(training_args)
    adopt_options(model_args)
    check_adapter(model_args)
    try:
        peft_config = None if is_adapter(model_args.model_name_or_path) else get_peft_config(model_args)
    except TypeError as error:
        raise ValueError(f"PEFT refuses the lora_ options: {error}") from error
    evaluate = training_args.eval_strategy != "no"
    train_dataset = eval_dataset = None
    if training_args.rollouts is None or evaluate:
        train_dataset, eval_dataset = load_data(script_args, dataset_args, evaluate)
    if training_args.rollouts is not None:  # the prompts come from them
        train_dataset = None
    try:
        with unmade(str(training_args.output_dir)):
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
                peft_config=peft_config,
            )
    except (TypeError, ValueError) as error:  # of the class that transformers gives model_init_kwargs to
        if not any(f"{quote}{name}{quote}" in str(error) for name in init_kwargs for quote in "'`"):
            raise
        raise ValueError(f"model_init_kwargs: {error}") from error


def main(argv: list[str] | None = None, only_rollouts: bool = False):
    """Train as the arguments say, or only write rollouts, and return the trainer. The policy goes to `output_dir`."""
    try:
        trainer = build_trainer(sys.argv[1:] if argv is None else argv)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:  # before there is anything to continue
        print("trl-sppo: interrupted.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    hosts: list[str] = []
    try:
        hosts = gather_object([socket.gethostname()])
        if only_rollouts:
            folder = trainer.rollout()
            trainer.accelerator.print(f"Wrote rollouts to {folder}, for `trl-sppo train --rollouts {folder}`.")
            return trainer
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except KeyboardInterrupt:  # training has printed how to continue
        if only_rollouts:
            print("trl-sppo: sampling ended. The same command continues.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        where = place_of(trainer.args.process_index, hosts)
        if only_rollouts:
            report(error, f"sampling ended{where}", "The same command continues.")
        else:
            step, output_dir = trainer.state.global_step, trainer.args.output_dir
            report(error, f"training ended at step {step}{where}", how_to_go_on(output_dir))
        raise SystemExit(1) from error
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()
    trainer.create_model_card(model_name=Path(trainer.args.output_dir).resolve().name)
    trainer.accelerator.print(f"Saved the policy to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return trainer


def place_of(rank: int, hosts: list[str]) -> str:
    """The machine of a process, and the machines of the others, if there are several."""
    if len(set(hosts)) < 2:
        return ""
    others = [
        f"{host} (processes {', '.join(str(i) for i, name in enumerate(hosts) if name == host)})"
        for host in dict.fromkeys(hosts)
        if host != hosts[rank]
    ]
    return f" in process {rank} on {hosts[rank]}; other machines: {', '.join(others)}"


def run(only_rollouts: bool = False) -> None:
    """Train as the command line says, or only write rollouts, and finish trackers and processes."""
    trainer = main(only_rollouts=only_rollouts)
    if hasattr(trainer, "end"):  # since transformers 5.18
        trainer.end()


if __name__ == "__main__":
    run()
