"""The command line: recipes and options in, one message or a trained policy out."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import resources

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from helpers import TRL_SPPO, count_abc, encoder, make_tokenizer, message, more_abc
from helpers import run as run_command

from trl_sppo import __version__, cli, train
from trl_sppo.arguments.launching import INSTEAD, launch_arguments
from trl_sppo.arguments.options import (
    check_dotted,
    load_preference_funcs,
    load_reward_funcs,
    make_parser,
    parse_arguments,
)


def test_help():
    result = subprocess.run([sys.executable, "-m", "trl_sppo", "--help"], capture_output=True, text=True, check=True)
    assert "train" in result.stdout and "quickstart" in result.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0 and __version__ in capsys.readouterr().out


def test_help_of_train_lists_the_options(capsys):
    assert cli.main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    for option in ("--eta", "--win_rate_threshold", "--use_peft", "--load_in_4bit", "--num_generations"):
        assert option in printed


def test_train_in_this_process(workdir, tmp_path):
    trainer = train.main([*workdir(), "--eta", "3", "--use_peft", "--lora_r", "2"])
    assert trainer.args.eta == 3.0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "trainer_state.json").exists()


def test_train_through_accelerate(workdir, tmp_path):
    """The command as a user types it, full fine-tuning with evaluation, with a launch argument in the recipe."""
    argv = workdir(num_processes=1, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    result = subprocess.run(
        [sys.executable, "-m", "trl_sppo", "train", *argv, "--eta", "3", "--mixed_precision", "no"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
    )
    assert result.returncode == 0, result.stderr
    assert "Saved the policy to out." in result.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_reward" in row for row in history)


@pytest.mark.parametrize(
    "command", ["train", "rollout", "check", "eval", "ladder", "judge-check", "report", "quickstart"]
)
def test_ctrl_c_before_a_command_has_begun(monkeypatch, capsys, command):
    """As it comes in the middle of imports, which take seconds."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main([command]) == 130
    assert capsys.readouterr().err == "trl-sppo: interrupted.\n"


@pytest.mark.parametrize("module", ["trl_sppo", "trl_sppo.train", "trl_sppo.sample"])
def test_ctrl_c_while_a_process_imports(tmp_path, module):
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd(), *sys.path])}
    command = [sys.executable, "-m", module, *(["check", "x"] if module == "trl_sppo" else [])]
    # Where the tests run in the background of a shell, that ignores the signal for them
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, preexec_fn=heed)
    # Python ends itself by the signal, of which shells and `trl-sppo train` make 130
    assert result.returncode in (130, -signal.SIGINT) and "Traceback" not in result.stderr, result.stderr


def test_ctrl_c_while_a_trainer_is_built(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "build_trainer", interrupted)
    with pytest.raises(SystemExit) as exit:
        train.main([])
    assert exit.value.code == 130 and capsys.readouterr().err == "trl-sppo: interrupted.\n"


def test_an_error_in_the_process_is_one_message_and_a_status(workdir):
    result = run_command([*TRL_SPPO, *workdir(model_name_or_path="./nowhere")])
    assert result.returncode != 0
    assert result.stderr.count("trl-sppo: error: model './nowhere' is neither a folder") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("run", [train.main, lambda argv: cli.main(["train", *argv])], ids=["process", "launcher"])
def test_unknown_options_are_fatal_and_the_nearest_is_named(workdir, capsys, run):
    assert "recipe recipe.yaml: there is no option 'learning_rat'. Did you mean learning_rate?" in message(
        capsys, workdir(learning_rat=1e-6), run
    )
    assert "command line: there is no option 'num_generation'. Did you mean num_generations?" in message(
        capsys, [*workdir(), "--num_generation", "4"], run
    )
    assert "there is no option 'zzz'. `trl-sppo train --help` lists all" in message(capsys, workdir(zzz=1), run)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch_dtype", "Write dtype."),
        ("max_prompt_length", "Remove it: prompts are never cut. Filter long ones"),
        ("warmup_ratio", "Write warmup_steps: below 1 it is a share of all steps."),
        ("reward_model_path", "Write reward_model_name_or_path."),
        ("max_new_tokens", "Write max_completion_length."),
    ],
)
def test_what_took_the_place_of_an_option(workdir, capsys, name, expected):
    assert f"recipe recipe.yaml: there is no option '{name}'. {expected}" in message(capsys, workdir(**{name: 1}))
    dashed = name.replace("_", "-")
    assert f"no option '{name}'. {expected}" in message(capsys, [*workdir(), f"--{dashed}", "1", f"--{name}=1"])


def test_what_took_the_place_of_options_are_options():
    """Fails when a new TRL has an option of the table again, or none of those that it names."""
    launching = {action.dest for action in launch_command_parser()._actions} | {"accelerate_config"}
    options = {action.dest for action in make_parser()._actions} | launching | {"env"}
    assert INSTEAD.keys() & options == set()
    for advice in set(INSTEAD.values()):
        plain = re.sub(r"`.*?`|\{.*?\}|: flash_attention_2|generation_config.json", "", advice)
        named = set(re.findall(r"\w+_\w+|(?<=Write )(?!a )[a-z]+", plain))
        assert named <= options, advice
        assert named or advice.startswith(("Remove it", "The column"))


def test_all_unknown_options_of_a_recipe_are_named(workdir, capsys):
    said = message(capsys, workdir(torch_dtype="auto", wandb_project="x", zzz=1)).splitlines()
    assert [line.split("'")[1] for line in said] == ["torch_dtype", "wandb_project", "zzz"]


@pytest.mark.parametrize("section", ["algorithm", "actor_rollout_ref", "rollout", "trainer", "data", "model", "peft"])
def test_sections_of_other_frameworks(workdir, capsys, section):
    flat = f"recipe recipe.yaml: there is no option '{section}'. A recipe is one flat list of options"
    assert flat in message(capsys, workdir(**{section: {"lr": 1e-6, "more": {"n": 5}}}))
    assert f"no option '{section}.n'. A recipe is one flat" in message(capsys, workdir(**{f"{section}.n": 5}))


def test_a_recipe_in_verls_form_is_translated(workdir, capsys):
    sections = {
        "algorithm": {"name": "sppo", "group_size": 8, "beta": 0.1, "win_rate_threshold": 0.6},
        "actor": {"model_name": "Qwen/Qwen2.5-7B-Instruct", "learning_rate": 5e-7},
        "rollout": {"engine": "vllm", "temperature": 0.8, "max_new_tokens": 1024},
        "reward": {"type": "reward_model", "model_name": "/path/to/reward-model"},
    }
    lines = message(capsys, workdir(**sections)).splitlines()
    assert len(lines) == 4
    assert lines[0].endswith(
        "by their names here. Here algorithm.name is left out, algorithm.group_size is num_generations, "
        "algorithm.beta is eta (1 / beta), algorithm.win_rate_threshold is win_rate_threshold."
    )
    for line, (section, options) in zip(lines, sections.items(), strict=True):
        for name in options:
            assert re.search(rf"\b{section}\.{name} is \w+", line), line
    nested = message(capsys, workdir(actor_rollout_ref={"actor": {"optim": {"lr": 1e-6}, "clip_ratio": 0.2}}))
    assert nested.strip().endswith("Here actor_rollout_ref.actor.optim.lr is learning_rate.")


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("rollout", "out", "rollouts"),
        ("generation_kwarg", {"a": 1}, "generation_kwargs"),
        ("model_init_kwarg", {"a": 1}, "model_init_kwargs"),
        ("dataset_train_splits", "train", "dataset_train_split"),
        ("max_completion_len_", 4, "max_completion_length"),
        ("reward_fns", "x", "reward_funcs"),
    ],
)
def test_misspelt_options_get_the_nearest_name(workdir, capsys, name, value, nearest):
    said = message(capsys, workdir(**{name: value}))
    assert f"there is no option '{name}'. Did you mean {nearest}?" in said


def test_overrides_as_hydra_has_them(workdir, capsys):
    said = message(capsys, [*workdir(), "trainer.n_gpus_per_node=8"])
    assert "'trainer.n_gpus_per_node=8' belongs to no option. Options are written `--name value`" in said


def test_launch_arguments_come_from_the_recipe_and_the_command_line(workdir):
    argv = [*workdir(num_processes=2, accelerate_config="multi_gpu"), "--main_process_port", "1234", "--eta", "2"]
    assert launch_arguments(make_parser(), argv) == [
        "--config_file", str(resources.files("trl.accelerate_configs") / "multi_gpu.yaml"),
        "--num_processes", "2", "--main_process_port", "1234",
    ]  # fmt: skip
    # What a recipe switches off stays off
    assert launch_arguments(make_parser(), workdir(multi_gpu=False, num_machines=1)) == [
        "--num_machines", "1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["recipe.yaml"], "'recipe.yaml' belongs to no option. Options are written `--name value`, and"),
        (["--config", "recipe.yaml", "--eta", "3", "4"], "'4' belongs to no option."),
        (["--config", "recipe.yaml", "--config", "recipe.yaml"], "--config is given more than once"),
        (["--config=nowhere.yaml"], "recipe 'nowhere.yaml' (--config) is not a file"),
    ],
)
@pytest.mark.parametrize("run", [train.main, lambda argv: cli.main(["train", *argv])], ids=["process", "launcher"])
def test_arguments_that_belong_nowhere(workdir, capsys, argv, expected, run):
    workdir()
    assert expected in message(capsys, argv, run)


def test_negated_options_work_on_the_command_line_and_are_refused_in_a_recipe(workdir, capsys):
    assert parse_arguments([*workdir(), "--no_disable_dropout"])[1].disable_dropout is False
    assert "there is no option 'no_disable_dropout'" in message(capsys, workdir(no_disable_dropout=True))


def test_the_environment_of_a_recipe_reaches_the_processes(workdir, tmp_path):
    (tmp_path / "rewards_of_test.py").write_text(
        "import os\nhome = os.environ['HF_HOME']\nfrom helpers import count_abc\n"
        "def seen_at_import(completions, **kwargs):\n"
        "    assert home == 'elsewhere'\n"
        "    from huggingface_hub.constants import HF_HOME\n"
        "    assert HF_HOME == 'elsewhere', HF_HOME\n"
        "    return count_abc(completions)\n"
    )
    argv = workdir(env={"HF_HOME": "elsewhere"}, reward_funcs="rewards_of_test.seen_at_import")
    environment = {**os.environ, "PYTHONPATH": f"{os.path.dirname(__file__)}{os.pathsep}{tmp_path}"}
    subprocess.run([sys.executable, "-m", "trl_sppo", "train", *argv], check=True, env=environment)


def test_the_quickstart_looks_at_its_options_before_it_prepares_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = lambda argv: cli.main(["quickstart", *argv])  # noqa: E731
    assert "Did you mean learning_rate?" in message(capsys, ["--learning_rte", "1"], run)
    assert "eta must be positive" in message(capsys, ["--eta", "-1"], run)
    assert "the quickstart shows its evaluations, which save_rollouts=False" in message(
        capsys, ["--save_rollouts", "false"], run
    )
    with pytest.raises(SystemExit) as exit:
        run(["--help"])
    assert exit.value.code == 0 and "--win_rate_threshold" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_names_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr("trl_sppo.quickstart.find_spec", lambda name: None if name == "gguf" else object())
    assert cli.main(["quickstart"]) == 2
    assert "the quickstart needs gguf. Install the extra with `pip install" in capsys.readouterr().err


def test_recipe_files(tmp_path, capsys):
    assert "recipe 'nowhere.yaml' (--config) is not a file" in message(capsys, ["--config", "nowhere.yaml"])
    assert "recipe '' (--config) is not a file" in message(capsys, ["--config"])
    for text, expected in [
        ("- a\n- b", "must be a YAML mapping"),
        ("", "must be a YAML mapping"),
        ("a: [", "not valid"),
    ]:
        (tmp_path / "r.yaml").write_text(text)
        assert expected in message(capsys, ["--config", str(tmp_path / "r.yaml")])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_name_or_path": None}, "no model: give model_name_or_path"),
        ({"model_name_or_path": "./nowhere"}, "model './nowhere' is neither a folder with a config.json nor"),
        ({"dataset_name": None}, "give either dataset_name (a folder, a file, or an id on the hub) or datasets"),
        ({"dataset_name": "./nowhere"}, "dataset_name='./nowhere' cannot be loaded: "),
        ({"dataset_train_split": "trian"}, "the dataset has no split 'trian', but ['test', 'train']"),
        ({"reward_funcs": None}, "no reward source and no preference oracle given. Pass `reward_funcs`"),
        ({"reward_funcs": "nowhere.f"}, "'nowhere.f' (--reward_funcs) could not be imported"),
        ({"reward_funcs": "accuracy_rewad"}, "'trl.rewards.accuracy_rewad' (--reward_funcs) could not be"),
        ({"reward_model_name_or_path": "./nowhere"}, "reward model './nowhere' is neither a folder"),
        ({"reward_model_name_or_path": "policy"}, "reward model 'policy' has no scoring head"),
        ({"eta": 0}, "eta must be positive and at most 1e9, got 0"),
        ({"eta": "much"}, "argument --eta: invalid float value: 'much'"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"per_device_train_batch_size": 6}, "must be divisible by num_generations (4)"),
        ({"per_device_train_batch_size": 32}, "train_dataset has 4 prompts, fewer than the 8 of one generation batch"),
        ({"beta": -0.1}, "beta must be not negative, got -0.1"),
        ({"preference_funcs": "nowhere.f"}, "'nowhere.f' (--preference_funcs) could not be imported"),
        ({"preference_funcs": "judge"}, "'judge' (--preference_funcs) could not be imported"),
        (
            {"preference_funcs": "helpers.TINY"},
            "'helpers.TINY' (--preference_funcs) is not a function",
        ),
        ({"reward_weights": 1.0}, "recipe recipe.yaml: reward_weights: Input should be a valid list, got 1.0."),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights must have one entry per reward source (1), got 2"),
        ({"reward_funcs": "helpers.TINY"}, "'helpers.TINY' (--reward_funcs) is not a function"),
    ],
)
def test_bad_input(workdir, capsys, changes, expected):
    assert expected in message(capsys, workdir(**changes))


@pytest.mark.parametrize("name", ["./my_rewards.py", "my_rewards.py", "my_rewards:brevity", "org/model", "http://x:1"])
@pytest.mark.parametrize("option", ["reward_funcs", "eval_preference_funcs"])
def test_files_and_models_given_as_functions(option, name):
    load = load_reward_funcs if "reward" in option else load_preference_funcs
    with pytest.raises(ValueError, match=rf"^'{name}' \(--{option}\) must be a dotted import path"):
        load([name], option)


def test_files_given_as_functions_are_found_by_both_commands(workdir, capsys):
    argv = workdir(reward_funcs="./my_rewards.py")
    for run in (train.main, lambda argv: cli.main(["check", *argv])):
        assert "'./my_rewards.py'" in (said := message(capsys, argv, run)) and "must be a dotted import path" in said


def test_dotted_paths_with_py_in_a_name():
    check_dotted("my.python_rewards.f", "x")
    check_dotted("py.path", "x")


ACCELERATE_CONFIGURATIONS = [
    ("distributed_type: [", "while parsing"),
    ("", "cannot be read ("),
    ("- a", "cannot be read ("),
    ("eta: 3\ndistributed_type: 'NO'", "had unknown keys (['eta'])"),
    ("num_processes: 2", "A `distributed_type` must be specified"),
    ("distributed_type: MANY_GPU", "'MANY_GPU' is not a valid DistributedType"),
    ("distributed_type: MULTI_GPU\nnum_processes: two", "num_processes must be a whole number, got 'two'"),
]


@pytest.mark.parametrize(("text", "expected"), ACCELERATE_CONFIGURATIONS)
@pytest.mark.parametrize("name", ["broken.yaml", "broken.json"])
def test_a_broken_configuration_of_accelerate(workdir, tmp_path, monkeypatch, capsys, name, text, expected):
    if name.endswith(".json"):
        with suppress(yaml.YAMLError):
            text = json.dumps(yaml.safe_load(text))
        expected = expected.replace("while parsing", "Expecting value")
    (tmp_path / name).write_text(text)
    for run in (train.main, lambda argv: cli.main(["train", *argv]), lambda argv: cli.main(["check", *argv])):
        for argv in ([*workdir(), "--config_file", name], workdir(accelerate_config=name)):
            said = message(capsys, argv, run)
            assert f"the configuration of accelerate {name} " in said and expected in said
    from accelerate.commands import launch
    from accelerate.commands.config import config_args

    for module in (config_args, launch):
        monkeypatch.setattr(module, "default_config_file", name)
    said = message(capsys, workdir(), lambda argv: cli.main(["train", *argv]))  # the launcher alone reads it
    assert f"{name} cannot be read" in said and "Correct or delete the file" in said


def test_a_configuration_of_accelerate_that_is_not_there(workdir, capsys):
    said = message(capsys, [*workdir(), "--config_file", "nowhere.yaml"])
    assert "the configuration of accelerate nowhere.yaml cannot be read" in said
    said = message(capsys, workdir(accelerate_config="nowhere.yaml"))
    assert "accelerate_config: Accelerate config nowhere.yaml is neither a file nor a valid config" in said


def test_what_the_launcher_refuses_is_a_message(workdir, capsys):
    argv = [*workdir(), "--use_deepspeed", "--use_fsdp"]
    assert "accelerate launch: You can only use one of" in message(
        capsys, argv, lambda argv: cli.main(["train", *argv])
    )


def test_named_reward_functions():
    from trl.rewards import accuracy_reward

    assert load_reward_funcs(["accuracy_reward", "helpers.count_abc"]) == [accuracy_reward, count_abc]
    (overlong,) = load_reward_funcs(["get_soft_overlong_punishment"])  # a factory in TRL
    assert overlong(completion_ids=[[1] * 10, [1] * 2000]) == [0.0, -1.0]


def test_two_reward_models(workdir, tmp_path):
    for name in ("one", "two"):
        encoder().save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    argv = workdir(reward_funcs=None, reward_model_name_or_path=["one", "two"], reward_weights=[1.0, 2.0])
    trainer = train.main(argv)
    assert trainer.reward_func_names == ["one", "two"]


def test_qlora(workdir, tmp_path):
    """4-bit loading by bitsandbytes, on the CPU: the adapter is trained and saved."""
    trainer = train.main([*workdir(), "--use_peft", "--load_in_4bit", "--learning_rate", "1e-2"])
    assert trainer.model.is_loaded_in_4bit
    trained = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert trained and any(p.abs().max() > 0 for p in trained)  # LoRA's B starts at zero
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_pairwise_oracles_from_a_recipe(workdir):
    options = {"preference_funcs": "helpers.more_abc", "both_orders": False, "logging_steps": 1}
    trainer = train.main(workdir(reward_funcs=None, **options))
    log = trainer.state.log_history[0]
    assert trainer.voters.oracles == {"more_abc": more_abc}
    assert log["preferences/more_abc/lost"] == 0 and "preferences/more_abc/order_disagreement" not in log
