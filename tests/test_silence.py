"""Sources that score nothing for a while: of another task, or broken."""

import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import TINY, count_abc, make_tokenizer, more_abc
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from trl_sppo.errors import RunError
from trl_sppo.oracles.scoring import RewardSources
from trl_sppo.oracles.voters import Voters


def stops_after(scored, per_rollout=2, length=1000, shuffle=True, may_pass=True, alone=True) -> int | None:
    """After how many prompts a run stops; `scored` says of each whether the source has scored it."""
    dataset = iter([]) if length is None else range(length)
    args = SimpleNamespace(shuffle_dataset=shuffle, preference_weights=None)
    voters = Voters(args, RewardSources([], [], []), [], {}, None, dataset)
    for start in range(0, len(scored), per_rollout):
        rollout = torch.tensor(scored[start : start + per_rollout])
        if voters.silent_prompts("it", rollout, may_pass, alone):
            return start + len(rollout)
    return None


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 0.97, 1.0])
@pytest.mark.parametrize("per_rollout", [1, 2, 16])
def test_prompts_of_other_tasks_in_any_order(share, per_rollout):
    for seed in range(5):
        draw = random.Random(seed)
        assert stops_after([draw.random() < share for _ in range(2000)], per_rollout) is None


@pytest.mark.parametrize(
    ("scored", "options", "expected"),
    [
        ([False] * 300, {}, 100),
        ([False] * 300, {"length": 40}, 40),  # a whole epoch
        ([False] * 300, {"length": 2}, 2),
        ([False] * 300, {"may_pass": False}, 2),  # at once
        ([False] * 300, {"alone": False, "length": 250}, 250),  # others vote meanwhile
        ([False] * 2000, {"length": None}, 1000),  # a stream
        ([True] * 2 + [False] * 2000, {"length": None}, 1002),
        ([True] * 100 + [False] * 300, {}, 106),  # not before three rollouts
        ([True] * 100 + [False] * 300, {"may_pass": False}, 106),
        ([True] * 100 + [False, False] * 2 + [True] * 2, {"may_pass": False}, None),
        ([True, False] * 50 + [False] * 300, {}, 122),  # log(1e-6) / log(1/2) = 20 in a row: chance
        ([True] + [False] * 9 + [True] + [False] * 300, {"per_rollout": 1}, 11 + 76),  # log(1e-6) / log(10 / 12)
        ([False] * 150 + [True] * 50, {"shuffle": False, "length": 200}, None),  # sorted by task
        ([True] * 50 + [False] * 150 + [True], {"shuffle": False, "length": 200}, None),
        ([True] * 50 + [False] * 300, {"shuffle": False, "length": 200}, 250),
    ],
)
def test_when_a_run_stops(scored, options, expected):
    assert stops_after(scored, **options) == expected


def mixed(num_prompts: int, every: int) -> Dataset:
    return Dataset.from_dict({
        "prompt": ["abcdefghij"[i % 10] + "klmno"[i // 10 % 5] for i in range(num_prompts)],
        "task": ["counting" if i % every == every - 1 else "other" for i in range(num_prompts)],
    })  # fmt: skip


def counting_only(completions, task, **kwargs):
    return [score if t == "counting" else None for score, t in zip(count_abc(completions), task, strict=True)]


def comparing_only(prompts, first, second, task, **kwargs):
    answers = more_abc(prompts, first, second)
    return [answer if t == "counting" else None for answer, t in zip(answers, task, strict=True)]


SOURCES = [
    {"reward_funcs": counting_only},
    {"reward_funcs": None, "trainer_kwargs": {"preference_func": comparing_only}},
]


@pytest.mark.parametrize("sources", SOURCES, ids=["scores", "compares"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_task_that_comes_late_is_waited_for(make_trainer, sources, shuffle):
    """The first rollouts hold no prompt of the source: only the 10th prompt is one."""
    kwargs = {**sources.get("trainer_kwargs", {}), "train_dataset": mixed(20, every=10)}
    options = {"per_device_train_batch_size": 4, "max_steps": 20, "shuffle_dataset": shuffle, "seed": 1}
    trainer = make_trainer(**{**sources, "trainer_kwargs": kwargs}, **options)
    trainer.train()
    unscorable = [row["win_rate/unscorable"] for row in trainer.state.log_history if "loss" in row]
    assert unscorable[0] == 1 and sorted(unscorable) == [0.0] * 2 + [1.0] * 18


def test_a_reward_model_without_a_vote_does_not_end_the_run_of_a_function(make_trainer, tiny_policy, tmp_path):
    Qwen2ForSequenceClassification(Qwen2Config(**TINY, num_labels=1)).save_pretrained(tmp_path / "rm")
    make_tokenizer().save_pretrained(tmp_path / "rm")
    trainer = make_trainer(
        reward_funcs=[str(tmp_path / "rm"), counting_only], reward_weights=[0.0, 1.0], per_device_train_batch_size=4,
        max_steps=3, shuffle_dataset=False, trainer_kwargs={"train_dataset": mixed(20, every=10)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("sources", SOURCES, ids=["scores", "compares"])
def test_a_source_that_never_scores_stops_the_run_within_an_epoch(make_trainer, sources):
    kwargs = {**sources.get("trainer_kwargs", {}), "train_dataset": mixed(6, every=10)}
    trainer = make_trainer(
        **{**sources, "trainer_kwargs": kwargs}, per_device_train_batch_size=4, max_steps=20, num_train_epochs=5
    )
    with pytest.raises(RunError, match="of the last 6 prompts"):
        trainer.train()
    assert trainer.state.global_step == 5
