import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sppo.preferences import mean_preferences, preferences_from_scores, win_rates, win_rates_from_scores


NAN, INF = math.nan, math.inf


def quadratic_loop(scores: list[float]) -> list[float]:
    """The reference for hard comparisons without ties: for each completion, wins over the others / (K - 1)."""
    k = len(scores)
    return [sum(scores[i] > scores[j] for j in range(k) if j != i) / (k - 1) for i in range(k)]


def scores_of(groups: int, k: int, seed: int = 0, ties: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 4, (groups, k), generator=generator).double()
    return torch.stack([torch.randperm(k, generator=generator).double() for _ in range(groups)])


def test_hard_preferences_golden():
    # scores 2, 5, 2: 5 beats both, the two 2s tie
    expected = torch.tensor([[[0.5, 0.0, 0.5], [1.0, 0.5, 1.0], [0.5, 0.0, 0.5]]])
    torch.testing.assert_close(preferences_from_scores(torch.tensor([[2.0, 5.0, 2.0]])), expected)


def test_bradley_terry_preferences_golden():
    # P(1 beats 0) = 1 / (1 + e^-(3 - 1) / 2) = 1 / (1 + e^-1)
    win = 1 / (1 + math.exp(-1))
    expected = torch.tensor([[[0.5, 1 - win], [win, 0.5]]])
    actual = preferences_from_scores(torch.tensor([[1.0, 3.0]]), "bradley_terry", temperature=2.0)
    torch.testing.assert_close(actual, expected)


def test_win_rates_golden_with_tie_with_and_without_self():
    # scores 3, 1, 1, 0 -> wins over the others 3, 1.5, 1.5, 0 of 3; with self 3.5, 2, 2, 0.5 of 4
    preferences = preferences_from_scores(torch.tensor([[3.0, 1.0, 1.0, 0.0]]))
    torch.testing.assert_close(win_rates(preferences), torch.tensor([[1.0, 0.5, 0.5, 0.0]]))
    torch.testing.assert_close(
        win_rates(preferences, include_self=True), torch.tensor([[3.5 / 4, 2 / 4, 2 / 4, 0.5 / 4]])
    )


def test_intransitive_preferences_are_kept():
    # rock, paper, scissors, and a completion that beats them all: each of the three wins one of three
    preferences = torch.tensor([[[0.5, 0, 1, 0], [1, 0.5, 0, 0], [0, 1, 0.5, 0], [1, 1, 1, 0.5]]])
    torch.testing.assert_close(win_rates(preferences), torch.tensor([[1 / 3, 1 / 3, 1 / 3, 1.0]]))


def test_nan_score_takes_part_in_no_comparison():
    preferences = preferences_from_scores(torch.tensor([[3.0, NAN, 1.0]]))
    expected = torch.tensor([[[0.5, NAN, 1.0], [NAN, NAN, NAN], [0.0, NAN, 0.5]]])
    torch.testing.assert_close(preferences, expected, equal_nan=True)
    torch.testing.assert_close(win_rates(preferences), torch.tensor([[1.0, NAN, 0.0]]), equal_nan=True)


@pytest.mark.parametrize("include_self", [False, True])
def test_one_scorable_completion_has_no_win_rate(include_self):
    scores = torch.tensor([[NAN, 2.0, NAN], [NAN, NAN, NAN]])
    for rates in (
        win_rates(preferences_from_scores(scores), include_self),
        win_rates_from_scores(scores, include_self=include_self),
    ):
        assert rates.isnan().all()


@pytest.mark.parametrize("k", [2, 3, 8, 33])
def test_hard_win_rates_equal_the_quadratic_loop(k):
    scores = scores_of(groups=5, k=k, ties=False)
    expected = torch.tensor([quadratic_loop(group.tolist()) for group in scores], dtype=torch.float64)
    torch.testing.assert_close(win_rates(preferences_from_scores(scores)), expected)
    torch.testing.assert_close(win_rates_from_scores(scores), expected)


scores_with_everything = st.lists(
    st.lists(st.sampled_from([NAN, -INF, INF, -1.5, 0.0, 0.5, 2.0]), min_size=6, max_size=6), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None)
@given(scores_with_everything, st.sampled_from(["hard", "bradley_terry"]), st.booleans())
def test_shortcut_equals_the_matrix(scores, comparison, include_self):
    scores = torch.tensor(scores, dtype=torch.float64)
    expected = win_rates(preferences_from_scores(scores, comparison), include_self)
    actual = win_rates_from_scores(scores, comparison, include_self=include_self)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(scores_with_everything, st.sampled_from(["hard", "bradley_terry"]), st.floats(0.1, 10))
def test_preferences_are_antisymmetric_and_win_rates_average_one_half(scores, comparison, temperature):
    scores = torch.tensor(scores, dtype=torch.float64)
    preferences = preferences_from_scores(scores, comparison, temperature)
    total = preferences + preferences.mT
    known = ~total.isnan()
    torch.testing.assert_close(total[known], torch.ones_like(total[known]))
    rates = win_rates(preferences)
    for group in rates:
        group = group[~group.isnan()]
        if len(group):
            assert group.mean().item() == pytest.approx(0.5)
            assert 0 <= group.min() and group.max() <= 1


def test_permuting_a_group_permutes_its_win_rates():
    scores = scores_of(groups=3, k=7)
    order = torch.randperm(7)
    torch.testing.assert_close(win_rates_from_scores(scores[:, order]), win_rates_from_scores(scores)[:, order])


def test_groups_do_not_see_each_other():
    scores = scores_of(groups=4, k=5)
    looped = torch.cat([win_rates_from_scores(group[None]) for group in scores])
    torch.testing.assert_close(win_rates_from_scores(scores), looped)


def test_hard_win_rates_ignore_the_scale_and_bradley_terry_does_not():
    scores = scores_of(groups=3, k=6)
    stretched = torch.exp(3 * scores) - 7  # a monotone change of scale
    torch.testing.assert_close(win_rates_from_scores(stretched), win_rates_from_scores(scores))
    soft = win_rates_from_scores(scores, "bradley_terry")
    assert not torch.allclose(win_rates_from_scores(stretched, "bradley_terry"), soft)


def test_bradley_terry_reduces_to_hard_at_low_temperature():
    scores = scores_of(groups=3, k=6)
    cold = preferences_from_scores(scores, "bradley_terry", temperature=1e-6)
    torch.testing.assert_close(cold, preferences_from_scores(scores, "hard"))


def test_including_self_shrinks_towards_one_half():
    # W_self - 1/2 = (K - 1) / K * (W - 1/2)
    scores = scores_of(groups=3, k=5)
    shrunk = (win_rates_from_scores(scores) - 0.5) * 4 / 5 + 0.5
    torch.testing.assert_close(win_rates_from_scores(scores, include_self=True), shrunk)


def test_hard_win_rates_of_4096_completions_need_no_square_matrix(monkeypatch):
    # 4,096 squared bytes are 16 MiB even for a bool: every tensor that is made stays well below
    largest = 0
    scores = torch.stack([torch.randperm(4096), torch.randperm(4096)]).float()  # no ties

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        rates = win_rates_from_scores(scores)
    assert 0 < largest <= scores.numel()
    # ranks 0 .. K-1 without ties: the sorted win rates are j / (K - 1)
    torch.testing.assert_close(rates.sort(dim=1).values[0], torch.arange(4096) / 4095)


def test_mean_preferences_golden():
    # oracle 1 (weight 3): 0 beats 1; oracle 2 (weight 1): 1 beats 0 -> P[0, 1] = 3/4
    first = preferences_from_scores(torch.tensor([[2.0, 1.0]]))
    second = preferences_from_scores(torch.tensor([[1.0, 9.0]]))
    mean = mean_preferences([first, second], [3.0, 1.0])
    torch.testing.assert_close(mean, torch.tensor([[[0.5, 0.75], [0.25, 0.5]]]))


def test_mean_preferences_leaves_out_the_oracle_that_could_not_compare():
    first = preferences_from_scores(torch.tensor([[2.0, 1.0, 0.0]]))
    second = preferences_from_scores(torch.tensor([[0.0, 1.0, NAN]]))
    mean = mean_preferences([first, second])
    # 0 against 1: one vote each. Everything with 2: only the first oracle.
    torch.testing.assert_close(mean, torch.tensor([[[0.5, 0.5, 1.0], [0.5, 0.5, 1.0], [0.0, 0.0, 0.5]]]))
    assert mean_preferences([second, second])[0, 2].isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preferences_from_scores(torch.zeros(3)), r"of shape \(groups, K\), got .* of shape \(3,\)"),
        (lambda: preferences_from_scores(torch.zeros(2, 3, dtype=torch.long)), "must be floating point .*int64"),
        (lambda: preferences_from_scores(torch.zeros(2, 3), "soft"), "'hard' or 'bradley_terry', got 'soft'"),
        (
            lambda: win_rates_from_scores(torch.zeros(2, 3), "bradley_terry", 0.0),
            "temperature must be positive, got 0",
        ),
        (lambda: win_rates(torch.zeros(2, 3)), r"shape \(groups, K, K\), got \(2, 3\)"),
        (lambda: win_rates(torch.zeros(2, 3, 4)), r"shape \(groups, K, K\), got \(2, 3, 4\)"),
        (lambda: mean_preferences([torch.zeros(1, 2, 2)], [1.0, 2.0]), r"one entry per oracle \(1\), got 2"),
        (lambda: mean_preferences([torch.zeros(1, 2, 2)], [-1.0]), "must not be negative"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
