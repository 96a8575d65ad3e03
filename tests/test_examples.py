"""Each script in examples/ runs, on tiny models."""

import importlib.util
import json
from pathlib import Path

import pytest
from helpers import count_abc, encoder, make_tokenizer, more_abc


FOLDER = Path(__file__).parents[1] / "examples"
TRIED = {"custom_reward", "panel_of_reward_models", "llm_judge", "intransitive_preferences", "stored_rollouts"}
TRIED |= {"evaluate_checkpoint", "paper_prompts"}  # the last in tests/test_recipes.py


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(tmp_path):
    return {
        "output_dir": str(tmp_path / "out"), "max_steps": 2, "max_completion_length": 4, "logging_steps": 1,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
    }  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    rows = [json.dumps({"prompt": [{"role": "user", "content": text}]}) for text in ["ab", "cde", "xyz", "k"] * 8]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows[: 32 if split == "train" else 4]))
    return str(folder)


@pytest.fixture
def reward_model(tmp_path):
    encoder().save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def test_none_is_forgotten():
    assert {path.stem for path in FOLDER.glob("*.py")} == TRIED
    for path in FOLDER.glob("*.py"):
        assert f"python examples/{path.name}" in path.read_text().split('"""')[1]


def test_custom_reward(tiny_policy, options):
    module = example("custom_reward")
    answers = [[{"role": "assistant", "content": text}] for text in ("Salt.", "Moss and a leaf", "")]
    scores = module.uses_the_words(answers, words=[["salt", "wave"], ["moss", "leaf"], ["street"]])
    assert scores == pytest.approx([0.5 - 0.0005, 1 - 0.0015, 0])
    assert module.main(tiny_policy, **options).state.global_step == 2


def test_panel_of_reward_models(tiny_policy, reward_model, prompts, options):
    trainer = example("panel_of_reward_models").main(
        tiny_policy, voters=[reward_model, reward_model], watcher=reward_model, dataset=prompts, **options
    )
    assert trainer.describe()["without_vote"] == [trainer.voters.sources.names[2]]
    assert any("preferences/panel_disagreement" in row for row in trainer.state.log_history)


def test_llm_judge(tiny_policy, endpoint, prompts, options):
    trainer = example("llm_judge").main(tiny_policy, "judge", endpoint.url, prompts, **options)
    assert trainer.state.global_step == 2 and endpoint.requests
    assert any("preferences/judge/order_disagreement" in row for row in trainer.state.log_history)


def test_intransitive_preferences(tiny_policy, options):
    module = example("intransitive_preferences")
    answers = [[{"role": "assistant", "content": text}] for text in ("Rock!", "paper", "I say scissors", "no")]
    pairs = [(i, j) for i in range(4) for j in range(4)]
    found = module.rock_paper_scissors([], *([answers[pair[k]] for pair in pairs] for k in (0, 1)))
    # rock loses to paper and beats scissors; all beat silence
    assert [found[i * 4 : i * 4 + 4] for i in range(4)] == [
        [0.5, 0, 1, 1],
        [1, 0.5, 0, 1],
        [0, 1, 0.5, 1],
        [0, 0, 0, 0.5],
    ]
    assert module.main(tiny_policy, **options).state.global_step == 2


def test_stored_rollouts(tiny_policy, reward_model, prompts, options, capsys):
    trainer = example("stored_rollouts").main(tiny_policy, reward_model, prompts, **options)
    assert trainer.state.global_step == 2 and trainer.args.rollouts.endswith("sampled/rollouts")
    assert "8 groups in " in capsys.readouterr().out


def test_evaluate_checkpoint(tiny_policy, reward_model, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trl_sppo.judges.pairrm.PairRMJudge", lambda name: more_abc)
    results = example("evaluate_checkpoint").main(
        model_name_or_path=tiny_policy, opponent_name_or_path=tiny_policy, reward_model_name_or_path=[reward_model],
        reward_funcs=["helpers.count_abc"], dataset_name=prompts, max_completion_length=4, use_vllm=False,
        output_dir=str(tmp_path / "evaluated"),
    )  # fmt: skip
    assert len(results) == 3 and count_abc.__name__ in results
    assert "at equal length" in capsys.readouterr().out
