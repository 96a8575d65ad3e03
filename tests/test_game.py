"""Games with a known answer, played by the real trainer: one iteration, and self-play. See benchmarks/game.py."""

import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from game import (
    GAME_SEED,
    ROCK_PAPER_SCISSORS,
    averages,
    bradley_terry_scores,
    duality_gap,
    least_squares,
    make_model,
    minimise,
    minimum_for_group,
    multiplicative_weights,
    play,
    random_game,
    random_policy,
    sample,
    set_policy,
    total_variation,
)
from signal_games import SIGNALS, distance_to_trainer


GAME, START = random_game(8, GAME_SEED), random_policy(8, GAME_SEED)


@pytest.fixture(autouse=True)
def no_warning_of_rollout_func(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


# ---- The answers themselves


@pytest.mark.parametrize(("eta", "distance"), [(1.0, 0.0011), (2.0, 0.0087), (5.0, 0.082), (10.0, 0.25)])
def test_the_papers_constant_is_another_policy_than_multiplicative_weights(eta, distance):
    update = multiplicative_weights(START, GAME, eta)
    half = least_squares(START, eta * (GAME @ START - 0.5))
    assert half.sum().item() == pytest.approx(1)
    assert total_variation(half, update) == pytest.approx(distance, rel=0.05)
    log_z = (START * (eta * GAME @ START).exp()).sum().log()
    assert total_variation(least_squares(START, eta * GAME @ START - log_z), update) < 1e-7


@pytest.mark.parametrize("eta", [1.0, 10.0])
def test_two_solvers_agree(eta):
    targets = eta * (GAME @ START - 0.5)
    by_descent = minimise(lambda logps: (START * (logps - START.log() - targets) ** 2).sum(), START)
    assert total_variation(least_squares(START, targets), by_descent) < 1e-6


def test_the_bradley_terry_fit_of_rock_paper_scissors_is_no_preference():
    assert bradley_terry_scores(ROCK_PAPER_SCISSORS).abs().max() < 1e-9
    assert duality_gap(torch.full((3,), 1 / 3, dtype=torch.float64), ROCK_PAPER_SCISSORS) == pytest.approx(0)
    # Of a game that is Bradley-Terry, the fit is the game
    scores = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(bradley_terry_scores(torch.sigmoid(scores.unsqueeze(1) - scores)), scores)


def test_a_group_has_each_action_as_often_as_its_probability_says():
    counts = sample(START, 512, torch.Generator().manual_seed(0)).bincount(minlength=8)
    assert (counts - 512 * START).abs().max() < 1 + 1e-3


# ---- One iteration

ONE_ITERATION = {"group_size": 512, "steps": 100}


@pytest.mark.parametrize("baseline", ["log_mean_exp", "half"])
@pytest.mark.parametrize("eta", [1.0, 10.0])
def test_one_iteration_comes_to_the_known_policy(eta, baseline):
    (before, after), trainer, (group,) = play(GAME, START, eta=eta, baseline=baseline, **ONE_ITERATION)
    assert total_variation(before, START) < 1e-6
    # The fit is finished: hardly a gradient is left, and it is where another optimizer ends on the same group
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert norms[-1] < 1e-3 * norms[0]
    assert total_variation(after, minimum_for_group(before, group, GAME, eta, baseline)) < 1e-3
    # What is left is the size of the group: of 512 completions each action has its expected number to within 1, so
    # that win rates are off by less than 8/512, and log-ratios by eta times that
    update = multiplicative_weights(START, GAME, eta)
    if baseline == "log_mean_exp":
        assert total_variation(after, update) < 0.02
    else:
        assert total_variation(after, least_squares(START, eta * (GAME @ START - 0.5))) < 0.02
    if baseline == "half" and eta == 10.0:
        assert total_variation(after, update) > 0.1


@pytest.mark.parametrize("forward_share", [0.0, 0.5, 1.0])
def test_the_kl_term_pulls_as_much_towards_the_initial_policy_as_it_should(forward_share, tmp_path):
    eta, beta = 10.0, 5.0
    initial = random_policy(8, seed=6)
    model = make_model(8)
    set_policy(model, initial)
    model.save_pretrained(tmp_path)

    def loss(logps, beta=beta, share=forward_share):
        squares = (START * (logps - START.log() - eta * (GAME @ START - 0.5)) ** 2).sum()
        reverse = (logps.exp() * (logps - initial.log())).sum()
        forward = (initial * (initial.log() - logps)).sum()
        return squares + beta * ((1 - share) * reverse + share * forward)

    expected = minimise(loss, START)
    # The term matters, and so does its direction
    others = [{"beta": 0.0}, *({"share": share} for share in {0.0, 0.5, 1.0} - {forward_share})]
    for other in others:
        assert total_variation(expected, minimise(lambda logps, other=other: loss(logps, **other), START)) > 0.04

    options = {"eta": eta, "beta": beta, "forward_kl_share": forward_share, **ONE_ITERATION}
    policies, *_ = play(GAME, START, model=str(tmp_path), **options)
    assert total_variation(policies[-1], expected) < 0.02


def as_initial(policy, folder) -> str:
    model = make_model(len(policy))
    set_policy(model, policy)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("eta", [1.0, 10.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_inpo_comes_to_mirror_descent(eta, share, tmp_path):
    """pi_{t+1} is proportional to pi_t^(1 - share) pi_0^share exp(eta P(y > pi_t)): no constant stands for log Z."""
    initial = random_policy(8, seed=6)
    model = as_initial(initial, tmp_path) if share > 0 else None
    options = {"eta": eta, "beta": share / eta, "loss_type": "inpo", **ONE_ITERATION}
    policies, *_ = play(GAME, START, model=model, **options)
    update = ((1 - share) * START.log() + share * initial.log() + eta * GAME @ START).softmax(0)
    assert total_variation(policies[0], update) > 0.05
    assert total_variation(policies[-1], update) < 0.01


@pytest.mark.parametrize("signal", SIGNALS[:3])
def test_the_games_about_signals_are_played_as_the_trainer_plays_them(signal):
    """benchmarks/signal_games.py writes its updates out, for thousands of games at once."""
    assert distance_to_trainer("two steps", signal, iterations=2) < 1e-5


# ---- Self-play

SELF_PLAY = {"eta": 1.0, "baseline": "log_mean_exp", "group_size": 128, "steps": 20, "logging_steps": 20}


def gaps_of_averages(policies, preferences) -> list[float]:
    return [duality_gap(policy, preferences) for policy in averages(policies)]


def exact_self_play(preferences, start, eta, num_iterations) -> list[torch.Tensor]:
    policies = [start]
    for _ in range(num_iterations):
        policies.append(multiplicative_weights(policies[-1], preferences, eta))
    return policies


def test_self_play_solves_rock_paper_scissors_and_bradley_terry_cannot():
    start = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    policies, *_ = play(ROCK_PAPER_SCISSORS, start, 32, **SELF_PLAY)
    gaps = gaps_of_averages(policies, ROCK_PAPER_SCISSORS)
    assert gaps[0] == pytest.approx(0.5, abs=1e-3) and gaps[0] > gaps[8] > gaps[32]
    exact = gaps_of_averages(exact_self_play(ROCK_PAPER_SCISSORS, start, 1.0, 32), ROCK_PAPER_SCISSORS)
    assert gaps[32] < 0.25 * gaps[0] and gaps[32] == pytest.approx(exact[32], abs=0.04)

    scores = bradley_terry_scores(ROCK_PAPER_SCISSORS)
    fitted, trainer, _ = play(ROCK_PAPER_SCISSORS, start, 4, scores=scores, comparison="bradley_terry", **SELF_PLAY)
    # All scores are equal: no group has a signal, and the policy stays where it is
    assert trainer.state.log_history[0]["win_rate/kept"] == 0
    torch.testing.assert_close(fitted[-1], fitted[0])


def test_self_play_solves_a_random_game_and_bradley_terry_cannot():
    policies, *_ = play(GAME, START, 32, **SELF_PLAY)
    gaps = gaps_of_averages(policies, GAME)
    assert gaps[0] > gaps[4] > gaps[8] > gaps[16] > gaps[32]
    exact = gaps_of_averages(exact_self_play(GAME, START, 1.0, 32), GAME)
    assert gaps[32] < 0.25 * gaps[0] and gaps[32] == pytest.approx(exact[32], abs=0.03)

    # The fit has a favourite, which other actions beat
    scores = bradley_terry_scores(GAME)
    favourite = torch.eye(8, dtype=torch.float64)[scores.argmax()]
    assert duality_gap(favourite, GAME) > 0.5
    fitted, *_ = play(GAME, START, 32, scores=scores, comparison="bradley_terry", **SELF_PLAY)
    assert total_variation(fitted[-1], favourite) < 0.2  # and still on its way
    assert duality_gap(fitted[-1], GAME) > 0.5
    assert gaps_of_averages(fitted, GAME)[32] > 2 * gaps[32]


def test_the_last_policy_comes_to_the_solution_if_the_reference_moves(tmp_path):
    """COMAL's outer loop on INPO. SPPO's last policy circles, and INPO's own solves a game with a KL term."""
    start = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    options = {
        "model": as_initial(start, tmp_path), "loss_type": "inpo", "eta": 2.0, "beta": 0.1, "group_size": 128,
        "steps": 20, "logging_steps": 20,
    }  # fmt: skip
    moving = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 8 * 20}
    policies, *_ = play(ROCK_PAPER_SCISSORS, start, 40, **options, **moving)
    fixed, *_ = play(ROCK_PAPER_SCISSORS, start, 40, **options)
    circling = exact_self_play(ROCK_PAPER_SCISSORS, start, 0.5, 40)
    last = [[duality_gap(policy, ROCK_PAPER_SCISSORS) for policy in run[-8:]] for run in (policies, fixed, circling)]
    assert max(last[0]) < 0.04 < min(last[1]) and min(last[2]) > 0.3, last
