"""The quickstart's assets. The whole of it is run by .ci/run."""

import json
from importlib.resources import files

import pytest

from trl_sppo.evaluation.statistics import WinRate
from trl_sppo.oracles.reward_models import MicroBatchedRewardModel, load_reward_models
from trl_sppo.quickstart import assets
from trl_sppo.quickstart.on_topic import on_topic
from trl_sppo.quickstart.run import _draw, _show
from trl_sppo.quickstart.vader import vader


FOLDER = files("trl_sppo.quickstart")
PRAISE = "A masterful, moving film with wonderful performances."
BLAME = "A dull, badly acted mess that wastes two hours of your life."


def test_the_adapter_is_small_and_good_enough():
    assert sum(path.stat().st_size for path in (FOLDER / "reward_model").iterdir()) < 2 * 1024**2
    metrics = json.loads((FOLDER / "reward_model" / "metrics.json").read_text())
    assert metrics["pair_accuracy"] >= 0.80 and metrics["num_held_out"] >= 2000


def test_held_out_prompts_are_held_out():
    train, test = (
        [json.loads(line)["prompt"][0]["content"] for line in (FOLDER / "prompts" / f"{split}.jsonl").open()]
        for split in ("train", "test")
    )
    stories = [{text.split(" film in which ")[1] for text in part} for part in (train, test)]
    assert (len(stories[0]), len(stories[1])) == (72, 64) and not stories[0] & stories[1]


def test_the_reward_model_is_usable_and_prefers_praise(tmp_path):
    assets._make_reward_model(tmp_path)
    (model,), (tokenizer,) = load_reward_models([str(tmp_path)], [None], conversational=True)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Write a review."}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for answer in (PRAISE, BLAME)
    ]
    assert texts[0] == f"[CLS] {PRAISE} [SEP]"
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    praise, blame = MicroBatchedRewardModel(model, 2)(**inputs).logits[:, 0].tolist()
    assert praise > 1 and blame < -1  # on the human scale from -4 to 4


def test_the_judge_is_another_mechanism():
    praise, blame = vader([[{"role": "assistant", "content": text}] for text in (PRAISE, BLAME)])
    assert praise > 0 > blame


def test_preparing_keeps_what_is_there_and_clears_what_is_half_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(assets, "_make_policy", lambda folder: made.append("policy"))
    monkeypatch.setattr(assets, "_make_reward_model", lambda folder: 1 / 0)
    (tmp_path / "prompts").mkdir()
    with pytest.raises(ZeroDivisionError):
        assets.prepare(tmp_path)
    assert made == ["policy"] and (tmp_path / "policy").exists() and not (tmp_path / "reward_model").exists()
    monkeypatch.setattr(assets, "_make_reward_model", lambda folder: made.append("reward_model"))
    assets.prepare(tmp_path)
    assert made == ["policy", "reward_model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "prompts", "reward_model"]


def test_on_topic_counts_the_words_of_the_plot():
    prompt = [{"role": "user", "content": "Write one sentence about a film in which a Pilot lands in a field."}]
    answers = ["The pilot lands, and the pilot waits.", "A film about a sentence.", "Field! Lands, pilot.", ""]
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert on_topic([prompt] * 4, completions) == [2.0, 0.0, 3.0, 0.0]


def test_every_prompt_has_a_plot():
    for split in ("train", "test"):
        lines = (FOLDER / "prompts" / f"{split}.jsonl").read_text().splitlines()
        assert lines and all(" in which " in line for line in lines)


def test_the_picture(tmp_path):
    history = [{"step": i, "reward": i / 2, "winner_log_ratio": 0.1, "loser_log_ratio": -0.1} for i in (1, 2)]
    _draw(tmp_path / "q.png", [*history, {"step": 2}], {"a (b)": WinRate(0.7, 0.6, 0.8, 64)})
    assert (tmp_path / "q.png").stat().st_size > 10_000


def test_the_tables(capsys):
    def group(completion, score):
        said = [{"role": "assistant", "content": completion}]
        return {"prompt": [{"role": "user", "content": "Write."}], "completions": [said],
                "scores": {"reward_model": [score]}}  # fmt: skip

    _show([group(" a dull film", -1)], [group("[/a] fine film", 2)], {"vader": WinRate(0.7, 0.6, 0.8, 64)})
    said = capsys.readouterr().out
    assert "prompt  initial              trained\n\nWrite.  a dull film (-1.00)  [/a] fine film (+2.00)\n" in said
    assert said.endswith("prompts\nVADER (not trained on)     0.700 [0.600, 0.800]       64\n")


def test_the_recipe_is_found():
    with assets.recipe("quickstart.yaml") as path:
        assert path.is_file()
