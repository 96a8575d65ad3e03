"""What judges cost in a training: fewer comparisons, verdicts that are not paid for twice, and a budget."""

import json

import pytest
import torch
from datasets import Dataset
from helpers import assert_same, more_abc, verdict, weights

from trl_sppo.judges import LLMJudge, LLMRanker
from trl_sppo.oracles.asking import run_coroutines


def no_reward(start, folder, oracle, **options):
    return start(folder, reward_funcs=None, trainer_kwargs={"preference_func": oracle}, **options)


def test_a_killed_run_asks_only_for_what_it_has_not_been_told(start, tmp_path):
    """The process ends in the second call of the first rollout. Weights and log are those of a run in one piece."""
    whole = no_reward(start, "whole", more_abc, preference_batch_size=12)
    whole.train()
    asked, calls = [], []

    def dying(prompts, first, second, **kwargs):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return more_abc(prompts, first, second)

    dying.__name__ = "more_abc"
    with pytest.raises(KeyboardInterrupt):
        no_reward(start, "run", dying, preference_batch_size=12).train()

    def lasting(prompts, first, second, **kwargs):
        asked.append(len(prompts))
        return more_abc(prompts, first, second)

    lasting.__name__ = "more_abc"
    resumed = no_reward(start, "run", lasting, preference_batch_size=12)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)
    counted = []

    def counting(prompts, first, second, **kwargs):
        counted.append(len(prompts))
        return more_abc(prompts, first, second)

    counting.__name__ = "more_abc"
    no_reward(start, "again", counting, preference_batch_size=12).train()
    assert sum(asked) == sum(counted) - calls[0]


def test_responses_of_a_call_that_did_not_end_are_not_paid_for_twice(start, judge, endpoint, monkeypatch):
    """The process ends inside a call, as all of its responses but one have come."""
    whole = no_reward(start, "whole", judge)
    whole.train()
    answer, first = endpoint.answer, len(endpoint.requests)
    endpoint.answer = lambda number, request: (500, {}) if number == first else answer(number, request)
    dying = LLMJudge("judge", endpoint.url, max_concurrency=1, max_retries=0)

    def run_and_die(coroutines, *args):
        run_coroutines(coroutines, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_sppo.oracles.asking.run_coroutines", run_and_die)
    with pytest.raises(KeyboardInterrupt):
        no_reward(start, "run", dying).train()
    monkeypatch.undo()
    lasting = LLMJudge("judge", endpoint.url)
    resumed = no_reward(start, "run", lasting)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert dying.usage["requests"] > 20
    assert dying.usage["requests"] + lasting.usage["requests"] == judge.usage["requests"]
    # Another form of the question is asked anew
    assert dying.form == lasting.form != LLMJudge("judge", endpoint.url, reasoning=True).form


def test_fewer_comparisons_in_a_training(make_trainer, tmp_path):
    asked = []

    def oracle(prompts, first, second, **kwargs):
        asked.extend(zip(prompts, first, second, strict=True))
        return more_abc(prompts, first, second)

    trainer = make_trainer(
        reward_funcs=None, comparisons_per_group=4, trainer_kwargs={"preference_func": oracle}, max_steps=1
    )
    trainer.train()
    assert 0 < len(asked) <= 8  # of two groups of four, without copies
    log = trainer.state.log_history[0]
    assert log["preferences/oracle/lost"] == 0 and log["win_rate/unscorable"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"comparisons_per_group": 3}, "per_group must be at least 4, got 3.*num_generations=4.*both orders"),
        ({"comparisons_per_group": 1, "both_orders": False}, "must be at least 2, got 1.*compared once"),
        ({"comparisons_per_group": 0}, "comparisons_per_group must be at least 1, got 0"),
        (
            {"comparisons_per_group": 8, "loss_type": "sppo_single", "train_on": "best_and_worst"},
            "comparisons_per_group=8 may leave out the best against the worst",
        ),
        ({"comparisons_per_group": 4, "num_generations_eval": 8}, "must be at least 8, got 4.*num_generations_eval=8"),
        (
            {"comparisons_per_group": 8, "baseline": "log_mean_exp"},
            "baseline='log_mean_exp' is too high for win rates of few comparisons",
        ),
        ({"judge_token_budget": 0}, "judge_token_budget must be at least 1, got 0"),
        ({"judge_token_budget": 9}, "judge_token_budget=9 is for pairwise oracles, and there are none"),
        ({"comparisons_per_group": 9}, "comparisons_per_group=9 is for pairwise oracles, and there are none"),
    ],
)
def test_options_that_cannot_be(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


@pytest.fixture
def judge(endpoint):
    """A judge that prefers longer completions, and whose responses take 10 tokens each."""

    def answer(number, request):
        data = json.loads(request["messages"][0]["content"].split("\n\n")[1])
        better = 0.9 if len(data["answer_A"]) > len(data["answer_B"]) else 0.1
        return 200, {**verdict(A=better, B=1 - better), "usage": {"prompt_tokens": 9, "completion_tokens": 1}}

    endpoint.answer = answer
    return LLMJudge("judge", endpoint.url, price=(1e6, 2e6))


def test_tokens_are_logged_for_each_rollout_and_in_all(make_trainer, judge):
    trainer = make_trainer(
        reward_funcs=None, max_steps=2, steps_per_generation=1, trainer_kwargs={"preference_func": judge}
    )
    trainer.train()
    first, second = trainer.state.log_history[:2]
    for name, factor in (("requests", 1), ("input_tokens", 9), ("output_tokens", 1), ("cost", 11)):
        assert first[f"preferences/judge/{name}"] == first["preferences/judge/requests"] * factor > 0
        total = first[f"preferences/judge/{name}"] + second[f"preferences/judge/{name}"]
        assert second[f"preferences/judge/{name}_total"] == total == judge.usage[name]


def test_a_budget_ends_the_run_and_a_larger_one_continues_it(start, judge, capsys, tmp_path):
    whole = no_reward(start, "whole", judge)
    whole.train()
    trainer = no_reward(start, "run", judge, judge_token_budget=1)
    with pytest.raises(SystemExit) as error:
        trainer.train()
    assert error.value.code == 3
    assert "judge_token_budget=1 is used up. Raise it first." in capsys.readouterr().out
    # All steps on what was judged are taken
    assert trainer.state.global_step == 2
    # The same budget: nothing is asked, and the message says what to do
    before = dict(judge.usage)
    stuck = no_reward(start, "run", judge, judge_token_budget=1)
    with pytest.raises(RuntimeError, match=r"judge_token_budget=1 is used up: the judges have read and written \d+"):
        stuck.train(resume_from_checkpoint=True)
    assert judge.usage == before
    resumed = no_reward(start, "run", judge, judge_token_budget=10**6)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)
    assert not (tmp_path / "run" / "rollouts-1").exists()  # what was sampled and judged counts


def test_a_run_that_is_complete_has_kept_its_budget(make_trainer, judge):
    trainer = make_trainer(
        reward_funcs=None, judge_token_budget=1, max_steps=1, trainer_kwargs={"preference_func": judge}
    )
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.is_over_budget


def test_evaluations_do_not_count(make_trainer, judge):
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    data = {"eval_dataset": Dataset.from_dict({"prompt": ["ab", "cd"]})}
    trainer = make_trainer(
        reward_funcs=None, max_steps=1, **options, trainer_kwargs={"preference_func": judge, **data}
    )
    trainer.train()
    log = next(row for row in trainer.state.log_history if "loss" in row)
    requests = log["preferences/judge/requests"]
    assert log["preferences/judge/requests_total"] == requests < judge.usage["requests"]
    assert trainer.voters.tokens_used == 10 * requests


@pytest.mark.parametrize("usage", [None, {}, {"requests": 1}, "much"])
def test_a_budget_needs_a_judge_that_counts(make_trainer, usage):
    def oracle(prompts, first, second, **kwargs):
        return more_abc(prompts, first, second)

    oracle.usage = usage
    trainer = make_trainer(reward_funcs=None, judge_token_budget=99, trainer_kwargs={"preference_func": oracle})
    with pytest.raises(RuntimeError, match="judge_token_budget=99 cannot be kept: no judge reports tokens"):
        trainer.train()


def test_a_rubric_in_a_column_that_is_not_there(make_trainer, endpoint):
    judge = LLMJudge("judge", endpoint.url, rubric="criteria")
    with pytest.raises(ValueError, match=r"train_dataset has no column 'criteria', which judge reads.*\['prompt'\]"):
        make_trainer(reward_funcs=None, trainer_kwargs={"preference_func": judge})
    assert not endpoint.requests


def test_a_judge_that_orders_groups_gets_whole_groups(make_trainer, endpoint):
    """Fewer comparisons would be more requests."""
    endpoint.answer = lambda number, request: (200, ranking_of(request))
    trainer = make_trainer(
        reward_funcs=None, comparisons_per_group=4, max_steps=1,
        trainer_kwargs={"preference_func": LLMRanker("judge", endpoint.url)},
    )  # fmt: skip
    trainer.train()
    assert len(endpoint.requests) == 4  # two groups in two orders


def ranking_of(request):
    texts = json.loads(request["messages"][0]["content"].split("\n\n")[1])
    keys = sorted(texts.keys() - {"prompt"}, key=lambda key: len(texts[key]))
    message = {"role": "assistant", "content": f"Ranking: {' > '.join(keys)}"}
    choices = [{"index": 0, "message": message}]
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
