"""From the scores of a group of completions to preferences, and from preferences to win rates. Pure torch."""

from collections.abc import Sequence
from typing import Literal

import torch


Comparison = Literal["hard", "bradley_terry"]


def _check_scores(scores: torch.Tensor, comparison: str, temperature: float) -> None:
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape (groups, K), got {tuple(scores.shape)}.")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point (an unscorable completion is NaN), got {scores.dtype}.")
    if comparison not in ("hard", "bradley_terry"):
        raise ValueError(f"comparison must be 'hard' or 'bradley_terry', got {comparison!r}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: it divides the difference of two scores.")


def preferences_from_scores(
    scores: torch.Tensor, comparison: Comparison = "hard", temperature: float = 1.0
) -> torch.Tensor:
    """
    Compare every two completions of a group by their scores.

        hard:           P[i, j] = 1 if s_i > s_j, 1/2 if s_i = s_j, 0 if s_i < s_j
        bradley_terry:  P[i, j] = sigmoid((s_i - s_j) / temperature)

    Args:
        scores (`torch.Tensor` of shape `(groups, K)`):
            Score of each completion, on any real scale. NaN marks a completion that could not be scored.
        comparison (`str`, *optional*, defaults to `"hard"`):
            `"hard"` uses only the order of the scores, `"bradley_terry"` also their distance.
        temperature (`float`, *optional*, defaults to `1.0`):
            Bradley-Terry temperature, in units of the score. Unused by `"hard"`.

    Returns:
        `torch.Tensor` of shape `(groups, K, K)`: `P[g, i, j]` is the probability in [0, 1] that completion i beats
        completion j, so `P + P.mT == 1`. The diagonal is 1/2. Rows and columns of NaN scores are NaN.

    Raises:
        `ValueError`: if `scores` is not a floating-point matrix, or an option is out of range.

    Example:

    ```python
    >>> import torch
    >>> preferences_from_scores(torch.tensor([[3.0, 1.0, 1.0]]))
    tensor([[[0.5000, 1.0000, 1.0000],
             [0.0000, 0.5000, 0.5000],
             [0.0000, 0.5000, 0.5000]]])

    ```
    """
    _check_scores(scores, comparison, temperature)
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)
    # inf - inf is NaN, but two equal scores are a tie
    equal = scores.unsqueeze(2) == scores.unsqueeze(1)
    difference = torch.where(equal, 0.0, difference)
    if comparison == "hard":
        preferences = (torch.sign(difference) + 1) / 2
        return preferences.masked_fill(difference.isnan(), torch.nan)  # sign(NaN) is 0, a tie
    return torch.sigmoid(difference / temperature)


def mean_preferences(preferences: Sequence[torch.Tensor], weights: Sequence[float] | None = None) -> torch.Tensor:
    """
    Combine the preferences of several oracles: a weighted vote, for which their scores need no common scale.

        P[i, j] = sum_k w_k P_k[i, j] / sum_k w_k        over the oracles k that could compare i and j

    Args:
        preferences (sequence of `torch.Tensor` of shape `(groups, K, K)`):
            One preference matrix per oracle. NaN where that oracle could not compare.
        weights (sequence of `float`, *optional*):
            Weight of each oracle, not negative. Equal weights by default.

    Returns:
        `torch.Tensor` of shape `(groups, K, K)`: the mean preferences, NaN where no oracle could compare.

    Raises:
        `ValueError`: if the numbers of matrices and weights differ, or a weight is negative, or all are zero.
    """
    weights = [1.0] * len(preferences) if weights is None else list(weights)
    if len(weights) != len(preferences):
        raise ValueError(f"weights must have one entry per oracle ({len(preferences)}), got {len(weights)}.")
    if min(weights) < 0 or sum(weights) == 0:
        raise ValueError(f"weights must not be negative nor all zero, got {weights}: they are the oracles' votes.")
    total, votes = torch.zeros_like(preferences[0]), torch.zeros_like(preferences[0])
    for matrix, weight in zip(preferences, weights, strict=True):
        total += weight * matrix.nan_to_num(nan=0.0)
        votes += weight * (~matrix.isnan())
    return total / votes  # 0 / 0 is NaN: no oracle could compare


def win_rates(preferences: torch.Tensor, include_self: bool = False) -> torch.Tensor:
    """
    Mean probability of a completion to beat the others of its group: P(y > pi_t | x) estimated from K samples
    (https://huggingface.co/papers/2405.00675, below Eq. 4.5).

        W_i = mean over j of P[i, j],  j != i unless `include_self`

    Without self-comparison win rates span [0, 1]. With it (the paper's estimator and its code) they are pulled towards
    1/2 by a factor (K - 1) / K, which is a rescale of eta.

    Args:
        preferences (`torch.Tensor` of shape `(groups, K, K)`):
            Preference matrix. NaN where two completions could not be compared.
        include_self (`bool`, *optional*, defaults to `False`):
            Whether a completion's tie with itself (the diagonal, 1/2) counts.

    Returns:
        `torch.Tensor` of shape `(groups, K)`: win rates in [0, 1], whose mean over a fully compared group is 1/2. NaN
        where a completion could be compared with no other one.

    Raises:
        `ValueError`: if `preferences` is not a batch of square matrices.

    Example:

    ```python
    >>> import torch
    >>> win_rates(preferences_from_scores(torch.tensor([[3.0, 1.0, 1.0]])))
    tensor([[1.0000, 0.2500, 0.2500]])

    ```
    """
    if preferences.ndim != 3 or preferences.size(1) != preferences.size(2):
        raise ValueError(f"preferences must have shape (groups, K, K), got {tuple(preferences.shape)}.")
    diagonal = torch.eye(preferences.size(1), dtype=torch.bool, device=preferences.device)
    others = preferences.masked_fill(diagonal, torch.nan)
    wins = others.nansum(dim=2)
    comparisons = (~others.isnan()).sum(dim=2)
    if include_self:
        wins, comparisons = wins + 0.5 * (comparisons > 0), comparisons + (comparisons > 0)
    return wins / comparisons  # 0 / 0 is NaN: compared with no other one


def win_rates_from_scores(
    scores: torch.Tensor, comparison: Comparison = "hard", temperature: float = 1.0, include_self: bool = False
) -> torch.Tensor:
    """
    Win rates straight from scores: equal to `win_rates(preferences_from_scores(scores, ...), include_self)`.

    Hard comparisons need no matrix: after sorting, a completion beats those before its run of equal scores, so memory
    grows with K instead of K squared.

        W_i = (#{j: s_j < s_i} + 1/2 #{j != i: s_j = s_i}) / (n - 1)        n scorable completions

    Args:
        scores (`torch.Tensor` of shape `(groups, K)`):
            Score of each completion. NaN marks a completion that could not be scored.
        comparison, temperature:
            As in [`preferences_from_scores`].
        include_self (`bool`, *optional*, defaults to `False`):
            As in [`win_rates`].

    Returns:
        `torch.Tensor` of shape `(groups, K)`: win rates in [0, 1], NaN where nothing could be compared.

    Raises:
        `ValueError`: as in [`preferences_from_scores`].

    Example:

    ```python
    >>> import torch
    >>> win_rates_from_scores(torch.tensor([[3.0, 1.0, torch.nan, 1.0]]))
    tensor([[1.0000, 0.2500,    nan, 0.2500]])

    ```
    """
    _check_scores(scores, comparison, temperature)
    if comparison == "bradley_terry":
        return win_rates(preferences_from_scores(scores, comparison, temperature), include_self)
    below, tied, num_scorable = _rank(scores)
    wins = below + 0.5 * tied
    comparisons = num_scorable - 1
    if include_self:
        wins, comparisons = wins + 0.5, comparisons + 1
    rates = wins.to(scores.dtype) / comparisons
    return rates.masked_fill(scores.isnan() | (num_scorable < 2), torch.nan)


def share_of_ties(scores: torch.Tensor) -> torch.Tensor:
    """
    Share of the pairs of a group whose scores are equal.

    Args:
        scores (`torch.Tensor` of shape `(groups, K)`):
            Score of each completion. NaN marks a completion that could not be scored.

    Returns:
        `torch.Tensor` of shape `(groups,)`: in [0, 1], NaN for a group with fewer than two scorable completions.

    Example:

    ```python
    >>> import torch
    >>> share_of_ties(torch.tensor([[3.0, 1.0, 1.0]]))
    tensor([0.3333])

    ```
    """
    _, tied, num_scorable = _rank(scores)
    num_scorable = num_scorable.squeeze(1)
    tied_pairs = tied.masked_fill(scores.isnan(), 0).sum(dim=1)
    shares = tied_pairs.to(scores.dtype) / (num_scorable * (num_scorable - 1))
    return shares.masked_fill(num_scorable < 2, torch.nan)


def win_rate_spread(win_rates: torch.Tensor) -> torch.Tensor:
    """
    How far apart the win rates of a group are: their standard deviation, the mean over groups.

    Args:
        win_rates (`torch.Tensor` of shape `(groups, K)`):
            Win rates in [0, 1], NaN where unscorable (left out).

    Returns:
        Scalar `torch.Tensor`, at most 1/2. NaN if nothing is scorable.
    """
    centred = win_rates - win_rates.nanmean(dim=1, keepdim=True)
    return centred.square().nanmean(dim=1).sqrt().nanmean()


def _rank(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each score: how many of its group are lower, how many others are equal; and how many are scorable at all."""
    num_scorable = (~scores.isnan()).sum(dim=1, keepdim=True)
    # Unscorable completions sort behind everything, so that no finite score counts them; `minimum` does that for +inf
    ordered, _ = torch.sort(scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), dim=1)
    below = torch.searchsorted(ordered, scores.contiguous(), side="left")
    up_to = torch.searchsorted(ordered, scores.contiguous(), side="right").minimum(num_scorable)
    return below, up_to - below - 1, num_scorable
