"""Win rates between two policies, with intervals."""

from dataclasses import dataclass
from statistics import NormalDist

import torch


# Precision of a normal prior on the coefficients of the length-controlled win rate. It keeps them finite where one
# policy, or the longer completion, always wins, and otherwise has the weight of a thousandth of a prompt
RIDGE = 1e-3


@dataclass(frozen=True)
class WinRate:
    """A policy's win rate against an opponent: the estimate, its confidence interval, and the number of prompts."""

    mean: float
    low: float
    high: float
    num_prompts: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def outcomes_of_scores(scores: torch.Tensor, opponent_scores: torch.Tensor) -> torch.Tensor:
    """
    Outcomes of each completion of a policy against each one of its opponent, for the same prompt.

        outcome[p, i, j] = [s_pi > o_pj] + 1/2 [s_pi = o_pj]

    Args:
        scores (`torch.Tensor` of shape `(P, S)`):
            Scores of S completions of each of P prompts, NaN where unscorable.
        opponent_scores (`torch.Tensor` of shape `(P, S')`):
            Scores of the opponent's completions of the same prompts.

    Returns:
        `torch.Tensor` of shape `(P, S, S')`: 1 for a win, 1/2 for a tie, 0 for a loss, NaN where there is no score.

    Raises:
        `ValueError`: if the numbers of prompts differ.
    """
    if scores.ndim != 2 or opponent_scores.ndim != 2 or len(scores) != len(opponent_scores):
        raise ValueError(
            "scores and opponent_scores must have shapes (P, S) and (P, S') for the same P prompts, got "
            f"{tuple(scores.shape)} and {tuple(opponent_scores.shape)}."
        )
    # sign(NaN) is 0
    ours, theirs = scores[:, :, None], opponent_scores[:, None, :]
    return ((torch.sign(ours - theirs) + 1) / 2).masked_fill(ours.isnan() | theirs.isnan(), torch.nan)


def win_rate(outcomes: torch.Tensor, confidence: float = 0.95) -> WinRate:
    """
    A policy's win rate against an opponent.

        w_p = mean over pairs (i, j) of outcome[p, i, j],   win rate = mean over p of w_p
        interval = sigmoid(logit(m) +- z se),   m = (sum of w + 1/2) / (P + 1)

    Prompts are independent of each other, samples of one prompt are not. So the standard error of logit(m) is the
    sandwich estimate over the P prompts. Log-odds keep the interval inside [0, 1]. Half an added win and half an added
    loss keep it finite (Haldane, Anscombe), and wider than a point if everything is won.

    Args:
        outcomes (`torch.Tensor` of shape `(P, S, S')`):
            P(sample i of the policy beats sample j of its opponent) for each prompt: of a judge, or from scores by
            [`outcomes_of_scores`]. NaN where unknown; prompts without any outcome are left out.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval.

    Raises:
        `ValueError`: if nothing is known of any prompt.

    Example:

    ```python
    >>> import torch
    >>> print(win_rate(torch.tensor([[[1.0]], [[1.0]], [[0.5]]])))
    0.833 [0.351, 0.943]

    ```
    """
    per_prompt = outcomes.double().nanmean(dim=(1, 2))
    per_prompt = per_prompt[~per_prompt.isnan()]
    if len(per_prompt) == 0:
        raise ValueError("no prompt has an outcome: nothing was scored or compared.")
    # A logistic regression without a slope
    ones = torch.ones(len(per_prompt), dtype=torch.float64)
    features = torch.stack([ones, torch.zeros_like(ones)], dim=1)
    low, high = _interval(features, per_prompt, ones, torch.arange(len(per_prompt)), confidence)
    return _result(per_prompt.mean().item(), low, high, len(per_prompt))


def length_controlled_win_rate(
    outcomes: torch.Tensor, lengths: torch.Tensor, opponent_lengths: torch.Tensor, confidence: float = 0.95
) -> WinRate:
    """
    Win rate at equal length of the completions, as in AlpacaEval 2
    (https://huggingface.co/papers/2404.04475, without its term for the difficulty of each prompt).

        P(i beats j) = sigmoid(theta + phi tanh((length_i - length_j) / std)),   win rate = sigmoid(theta)

    fitted by logistic regression with equal weight for each prompt. The interval is computed as in [`win_rate`], on
    the scale of theta, with half a win and half a loss added at equal length.

    Args:
        outcomes (`torch.Tensor` of shape `(P, S, S')`):
            As for [`win_rate`].
        lengths (`torch.Tensor` of shape `(P, S)`), opponent_lengths (`torch.Tensor` of shape `(P, S')`):
            Lengths of the completions, in any unit.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval.

    Raises:
        `ValueError`: if nothing is known of any prompt.
    """
    known = ~outcomes.isnan()
    counts = known.sum(dim=(1, 2))
    if not counts.any():
        raise ValueError("no prompt has an outcome: nothing was scored or compared.")
    difference = (lengths[:, :, None] - opponent_lengths[:, None, :]).double()
    scale = difference[known].std(correction=0)
    slope = torch.tanh(difference / scale) if scale > 0 else torch.zeros_like(difference)
    prompt, *_ = places = known.nonzero(as_tuple=True)
    won, weight = outcomes[places].double(), (1 / counts[prompt]).double()
    features = torch.stack([torch.ones_like(won), slope[places]], dim=1)
    theta = _logistic_regression(features, won, weight)[0]
    low, high = _interval(features, won, weight, prompt.unique(return_inverse=True)[1], confidence)
    return _result(torch.sigmoid(theta).item(), low, high, int((counts > 0).sum()))


def _result(mean: float, low: float, high: float, num_prompts: int) -> WinRate:
    """A win rate whose interval contains the estimate even if everything is won, or lost."""
    return WinRate(mean, min(low, mean), max(high, mean), num_prompts)


def _interval(
    features: torch.Tensor, won: torch.Tensor, weight: torch.Tensor, prompt: torch.Tensor, confidence: float
) -> tuple[float, float]:
    """The interval of sigmoid(theta), by the sandwich estimate of its variance over prompts."""
    # Half an added win and half an added loss, at equal length
    features = torch.cat([features, torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)])
    won = torch.cat([won, torch.tensor([1.0, 0.0], dtype=torch.float64)])
    weight = torch.cat([weight, torch.tensor([0.5, 0.5], dtype=torch.float64)])
    prompt = torch.cat([prompt, prompt.max() + torch.tensor([1, 2])])
    coefficients = _logistic_regression(features, won, weight)
    p = torch.sigmoid(features @ coefficients)
    gradients = torch.zeros(int(prompt.max()) + 1, 2, dtype=torch.float64)
    gradients.index_add_(0, prompt, features * (weight * (won - p)).unsqueeze(1))
    inverse = torch.linalg.inv(_hessian(features, p, weight))
    variance = (inverse @ (gradients.T @ gradients) @ inverse)[0, 0] * len(gradients) / (len(gradients) - 1)
    margin = NormalDist().inv_cdf((1 + confidence) / 2) * variance.sqrt()
    return torch.sigmoid(coefficients[0] - margin).item(), torch.sigmoid(coefficients[0] + margin).item()


def _hessian(features: torch.Tensor, p: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return features.T @ (features * (weight * p * (1 - p)).unsqueeze(1)) + RIDGE * torch.eye(2, dtype=torch.float64)


def _logistic_regression(features: torch.Tensor, won: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The coefficients, by Newton's method with steps of at most 1, which cannot overshoot far."""
    coefficients = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):
        p = torch.sigmoid(features @ coefficients)
        gradient = features.T @ (weight * (won - p)) - RIDGE * coefficients
        step = torch.linalg.solve(_hessian(features, p, weight), gradient)
        coefficients += step / step.norm().clamp(min=1)
        if step.norm() < 1e-9:
            break
    return coefficients
