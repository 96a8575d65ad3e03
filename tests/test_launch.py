"""Starting several processes: as many as were asked for, or an error."""

import json
import re
from importlib import resources
from pathlib import Path

import pytest
from accelerate.utils import is_deepspeed_available
from helpers import ACCELERATE, TRL_SPPO, message, run
from safetensors.torch import load_file

from trl_sppo.arguments.launching import launch_arguments
from trl_sppo.arguments.options import make_parser, parse_arguments


REWARDS = """
import os
from pathlib import Path
from torch import distributed
from helpers import count_abc

def witness(completions, **kwargs):
    path = Path(f"witness{distributed.get_rank()}of{distributed.get_world_size()}")
    path.write_text(f"{len(completions)} {distributed.get_backend()}")
    return count_abc(completions)
"""
MODULE = ["--main_process_port", "0", "--module", "trl_sppo.train"]


@pytest.fixture
def recipe(workdir, tmp_path):
    """A function that writes the recipe of a group that straddles two processes."""
    (tmp_path / "rewards_of_test.py").write_text(REWARDS)
    options = {"per_device_train_batch_size": 2, "reward_funcs": "rewards_of_test.witness", "use_cpu": None}
    return lambda **changes: workdir(**{**options, **changes})


def assert_two_processes_have_trained(folder: Path) -> None:
    witnesses = {path.name: path.read_text() for path in folder.glob("witness*")}
    assert witnesses == {"witness0of2": "2 gloo", "witness1of2": "2 gloo"}
    (row, _) = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert row["num_tokens"] > 0 and "loss" in row


@pytest.mark.parametrize(
    "command",
    [
        [*TRL_SPPO, "--num_processes", "2", "--main_process_port", "0"],
        [*ACCELERATE, "--multi_gpu", "--num_processes", "2", *MODULE],
    ],
    ids=["trl-sppo", "accelerate"],
)
def test_two_processes_on_the_cpu(recipe, tmp_path, command):
    # Once without the forks that stand for processes elsewhere
    result = run([*command, *recipe(logging_steps=1), "--use_cpu"], fork=command[:4] != TRL_SPPO)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Saved the policy to out.") == 1
    assert_two_processes_have_trained(tmp_path)


@pytest.mark.skipif(not is_deepspeed_available(), reason="needs DeepSpeed and a C++ compiler: .ci/run has both")
def test_zero3_on_the_cpu(recipe, tmp_path):
    """With the reference policy, which is sharded too."""
    argv = recipe(accelerate_config="zero3", mixed_precision="no", num_processes=2, use_cpu=True, logging_steps=1)
    result = run([*TRL_SPPO, *argv, "--main_process_port", "0", "--beta", "0.1"], timeout=240)
    assert result.returncode == 0, result.stderr
    assert_two_processes_have_trained(tmp_path)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("policy", "out"))
    assert {name: p.shape for name, p in after.items()} == {name: p.shape for name, p in before.items()}


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        (TRL_SPPO, ["--num_processes", "2"], "num_processes is 2, but training would run in 1, with other batches"),
        (
            [*TRL_SPPO, "--accelerate_config", "multi_gpu", "--main_process_port", "0"],
            ["--num_processes", "2"],
            "num_processes is 2, but training would run in 1, with other batches",  # twice one, that is
        ),
    ],
    ids=["one process", "two without use_cpu"],
)
def test_a_quiet_fallback_is_an_error(recipe, tmp_path, command, options, expected):
    argv = recipe(model_name_or_path="./nowhere")  # nothing is loaded, not even looked for
    result = run([*command, *argv, *options])
    assert result.returncode != 0
    assert f"trl-sppo: error: {expected}" in result.stderr
    assert "On the CPU: `trl-sppo train --num_processes 2 --use_cpu`" in result.stderr
    assert "nowhere" not in result.stderr
    if command[:4] == TRL_SPPO:
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_was_asked_for_is_found_out(recipe, capsys, monkeypatch):
    """In a process of its own, so there is one, whatever was asked for."""
    assert "num_processes is 2, but training would run in 1" in message(capsys, recipe(num_processes=2, use_cpu=True))
    argv = recipe(accelerate_config="multi_gpu", per_device_train_batch_size=4, use_cpu=True)
    assert re.search(r"num_processes in \S*multi_gpu.yaml is 8, but", message(capsys, argv))
    parse_arguments([*argv, "--num_processes", "1"])  # this is not wrong

    argv = recipe(per_device_train_batch_size=4)
    parse_arguments(argv)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE=2 is set in the environment, but no RANK is" in message(capsys, argv)  # left in a shell
    assert "Run `unset WORLD_SIZE`." in message(capsys, [*argv, "--use_cpu"])  # torch would wait for the other
    monkeypatch.setenv("RANK", "0")  # of `torchrun`, or `accelerate launch --multi_gpu`
    assert "WORLD_SIZE is 2, but training would run in 1" in message(capsys, argv)
    monkeypatch.setenv("WORLD_SIZE", "1")
    parse_arguments(argv)


@pytest.mark.parametrize(("name", "kind"), [("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_a_launch_that_drops_the_sharding_is_an_error(recipe, capsys, name, kind):
    """As many processes as asked for, by `torchrun`: it does not read the recipe's options of accelerate."""
    argv = recipe(accelerate_config=name, num_processes=1, per_device_train_batch_size=4, use_cpu=True)
    assert f"asks for {kind}, but this launch has not set it up" in message(capsys, argv)


def test_fsdp_on_the_cpu_is_an_error(recipe, capsys, monkeypatch):
    """accelerate would train a whole model in each process."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    argv = recipe(accelerate_config="fsdp2", per_device_train_batch_size=4, use_cpu=True)
    assert "FSDP on the CPU: accelerate shards on GPUs only" in message(capsys, [*argv, "--num_processes", "1"])


def test_several_processes_on_the_cpu_need_a_flag_of_accelerate(recipe):
    def launch(*argv: str, **changes) -> list[str]:
        return launch_arguments(make_parser(), [*recipe(**changes), *argv])

    two = ["--num_processes", "2"]
    assert launch(*two, "--use_cpu") == launch(*two, use_cpu=True) == [*two, "--multi_gpu"]
    # not where there is one process, or a GPU, or where the user says how
    assert launch("--num_processes", "1", use_cpu=True) == ["--num_processes", "1"]
    assert launch(*two) == launch(*two, "--use_cpu", "false", use_cpu=True) == two
    assert launch(*two, "--cpu", use_cpu=True) == [*two, "--cpu"]
    zero3 = str(resources.files("trl.accelerate_configs") / "zero3.yaml")
    assert launch(*two, use_cpu=True, accelerate_config="zero3") == ["--config_file", zero3, *two]


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("fsdp2", None)])
def test_configurations_of_trl_reach_accelerate(recipe, name, stage):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    argv = recipe(accelerate_config=name, num_processes=2)
    launch = launch_arguments(make_parser(), argv)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*launch, *MODULE]))
    if stage is None:
        environment = prepare_multi_gpu_env(args)
        assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    else:
        args.deepspeed_fields_from_accelerate_config = ""
        _, environment = prepare_deepspeed_cmd_env(args)
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
        assert (environment.get("ACCELERATE_DEEPSPEED_ZERO3_INIT") == "true") == (stage == 3)
    assert args.nproc_per_node == "2" and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
