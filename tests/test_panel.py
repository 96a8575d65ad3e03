"""Where preferences come from: several reward sources, pairwise oracles, both; and what is regressed."""

import math

import pytest
import torch
from helpers import COMPLETIONS, alphabet_score, completions_table, count_abc, more_abc

from trl_sppo.objectives import select_completions
from trl_sppo.preferences import mean_preferences, preferences_from_scores
from trl_sppo.preferences import win_rates as package_win_rates


def length(completion_ids, **kwargs) -> list[float]:
    """Tokens with EOS. The completions of each group of the table have 2, 3, 4 and 2."""
    return [float(len(ids)) for ids in completion_ids]


def rock_paper_scissors(prompts, first, second, **kwargs) -> list[float]:
    """Of texts of length 1, 2 and 3: 2 beats 1, 3 beats 2, 1 beats 3, each with probability 0.8."""
    return [{0: 0.5, 1: 0.8, 2: 0.2}[(len(a) - len(b)) % 3] for a, b in zip(first, second, strict=True)]


# Lengths 1, 2, 3, 1. Of 1: 0.2 against 2, 0.8 against 3, 0.5 against 1. Of 2: 0.8 + 0.2 + 0.8. Of 3: 0.2 + 0.8 + 0.2.
CIRCULAR_WIN_RATES = [0.5, 0.6, 0.4, 0.5]


def win_rates(trainer, column: str = "win_rate", sort: bool = False) -> torch.Tensor:
    """A column of the completions table by groups, in the order of the rollout or that of `COMPLETIONS`."""
    table = completions_table(trainer)
    if sort:
        table = table.sort_values("prompt", key=lambda p: p.map(list(COMPLETIONS).index), kind="stable")
    return torch.tensor(table[column].tolist()).view(-1, 4).float()


def test_an_intransitive_oracle_alone(fixed, tiny_policy, caplog):
    trainer = fixed(
        model=tiny_policy,
        reward_funcs=None,
        log_completions=True,
        trainer_kwargs={"preference_func": rock_paper_scissors},
    )
    trainer.train()
    torch.testing.assert_close(win_rates(trainer), torch.tensor([CIRCULAR_WIN_RATES] * 4))
    log = trainer.state.log_history[0]
    # The triads of the first, second and third, and of the second to fourth, are circles; in the others 1 meets 1
    assert log["preferences/intransitive"] == pytest.approx(2 / 4)
    assert log["preferences/tied"] == pytest.approx(1 / 6) and log["preferences/saturated"] == 0
    assert log["preferences/rock_paper_scissors/order_disagreement"] == pytest.approx(0, abs=1e-6)
    assert log["preferences/rock_paper_scissors/lost"] == 0
    # (0 + 1 + 1 + 0) / 4 with eta = 10 and one step from a log-ratio of 0
    assert log["loss"] == pytest.approx(0.5, rel=1e-5)
    assert "All reward functions returned None" not in caplog.text
    assert not {"reward", "reward_std", "frac_reward_zero_std"} & log.keys()
    evaluation = trainer.evaluate(trainer.train_dataset)
    assert evaluation["eval_win_rate/unscorable"] == 0 and "eval_reward" not in evaluation


@pytest.mark.shows("reward_weights")
def test_oracles_and_reward_sources_vote_by_their_weights(fixed, tiny_model):
    def always_even(prompts, first, second, **kwargs):
        return [0.5] * len(first)

    trainer = fixed(
        model=tiny_model,
        reward_funcs=length,
        reward_weights=[2.0],
        preference_weights=[1.0, 1.0],
        log_completions=True,
        trainer_kwargs={"preference_func": [rock_paper_scissors, always_even]},
    )
    trainer.train()
    by_length = torch.tensor([1 / 6, 2 / 3, 1, 1 / 6])  # 2 beats both 1s, 3 beats all, the 1s tie with each other
    expected = (2 * by_length + torch.tensor(CIRCULAR_WIN_RATES) + 0.5) / 4
    torch.testing.assert_close(win_rates(trainer), expected.repeat(4, 1))
    log = trainer.state.log_history[0]
    # Pairs (1,2) (1,3) (1,1) (2,3) (2,1) (3,1): length has 0 0 1/2 0 1 1, the circle .2 .8 .5 .2 .8 .2, the third 1/2
    apart = [(0.2 + 0.8 + 0 + 0.2 + 0.2 + 0.8) / 6, 5 * 0.5 / 6, 5 * 0.3 / 6]
    assert log["preferences/panel_disagreement"] == pytest.approx(sum(apart) / 3, rel=1e-5)


def test_weight_zero_watches_without_a_vote(fixed, tiny_model):
    trainer = fixed(
        model=tiny_model,
        reward_funcs=length,
        reward_weights=[0.0],
        log_completions=True,
        trainer_kwargs={"preference_func": rock_paper_scissors},
    )
    trainer.train()
    torch.testing.assert_close(win_rates(trainer), torch.tensor([CIRCULAR_WIN_RATES] * 4))
    log = trainer.state.log_history[0]
    assert log["rewards/length/mean"] == pytest.approx((2 + 3 + 4 + 2) / 4)
    assert log["preferences/panel_disagreement"] == pytest.approx((0.2 + 0.8 + 0 + 0.2 + 0.2 + 0.8) / 6, rel=1e-5)
    # Of (1,2) (1,3) (2,3) (2,1) (3,1), all but those of the first or the last with the third
    assert log["preferences/length/agreement/rock_paper_scissors"] == pytest.approx(3 / 5)


def test_scores_can_be_summed_before_they_are_compared(fixed, tiny_model):
    def minus_length(completion_ids, **kwargs):
        return [-1000 * value for value in length(completion_ids)]

    options = {"reward_funcs": [length, minus_length], "reward_weights": [3.0, 1.0], "log_completions": True}
    summed = fixed(model=tiny_model, reward_aggregation="sum", **options)
    summed.train()
    # 3 l - 1000 l: the larger scale decides, and the shorter wins. A vote would be 3 : 1 for the longer.
    torch.testing.assert_close(win_rates(summed), torch.tensor([[5 / 6, 1 / 3, 0, 5 / 6]] * 4))
    log = summed.state.log_history[0]
    assert not [name for name in log if name.endswith("panel_disagreement") or "agreement/" in name]  # one vote


def test_a_source_of_weight_zero_watches_a_sum_too(fixed, tiny_model):
    def gaps(completion_ids, **kwargs):
        return [None if i % 4 == 2 else -value for i, value in enumerate(length(completion_ids))]

    trainer = fixed(
        model=tiny_model, reward_funcs=[length, gaps], reward_weights=[1.0, 0.0], reward_aggregation="sum",
        log_completions=True,
    )  # fmt: skip
    trainer.train()
    torch.testing.assert_close(win_rates(trainer), torch.tensor([[1 / 6, 2 / 3, 1, 1 / 6]] * 4))
    # Of the pairs without the third: (1,2) and (2,1) the other way round, (1,1) even for both
    log = trainer.state.log_history[0]
    assert log["preferences/panel_disagreement"] == pytest.approx(2 / 3)
    assert log["preferences/reward/agreement/gaps"] == 0


@pytest.mark.parametrize("aggregation", ["vote", "sum"])
def test_a_member_that_misses_a_score(fixed, tiny_model, aggregation):
    def gaps(completion_ids, **kwargs):  # nothing for the third completion, nothing at all for the last prompt
        values = [10 * value for value in length(completion_ids)]
        return [None if i % 4 == 2 or i // 4 == 3 else value for i, value in enumerate(values)]

    trainer = fixed(
        model=tiny_model, reward_funcs=[length, gaps], reward_aggregation=aggregation, log_completions=True
    )
    trainer.train()
    rates = win_rates(trainer)
    by_length = torch.tensor([1 / 6, 2 / 3, 1, 1 / 6])
    torch.testing.assert_close(rates[3], by_length)  # the other source alone
    if aggregation == "vote":  # it has no say about the third, the other has
        torch.testing.assert_close(rates[:3], by_length.repeat(3, 1))
    else:  # a sum without one of its terms is no score: 1, 2 and 1 are left, 1/4, 1 and 1/4
        assert rates[:3, 2].isnan().all()
        torch.testing.assert_close(rates[:3, [0, 1, 3]], torch.tensor([[0.25, 1.0, 0.25]] * 3))
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_missing_eos_costs_score(fixed, tiny_model, monkeypatch):
    cut = {
        prompt: [ids[:-1] if k == 2 else ids for k, ids in enumerate(group)] for prompt, group in COMPLETIONS.items()
    }
    monkeypatch.setattr("helpers.COMPLETIONS", cut)
    # Lengths 2, 3, 3, 2. The third is cut off: with a penalty of 0.5 it loses to the second, with 2 to all
    rates = {}
    for penalty in (None, 0.5, 2.0):
        trainer = fixed(
            model=tiny_model, reward_funcs=length, missing_eos_penalty=penalty, log_completions=True, max_steps=1
        )
        trainer.train()
        rates[penalty] = win_rates(trainer)[0].tolist()
        assert trainer.state.log_history[0]["reward"] == pytest.approx((2 + 3 + 3 + 2) / 4)  # logged as they are
    assert rates[None] == pytest.approx([1 / 6, 5 / 6, 5 / 6, 1 / 6])
    assert rates[0.5] == pytest.approx([1 / 6, 1, 2 / 3, 1 / 6])
    assert rates[2.0] == pytest.approx([0.5, 1, 0, 0.5])


# ---- What is regressed


@pytest.mark.shows("loss_type")
def test_loss_types_and_baselines_reach_the_targets(fixed, tiny_model):
    scores = torch.tensor([alphabet_score(group) for group in COMPLETIONS.values()])
    preferences = torch.sigmoid((scores[:, :, None] - scores[:, None, :]) / 2)
    rates = (preferences.sum(2) - 0.5) / 3
    best, worst = rates.argmax(1), rates.argmin(1)
    groups = torch.arange(4)
    soft = {"comparison": "bradley_terry", "bt_temperature": 2.0, "log_completions": True, "model": tiny_model}

    def targets(**options):
        trainer = fixed(**soft, **options)
        trainer.train()
        return win_rates(trainer, "advantage", sort=True)

    hard = targets(loss_type="sppo_hard")
    torch.testing.assert_close(hard, 5 * torch.sign(rates - 0.5))
    assert torch.equal(targets(loss_type="sppo_hard", train_on="best_and_worst"), hard)

    single = targets(loss_type="sppo_single", train_on="best_and_worst")
    expected = torch.full((4, 4), torch.nan)
    expected[groups, best] = 10 * (preferences[groups, best, worst] - 0.5)
    expected[groups, worst] = -expected[groups, best]
    torch.testing.assert_close(single, expected, equal_nan=True)

    log_z = (10 * rates).exp().mean(1, keepdim=True).log()
    torch.testing.assert_close(targets(baseline="log_mean_exp"), 10 * rates - log_z, rtol=1e-5, atol=1e-5)
    # The group's estimate is over all of the group, also where only some of it is trained on
    extremes = targets(baseline="log_mean_exp", train_on="best_and_worst")
    torch.testing.assert_close(extremes, 10 * rates - log_z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sppo_hard"},
        {"loss_type": "sppo_single", "train_on": "best_and_worst"},
        {"baseline": "log_mean_exp"},
    ],
)
def test_the_loss_is_the_mean_squared_target_at_the_start(fixed, tiny_model, options):
    """At a log-ratio of 0: whatever is regressed, and with the rows in TRL's shuffled order."""
    trainer = fixed(
        model=tiny_model,
        comparison="bradley_terry",
        log_completions=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        **options,
    )
    trainer.train()
    targets = win_rates(trainer, "advantage")
    assert trainer.state.log_history[0]["loss"] == pytest.approx(targets.square().nanmean().item(), rel=1e-5)


# ---- Bad oracles


def test_lost_comparisons_are_counted_and_the_run_goes_on(fixed, tiny_model):
    def forgetful(prompts, first, second, **kwargs):  # cannot say anything about texts of length 3
        good = rock_paper_scissors(prompts, first, second)
        return [None if 3 in (len(a), len(b)) else p for a, b, p in zip(first, second, good, strict=True)]

    trainer = fixed(
        model=tiny_model, reward_funcs=None, log_completions=True, trainer_kwargs={"preference_func": forgetful}
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["preferences/forgetful/lost"] == pytest.approx(6 / 12)
    assert log["win_rate/unscorable"] == 1 / 4 and math.isfinite(log["loss"])
    rates = win_rates(trainer)
    assert rates[:, 2].isnan().all()
    torch.testing.assert_close(rates[:, :2], torch.tensor([[(0.2 + 0.5) / 2, 0.8]] * 4))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda n: 1 / 0, "it raised ZeroDivisionError"),
        (lambda n: [2.0] * n, "it returned 2.0, which is not a probability"),
        (lambda n: [None] * n, "it returned None"),
        (lambda n: [math.nan] * n, "it returned nan, which is not a probability"),
        (lambda n: [], "it returned 0 values for 12 comparisons"),
    ],
)
def test_an_oracle_that_never_answers_stops_the_run_with_its_name(fixed, tiny_model, answer, reason):
    def my_judge(prompts, first, second, **kwargs):
        return answer(len(first))

    trainer = fixed(
        model=tiny_model, preference_batch_size=12, trainer_kwargs={"preference_func": [rock_paper_scissors, my_judge]}
    )
    with pytest.raises(RuntimeError, match=f"'my_judge' gave no valid verdict .* of the last 4 prompts: .*{reason}"):
        trainer.train()


@pytest.mark.parametrize("alone", [False, True])
def test_an_oracle_that_fell_silent_stops_the_run_after_three_rollouts(fixed, tiny_model, caplog, alone):
    calls = []

    def restarting(prompts, first, second, **kwargs):
        calls.append(1)
        if len(calls) in (2, 3, 5, 6, 7):
            raise ConnectionError("refused")
        return rock_paper_scissors(prompts, first, second)

    reward_funcs = None if alone else alphabet_score
    trainer = fixed(
        model=tiny_model, max_steps=9, reward_funcs=reward_funcs, trainer_kwargs={"preference_func": restarting}
    )
    with pytest.raises(RuntimeError, match=r"'restarting' gave no valid verdict .* last 12 prompts: .*refused"):
        trainer.train()
    assert len(calls) == 7 and trainer.state.global_step == 6
    kept = [row["win_rate/kept"] for row in trainer.state.log_history]
    assert kept == ([1, 0, 0, 1, 0, 0] if alone else [1] * 6)
    assert caplog.text.count("Shown once per oracle") == 1


def test_neither_a_silent_oracle_without_a_vote_nor_an_evaluation_stops_a_run(fixed, tiny_model):
    def broken(prompts, first, second, **kwargs):
        raise ConnectionError("refused")

    watcher = fixed(
        model=tiny_model, preference_weights=[0.0], max_steps=4, trainer_kwargs={"preference_func": broken}
    )
    watcher.train()
    assert watcher.state.global_step == 4 and watcher.state.log_history[3]["preferences/broken/lost"] == 1
    voter = fixed(model=tiny_model, trainer_kwargs={"preference_func": broken})
    assert voter.evaluate(voter.train_dataset)["eval_preferences/broken/lost"] == 1


def test_oracles_of_one_name_are_told_apart(fixed, tiny_model):
    oracles = [lambda first, **kwargs: [0.9] * len(first), lambda first, **kwargs: [0.5] * len(first)]
    trainer = fixed(model=tiny_model, reward_funcs=None, trainer_kwargs={"preference_func": oracles})
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["preferences/<lambda>_0/order_disagreement"] == pytest.approx(0.8)
    assert log["preferences/<lambda>_1/order_disagreement"] == 0


# ---- Rounding


def seven_cycle(prompts, first, second, **kwargs):
    """Each letter beats the three that follow it in a circle of seven by 0.9: every win rate is 1/2."""
    return [0.9 if 1 <= (ord(b) - ord(a)) % 7 <= 3 else 0.1 for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": "sppo_hard"}, {"loss_type": "sppo_single", "train_on": "best_and_worst"}],
)
def test_a_group_in_which_all_are_even_teaches_nothing(fixed, tiny_model, monkeypatch, options):
    circle = {prompt: [[3 + k, 1] for k in range(7)] for prompt in COMPLETIONS}
    monkeypatch.setattr("helpers.COMPLETIONS", circle)

    def rollout(prompts, trainer):
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [[3 + i % 7, 1] for i in range(len(prompts))],
            "logprobs": None,
        }

    trainer = fixed(
        model=tiny_model, reward_funcs=None, num_generations=7, per_device_train_batch_size=28,
        trainer_kwargs={"preference_func": seven_cycle, "rollout_func": rollout}, **options,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["win_rate/groups_without_signal"] == 1 and log["win_rate/kept"] == 0 and log["loss"] == 0
    assert log["preferences/intransitive"] == pytest.approx(14 / 35)  # 7 (49 - 1) / 24 circles, the most there can be


@pytest.mark.parametrize("weights", [None, [0.1, 0.1, 0.1]])
def test_a_vote_that_ends_even_is_even(weights):
    """Thirds of 7 completions do not add up exactly in float32; counted in integers, 9 of 18 is even."""
    generator = torch.Generator().manual_seed(0)
    sources = [torch.stack([torch.randperm(7, generator=generator) for _ in range(200)]) for _ in range(3)]
    wins = sum((scores[:, :, None] > scores[:, None, :]).sum(2) for scores in sources)
    rates = package_win_rates(
        mean_preferences([preferences_from_scores(scores.float()) for scores in sources], weights)
    )
    assert ((rates == 0.5) == (wins == 9)).all() and (wins == 9).sum() > 50
    # and one that ends on the threshold is on it
    chosen = select_completions(rates, threshold=10 / 18)
    assert (chosen == ((wins >= 10) | (wins <= 8))).all() and (wins == 10).sum() > 50


# ---- Before a model is loaded


@pytest.mark.parametrize(
    ("options", "oracles", "message"),
    [
        ({"preference_weights": [1.0]}, None, r"preference_weights must have one entry per preference_func \(0\)"),
        ({"preference_weights": [1.0]}, [rock_paper_scissors] * 2, r"per preference_func \(2\), got 1"),
        (
            {"preference_weights": [0.0], "reward_weights": [0.0]},
            rock_paper_scissors,
            r"reward_weights=\[0.0\] and preference_weights=\[0.0\] are all zero: no source has a vote",
        ),
        ({"reward_weights": [0.0]}, None, "are all zero: no source has a vote"),
        (
            {"missing_eos_penalty": 1.0, "reward_funcs": None},
            rock_paper_scissors,
            "missing_eos_penalty=1.0 is subtracted from scores, but there are only pairwise oracles",
        ),
        ({}, "PairRM", r"preference_func 'str' must be callable as `\(prompts, first, second, \*\*kwargs\)`"),
    ],
)
def test_messages_before_a_model_is_loaded(make_trainer, monkeypatch, options, oracles, message):
    monkeypatch.setattr("trl.GRPOTrainer.__init__", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(**{"reward_funcs": count_abc, **options}, trainer_kwargs={"preference_func": oracles})


def test_no_reward_source_has_no_weight(make_trainer):
    trainer = make_trainer(reward_funcs=None, reward_weights=[], trainer_kwargs={"preference_func": more_abc})
    trainer.train()
    assert trainer.voters.weights == [1.0] and trainer.reward_funcs == []
    assert "reward" not in trainer.state.log_history[0]
