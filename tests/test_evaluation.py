import math
import re
from pathlib import Path

import pytest
import torch

from trl_sppo.evaluation.statistics import length_controlled_win_rate, outcomes_of_scores, win_rate


def test_outcomes_golden():
    # prompt 1: 2 beats 1, loses to 3; prompt 2: both win; prompt 3: a tie, and no score
    ours = torch.tensor([[2.0], [5.0], [1.0]])
    theirs = torch.tensor([[1.0, 3.0], [0.0, 4.0], [1.0, math.nan]])
    expected = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.5, math.nan]]])
    torch.testing.assert_close(outcomes_of_scores(ours, theirs), expected, equal_nan=True)


def test_win_rate_golden():
    # w = 1/2, 1, 1/4. m = (1.75 + 0.5) / 4 = 0.5625. Residuals: -0.0625, 0.4375, -0.3125, and half of 0.4375 and of
    # -0.5625 for the half win and half loss; squares sum to 0.41992; times 5/4 for five clusters: 0.52490
    # curvature: 4 m (1 - m) = 0.98438; se = sqrt(0.52490) / 0.98438 = 0.73600; logit(m) = 0.25131
    result = win_rate(torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.25, math.nan]]]))
    assert (result.mean, result.num_prompts) == (pytest.approx(7 / 12), 3)
    margin = 1.95996 * 0.73600
    for bound, log_odds in ((result.low, 0.25131 - margin), (result.high, 0.25131 + margin)):
        assert bound == pytest.approx(1 / (1 + math.exp(-log_odds)), abs=5e-4)  # the ridge is worth 1/1000 of a prompt
    assert win_rate(torch.tensor([[[1.0]], [[math.nan]]])).num_prompts == 1


def test_the_opponents_win_rate_is_the_rest():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randint(0, 5, (2, 40, 3), generator=generator).float()
    lengths = torch.randint(5, 50, (2, 40, 3), generator=generator).float()
    for function in (lambda outcomes, *_: win_rate(outcomes), length_controlled_win_rate):
        forward = function(outcomes_of_scores(ours, theirs), lengths[0], lengths[1])
        backward = function(outcomes_of_scores(theirs, ours), lengths[1], lengths[0])
        assert forward.mean + backward.mean == pytest.approx(1)
        assert forward.low + backward.high == pytest.approx(1)


def test_intervals_cover():
    """Of 95 % intervals over prompts with several dependent samples, some 95 % hold the truth; also far from 1/2."""
    generator = torch.Generator().manual_seed(0)
    for shift in (0.0, 1.5):
        truth = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(shift / 1.5**0.5)).item()
        covered = torch.zeros(2)
        for _ in range(400):
            prompt = shift + torch.randn(60, 1, generator=generator)  # shared by the samples of a prompt
            ours = prompt + 0.5 * torch.randn(60, 4, generator=generator)
            theirs = 0.5 * torch.randn(60, 4, generator=generator)
            outcomes = outcomes_of_scores(ours, theirs)
            lengths = torch.rand(2, 60, 4, generator=generator)
            results = win_rate(outcomes), length_controlled_win_rate(outcomes, lengths[0], lengths[1])
            covered += torch.tensor([result.low <= truth <= result.high for result in results])
        assert ((covered / 400 >= 0.92) & (covered / 400 <= 0.98)).all()


def test_length_control_takes_out_what_length_does():
    """Outcomes drawn from the model that is fitted: theta comes back, and the plain win rate is far from it."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = 5 + 10 * torch.rand(2000, 2, generator=generator), 10 * torch.rand(2000, 2, generator=generator)
    difference = ours[:, :, None] - theirs[:, None, :]
    slope = torch.tanh(difference / difference.std(correction=0))
    outcomes = (torch.rand(2000, 2, 2, generator=generator) < torch.sigmoid(0.3 + 2 * slope)).float()
    controlled = length_controlled_win_rate(outcomes, ours, theirs)
    assert controlled.low <= torch.sigmoid(torch.tensor(0.3)) <= controlled.high < win_rate(outcomes).low


def test_length_control_is_a_logistic_regression():
    """Beside an independent optimizer, on prompts with different numbers of known outcomes."""
    generator = torch.Generator().manual_seed(2)
    ours, theirs = torch.rand(30, 2, generator=generator) * 9, torch.rand(30, 3, generator=generator) * 9
    outcomes = (torch.rand(30, 2, 3, generator=generator) < 0.7).float()
    outcomes[:5, 0] = math.nan
    known = ~outcomes.isnan()
    difference = ours[:, :, None] - theirs[:, None, :]
    x = torch.tanh(difference / difference[known].std(correction=0))[known].double()
    weight = (1 / known.sum(dim=(1, 2), keepdim=True)).expand_as(outcomes)[known].double()
    theta, phi = torch.zeros(2, dtype=torch.float64).split(1)
    optimizer = torch.optim.LBFGS(
        [theta.requires_grad_(), phi.requires_grad_()], max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        nll = torch.nn.functional.binary_cross_entropy_with_logits(
            theta + phi * x, outcomes[known].double(), weight=weight, reduction="sum"
        )
        nll.backward()
        return nll

    optimizer.step(loss)
    result = length_controlled_win_rate(outcomes, ours, theirs)
    assert result.mean == pytest.approx(torch.sigmoid(theta).item(), abs=1e-4)
    assert result.mean != pytest.approx(win_rate(outcomes).mean, abs=1e-4)


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_where_all_is_won_the_interval_is_no_point(won):
    outcomes, lengths = torch.full((20, 2, 2), won), torch.rand(2, 20, 2, generator=torch.Generator().manual_seed(0))
    for result in (win_rate(outcomes), length_controlled_win_rate(outcomes, *lengths)):
        assert result.mean == pytest.approx(won, abs=1e-3)
        assert 0.03 < result.high - result.low < 0.3 and result.low <= result.mean <= result.high


def test_equal_lengths_change_nothing():
    outcomes = (torch.rand(40, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.8).float()
    plain, controlled = win_rate(outcomes), length_controlled_win_rate(outcomes, torch.ones(40, 2), torch.ones(40, 2))
    assert controlled.mean == pytest.approx(plain.mean, abs=1e-4)
    assert (controlled.low, controlled.high) == (pytest.approx(plain.low), pytest.approx(plain.high))


def test_messages():
    with pytest.raises(ValueError, match=r"for the same P prompts, got \(3, 1\) and \(2, 1\)"):
        outcomes_of_scores(torch.zeros(3, 1), torch.zeros(2, 1))
    for function in (win_rate, lambda outcomes: length_controlled_win_rate(outcomes, *torch.zeros(2, 2, 1))):
        with pytest.raises(ValueError, match="nothing was scored or compared"):
            function(torch.full((2, 1, 1), math.nan))


def test_the_half_widths_in_the_docs():
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (0\.\d+) \|$", text, flags=re.MULTILINE)
    assert len(rows) == 5
    for prompts, half_width in rows:
        outcomes = (torch.arange(int(prompts)) % 2).double().view(-1, 1, 1)
        result = win_rate(outcomes)
        assert f"{(result.high - result.low) / 2:.3f}" == half_width
