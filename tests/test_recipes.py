"""Every recipe on disk parses, into the options it names, and has its header."""

from pathlib import Path

import pytest
import yaml

from trl_sppo.train import launch_arguments, make_parser


RECIPES = Path(__file__).parents[1] / "recipes"
PATHS = sorted(RECIPES.rglob("*.yaml"))


def test_there_are_recipes():
    assert {"quickstart.yaml", "qwen2.5-7b-instruct/lora.yaml", "qwen2.5-0.5b-instruct/lora.yaml"} <= {
        str(path.relative_to(RECIPES)) for path in PATHS
    }


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe(path, monkeypatch):
    parser = make_parser()
    assert launch_arguments(parser, ["--config", str(path)]) == []  # unknown options are an error
    # a GPU's bf16 cannot be asked for here: everything else is checked as it stands
    script, sppo, model, _ = parser.parse_args_and_config(["--config", str(path), "--use_cpu", "--bf16", "false"])
    recipe = yaml.safe_load(path.read_text())
    for name, value in recipe.items():
        if name in ("bf16", "use_cpu", "report_to"):
            continue
        owner = next(config for config in (script, sppo, model) if hasattr(config, name))
        actual = getattr(owner, name)
        expected = [value] if name == "reward_model_name_or_path" else value
        assert getattr(actual, "value", actual) == expected, name
    header = path.read_text().split("\n\n")[0]
    for part in ("# Goal:", "# Launch:", "# Override:", "# Hardware:", "# Expect:"):
        assert part in header, f"the header of {path} lacks {part}"


def test_the_seven_billion_recipe_is_the_configuration_that_was_asked_for():
    recipe = yaml.safe_load((RECIPES / "qwen2.5-7b-instruct/lora.yaml").read_text())
    asked = {
        "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "num_generations": 8, "eta": 10.0, "win_rate_threshold": 0.6,
        "learning_rate": 5e-7, "use_vllm": True, "temperature": 0.8, "max_completion_length": 1024,
    }  # fmt: skip
    assert asked.items() <= recipe.items()
