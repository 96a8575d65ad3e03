import math
from statistics import NormalDist

import pytest
import torch

from trl_sppo.evaluation import policy_win_rate, sample_completions


def test_golden():
    # prompt 1: 2 beats 1 and 3 does not, so 1/2; prompt 2: both win; prompt 3: a tie and a loss -> 1/4
    ours = torch.tensor([[2.0], [5.0], [1.0]])
    theirs = torch.tensor([[1.0, 3.0], [0.0, 4.0], [1.0, 2.0]])
    result = policy_win_rate(ours, theirs)
    rates = [0.5, 1.0, 0.25]
    mean = sum(rates) / 3
    variance = sum((rate - mean) ** 2 for rate in rates) / 2
    margin = NormalDist().inv_cdf(0.975) * math.sqrt(variance / 3)
    assert result.mean == pytest.approx(mean)
    assert (result.low, result.high) == pytest.approx((mean - margin, min(mean + margin, 1)))
    assert result.num_prompts == 3


def test_the_opponents_win_rate_is_the_rest():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randint(0, 5, (2, 40, 3), generator=generator).float()
    forward, backward = policy_win_rate(ours, theirs), policy_win_rate(theirs, ours)
    assert forward.mean + backward.mean == pytest.approx(1)
    assert forward.low + backward.high == pytest.approx(1)


def test_the_interval_covers():
    """Of 95 % intervals over prompts with several dependent samples, some 95 % hold the truth."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        prompt = torch.randn(60, 1, generator=generator)  # shared by the samples of a prompt
        ours = prompt + 0.5 * torch.randn(60, 4, generator=generator)
        theirs = 0.5 * torch.randn(60, 4, generator=generator)
        result = policy_win_rate(ours, theirs)
        covered += result.low <= 0.5 <= result.high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(2, 1), r"for the same two or more prompts, got \(3, 1\) and \(2, 1\)"),
        (torch.zeros(1, 4), torch.zeros(1, 4), "two or more prompts"),
        (torch.full((2, 1), math.nan), torch.zeros(2, 1), "scores must not be NaN"),
    ],
)
def test_messages(ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        policy_win_rate(ours, theirs)


def test_sample_completions(tiny_model, tiny_tokenizer):
    prompts = [[{"role": "user", "content": text}] for text in ("ab", "fgh ij", "k")]

    def sample(**options):
        return sample_completions(
            tiny_model, tiny_tokenizer, prompts, num_samples=2, max_completion_length=5, temperature=1.0, **options
        )

    completions = sample(seed=0)
    assert [len(samples) for samples in completions] == [2, 2, 2]
    assert all(0 < len(text) <= 5 for samples in completions for text in samples)
    assert completions == sample(seed=0) and completions != sample(seed=1)
