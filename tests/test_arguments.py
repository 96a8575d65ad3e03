"""Recipes as files: their syntax, the types of their values, and the output folder."""

import os
from pathlib import Path

import pytest
from helpers import message

from trl_sppo import SPPOConfig, train
from trl_sppo.arguments.recipes import check_output_dir, read_recipe, unmade


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("eta: 1\nbeta: 0\neta: 2", "eta is given more than once. Keep one"),
        ("generation_kwargs: {a: 1, a: 2}", "a is given more than once"),
        ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("a: 2026-13-01", "month must be in 1..12"),
        ("a: \xff", "'utf-8' codec can't decode"),
    ],
)
def test_what_yaml_would_let_through(tmp_path, text, expected):
    (tmp_path / "r.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"recipe .*r.yaml (?s:.*){expected}"):
        read_recipe(str(tmp_path / "r.yaml"))


def test_a_syntax_error_does_not_show_the_line(tmp_path):
    (tmp_path / "r.yaml").write_text("env: {OPENAI_API_KEY: sk-secret]}")
    with pytest.raises(ValueError, match=r"expected ',' or '}', but got ']' \(line 1, column 32\)") as error:
        read_recipe(str(tmp_path / "r.yaml"))
    assert "secret" not in str(error.value)


def test_anchors(tmp_path):
    (tmp_path / "r.yaml").write_text("per_device_train_batch_size: &n 8\nnum_generations: *n")
    assert read_recipe(str(tmp_path / "r.yaml")) == {"per_device_train_batch_size": 8, "num_generations": 8}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rate": [1, 2]}, "recipe recipe.yaml: learning_rate: Input should be a valid number, got [1, 2]."),
        ({"num_generations": "eight"}, "recipe recipe.yaml: argument --num_generations/--num-generations: invalid"),
        ({"max_steps": 2.5}, "max_steps: Input should be a valid integer, got 2.5."),
        ({"max_steps": True}, "max_steps: Input should be a valid integer, got True."),
        ({"learning_rate": True}, "learning_rate: Input should be a valid number, got True."),
        ({"use_peft": 2}, "use_peft: Input should be a valid boolean, got 2."),
        ({"use_peft": "yes"}, "use_peft: Input should be a valid boolean, got 'yes'."),
        (
            {"run_name": 7},
            "run_name: Input should be a valid string, got 7. Put it in quotes if it is meant as text",
        ),
        ({"report_to": 7}, "report_to: Input should be a valid string or a valid list, got 7."),
        ({"model_init_kwargs": {"a": 1, "b": [2]}}, "model_init_kwargs: Qwen2ForCausalLM"),
        ({"save_strategy": False}, "Put it in quotes if it is meant as text: YAML reads a bare no"),
        ({"optim": "adam"}, "argument --optim: invalid choice: 'adam'"),
        ({"reward_funcs": [1]}, "reward_funcs.0: Input should be a valid string, got 1."),
        ({"generation_kwargs": "x"}, "generation_kwargs must be a mapping, or JSON such as"),
        ({"dataset_name": None, "datasets": [{"pth": "prompts"}]}, "datasets.0.path: Field required"),
        (
            {"dataset_name": None, "datasets": [{"path": "prompts", "pth": "x"}]},
            "datasets.0.pth: Extra inputs are not permitted, got 'x'.",
        ),
        ({"dataset_name": None, "datasets": [{"path": 7}]}, "datasets.0.path: Input should be a valid string, got 7."),
        (
            {"env": {"A": [1]}},
            "should be a valid string or a valid boolean or a valid integer or a valid number",
        ),
        ({"env": {"A=B": "1"}}, "String should match pattern '^[^=\\x00]+$', got 'A=B'."),
        ({"num_processes": [2]}, "argument --num_processes/--num-processes: invalid int value: '[2]'"),
        ({"resume_from_checkpoint": "policy"}, "resume_from_checkpoint must be a checkpoint's folder"),
        ({"optim_args": "fast"}, "with optim_args='fast' does not work here"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "with lr_scheduler_kwargs={'a': 1} does not work"),
        ({"model_init_kwargs": {"a": 1}}, "model_init_kwargs: Qwen2ForCausalLM"),
        ({"generation_kwargs": {"temperature": 0.5}}, "set temperature as an option of its own"),
        ({"output_dir": "prompts/train.jsonl/out"}, "output_dir must be a folder that can be created and written to"),
        (
            {"use_peft": True, "lora_target_modules": ["nowhere"]},
            "Target modules nowhere not found in the base model",
        ),
        ({"load_in_4bit": True}, "load_in_4bit=True needs use_peft=True"),
        ({"learning_rate": float("nan")}, "learning_rate must be between -2^31 and 2^31, got nan."),
        (
            {"lr_scheduler_kwargs": {"min_lr": "1e-6"}},
            "lr_scheduler_kwargs: min_lr must be a number, got the text '1e",
        ),
        ({"reward_weights": ["1e-1"]}, "reward_weights[0] must be a number, got the text '1e-1'"),
        (
            {"report_to": "wandb"},
            "report_to=['wandb']: WandbCallback requires wandb to be installed",
        ),
    ],
)
def test_bad_values(workdir, tmp_path, capsys, changes, expected):
    assert expected in message(capsys, workdir(**changes))
    assert not (tmp_path / "out").exists()


def test_whole_numbers_will_do_where_numbers_are_wanted(workdir):
    """transformers refuses a temperature that is no float, in the middle of generation."""
    assert train.main(workdir(temperature=2)).state.global_step == 1
    assert isinstance(SPPOConfig("out", bf16=False, temperature=2).temperature, float)


def test_output_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for path in ("new", "new/below", "~", str(tmp_path)):
        check_output_dir(path)
    for path in ("", "a\0b", "file", "x" * 300, "file/below"):
        with pytest.raises(ValueError, match="output_dir must be a folder that can be created and written to, got"):
            check_output_dir(path)
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write everywhere
    with pytest.raises(ValueError, match="output_dir must be a folder"):
        check_output_dir("new")
    assert os.listdir() == ["file"]


def test_a_failure_leaves_no_empty_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), unmade(str(tmp_path / "a/b")):
        (tmp_path / "a/b").mkdir(parents=True)
        raise KeyboardInterrupt
    assert not (tmp_path / "a").exists()
    with pytest.raises(KeyboardInterrupt), unmade(str(tmp_path / "a/b")):
        (tmp_path / "a/b").mkdir(parents=True)
        (tmp_path / "a/kept").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "a") == ["kept"]
