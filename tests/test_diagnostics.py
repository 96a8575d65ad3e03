import itertools
import math

import pytest
import torch

from trl_sppo.diagnostics import (
    agreement,
    length_correlation,
    order_disagreement,
    panel_disagreement,
    share_intransitive,
    share_of_duplicates,
    share_of_ties,
    share_saturated,
)
from trl_sppo.preferences import preferences_from_scores


NAN = math.nan


def matrix(k: int, above: dict[tuple[int, int], float]) -> torch.Tensor:
    """A preference matrix of one group from the entries above the diagonal; the others were not compared."""
    preferences = torch.full((1, k, k), NAN)
    preferences[0].fill_diagonal_(0.5)
    for (i, j), value in above.items():
        preferences[0, i, j], preferences[0, j, i] = value, 1 - value
    return preferences


# 0 beats 1, 1 beats 2, 2 beats 0 (a circle), all three beat 3; one is a tie and one is nearly certain
CIRCLE = matrix(4, {(0, 1): 0.9, (1, 2): 0.6, (0, 2): 0.2, (0, 3): 0.96, (1, 3): 0.7, (2, 3): 0.5})


def test_goldens():
    assert share_of_ties(CIRCLE).item() == pytest.approx(1 / 6)
    assert share_saturated(CIRCLE).item() == pytest.approx(1 / 6)
    assert share_saturated(CIRCLE, certainty=0.85).item() == pytest.approx(2 / 6)
    assert share_intransitive(CIRCLE).item() == pytest.approx(1 / 4)  # of 4 triads


def test_pairs_that_were_not_compared_do_not_count():
    partial = matrix(4, {(0, 1): 0.9, (1, 2): 0.6, (0, 2): 0.2, (0, 3): 0.5})
    assert share_of_ties(partial).item() == pytest.approx(1 / 4)
    assert share_intransitive(partial).item() == 1  # the only triad with three comparisons
    nothing = matrix(3, {})
    assert all(f(nothing).isnan() for f in (share_of_ties, share_saturated, share_intransitive))


def test_scores_are_transitive_and_random_tournaments_are_a_quarter_circular():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (3, 9), generator=generator).float()
    for comparison in ("hard", "bradley_terry"):
        assert share_intransitive(preferences_from_scores(scores, comparison)).item() == 0
    answers = torch.randint(0, 2, (40, 9, 9), generator=generator).float().triu(1)
    tournaments = answers + (1 - answers.mT).tril(-1) + 0.5 * torch.eye(9)
    share = share_intransitive(tournaments).item()
    assert share == pytest.approx(0.25, abs=0.03)  # the expectation of a random tournament
    circles = sum(
        (p[i, j] > 0.5) == (p[j, k] > 0.5) == (p[k, i] > 0.5)
        for p in tournaments
        for i, j, k in itertools.combinations(range(9), 3)
    )
    assert share == pytest.approx(circles / (40 * math.comb(9, 3)))


def test_intransitive_circles_of_large_groups_are_counted_exactly():
    # Each of 601 beats the 300 that follow it: K (K^2 - 1) / 24 circular triads, the most there can be. 601^3 > 2^24.
    k = 601
    steps = (torch.arange(k) - torch.arange(k)[:, None]) % k
    preferences = torch.where(steps == 0, 0.5, (steps <= 300).float())[None]
    expected = k * (k**2 - 1) / 24 / math.comb(k, 3)
    assert share_intransitive(preferences).item() == pytest.approx(expected, rel=1e-6)


def test_agreement_golden():
    a = matrix(3, {(0, 1): 0.9, (0, 2): 0.6, (1, 2): 0.2})
    b = matrix(3, {(0, 1): 0.6, (0, 2): 0.1, (1, 2): 0.4})  # as a on two of three
    c = matrix(3, {(0, 1): 0.1, (0, 2): 0.5})  # on one pair only: unlike both
    nothing = matrix(3, {})
    expected = torch.tensor([[1, 2 / 3, 0, NAN], [2 / 3, 1, 0, NAN], [0, 0, 1, NAN], [NAN] * 4])
    torch.testing.assert_close(agreement([a, b, c, nothing]), expected, equal_nan=True)
    assert agreement([a, a.mT]).tolist() == [[1, 0], [0, 1]]


def test_agreement_is_half_by_chance_whatever_the_ties():
    generator = torch.Generator().manual_seed(0)
    panel = [preferences_from_scores(torch.randint(0, 4, (300, 8), generator=generator).float(), "hard") for _ in "ab"]
    assert agreement(panel)[0, 1].item() == pytest.approx(0.5, abs=0.02)


def test_panel_disagreement_golden():
    a, b, c = (preferences_from_scores(torch.tensor([scores])) for scores in ([1.0, 2, 3], [1.0, 3, 2], [3.0, 2, 1]))
    # of the pairs 01, 02, 12: a and b differ on one, a and c on three, b and c on two
    assert panel_disagreement([a, b]).item() == pytest.approx(1 / 3)
    assert panel_disagreement([a, b, c]).item() == pytest.approx((1 + 3 + 2) / 9)
    assert panel_disagreement([a]).isnan()
    one_missing = preferences_from_scores(torch.tensor([[1.0, NAN, 0.0]]))
    assert panel_disagreement([a, one_missing]).item() == 1  # only 0 against 2


def test_order_disagreement_golden():
    always_first = torch.full((2, 3, 3), 0.9)
    assert order_disagreement(always_first).item() == pytest.approx(0.8)
    fair = torch.tensor([[[NAN, 0.7], [0.3, NAN]]])
    assert order_disagreement(fair).item() == pytest.approx(0, abs=1e-6)
    assert order_disagreement(torch.tensor([[[NAN, 0.7], [NAN, NAN]]])).isnan()


def test_length_correlation_is_within_groups():
    # Within each group the longer loses, although the group of long completions wins as often as the short one
    rates = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0]])
    lengths = torch.tensor([[10, 20, 30], [110, 120, 130]])
    assert length_correlation(rates, lengths).item() == pytest.approx(-1)
    # An unscorable one is left out, of the mean length too
    rates = torch.tensor([[1.0, 0.0, NAN]])
    assert length_correlation(rates, torch.tensor([[30, 10, 5000]])).item() == pytest.approx(1)
    assert length_correlation(rates, torch.tensor([[7, 7, 7]])).isnan()


def test_length_correlation_against_numpy():
    np = pytest.importorskip("numpy")
    generator = torch.Generator().manual_seed(0)
    rates, lengths = torch.rand(1, 50, generator=generator), torch.randint(1, 99, (1, 50), generator=generator)
    expected = np.corrcoef(rates[0].numpy(), lengths[0].numpy())[0, 1]
    assert length_correlation(rates, lengths).item() == pytest.approx(expected, abs=1e-6)


def test_duplicates_golden():
    assert share_of_duplicates(torch.tensor([[7, 7, 8, 9], [7, 1, 2, 3]])).item() == pytest.approx(2 / 8)
