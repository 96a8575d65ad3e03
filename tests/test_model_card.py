"""The card beside a checkpoint: how it was trained, win rates with intervals, versions, citations."""

import re

from datasets import Dataset
from helpers import count_abc, more_abc
from peft import LoraConfig

from trl_sppo import __version__


def length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def test_the_card_of_a_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(
        reward_funcs=[count_abc, length],
        reward_weights=[1.0, 0.0],
        win_rate_threshold=0.6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        trainer_kwargs={
            "eval_dataset": Dataset.from_dict({"prompt": ["ab", "cde", "xyz", "k"]}),
            "eval_preference_func": more_abc,
            "peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        },
    )
    trainer.train()
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "| win rates from | count_abc |",
        "| eta (1 / beta of DPO) | 10 |",
        "| trained on | win rates from 0.6, and up to 0.4 |",
        "| completions per iteration | 8 |",
        "| optimizer steps | 2 |",
        "| adapter | LORA, r = 2 |",
        f"- TRL-SPPO: {__version__}",
    ):
        assert line in card, line
    # The evaluation of the last step comes before its checkpoint; it is that of the log
    last = [row for row in trainer.state.log_history if "eval_loss" in row][-1]
    for judge, trained_on in {"count_abc": "yes", "length": "no", "more_abc": "no"}.items():
        name = f"eval_win_rate_vs_initial/{judge}"
        rate = f"{last[name]:.3f} [{last[name + '/low']:.3f}, {last[name + '/high']:.3f}]"
        row = rf"^\| {judge} \| {trained_on} \| {re.escape(rate)} \| .* \| 2 \|$"
        assert re.search(row, card, re.MULTILINE), judge
    assert card.count("```bibtex") == 2 and "Self-Play Preference Optimization" in card and "vonwerra2020trl" in card
    assert "None" not in card
    assert str(tmp_path) not in card


def test_without_evaluations_the_card_says_so(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "# Model Card for mine" in card and "Not measured in this training." in card and "| adapter | none |" in card
    )
    assert "| trained on | all |" in card


def test_several_evaluation_sets(make_trainer, tmp_path):
    prompts = Dataset.from_dict({"prompt": ["ab", "cde"]})
    trainer = make_trainer(
        max_steps=1, eval_strategy="steps", eval_steps=1, num_generations_eval=2,
        trainer_kwargs={"eval_dataset": {"easy": prompts, "very_hard": prompts}},
    )  # fmt: skip
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| count_abc (easy) | yes |" in card and "| count_abc (very_hard) | yes |" in card
