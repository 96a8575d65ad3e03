"""Preferences from scores or an oracle's verdicts, and win rates from preferences. Pure torch."""

from collections.abc import Sequence
from typing import Literal

import torch


Comparison = Literal["hard", "bradley_terry"]


def _check_scores(scores: torch.Tensor, comparison: str, temperature: float) -> None:
    if scores.ndim != 2 or not scores.is_floating_point():
        found = f"{scores.dtype} of shape {tuple(scores.shape)}"
        raise ValueError(f"scores must be floating point (unscorable is NaN), of shape (groups, K), got {found}.")
    if comparison not in ("hard", "bradley_terry"):
        raise ValueError(f"comparison must be 'hard' or 'bradley_terry', got {comparison!r}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")


def preferences_from_scores(
    scores: torch.Tensor, comparison: Comparison = "hard", temperature: float = 1.0
) -> torch.Tensor:
    """
    Compare every two completions of a group by their scores.

        hard:           P[i, j] = 1 if s_i > s_j, 1/2 if s_i = s_j, 0 if s_i < s_j
        bradley_terry:  P[i, j] = sigmoid((s_i - s_j) / temperature)

    Args:
        scores (`torch.Tensor` of shape `(groups, K)`):
            Scores, on any real scale. NaN marks a completion that could not be scored.
        comparison (`str`, *optional*, defaults to `"hard"`):
            `"hard"` or `"bradley_terry"`.
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
    rows, columns = scores.unsqueeze(2), scores.unsqueeze(1)
    difference = torch.where(rows == columns, 0.0, rows - columns)  # inf - inf is NaN, but they tie
    if comparison == "hard":
        preferences = (torch.sign(difference) + 1) / 2
        return preferences.masked_fill(difference.isnan(), torch.nan)  # sign(NaN) is 0, a tie
    return torch.sigmoid(difference / temperature)


def sum_of_scores(scores: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """
    Combine the scores of several reward sources before they are compared, for sources on one scale.

        s_i = sum_k w_k s_ki        over the sources k that scored any completion of the group

    `scores` have shape `(sources, groups, K)`, NaN where a source could not score; a source of weight 0 takes no part.
    The sums have shape `(groups, K)`, NaN for a completion that lacks one of those k scores.

    Example:

    ```python
    >>> import torch
    >>> sum_of_scores(torch.tensor([[[1.0, 2.0, torch.nan]], [[30.0, 10.0, 20.0]]]), weights=[1.0, 0.1])
    tensor([[4., 3., nan]])

    ```
    """
    factors = scores.new_tensor(weights).view(-1, 1, 1)
    weighted = scores * factors
    absent = scores.isnan().all(dim=2, keepdim=True) | (factors == 0)
    return weighted.masked_fill(absent, 0.0).sum(dim=0).masked_fill(absent.all(dim=0), torch.nan)


def preferences_from_answers(answers: torch.Tensor) -> torch.Tensor:
    """
    Preferences from a pairwise oracle's verdicts on ordered pairs. Averaging both orders cancels a preference for a
    position.

        P[i, j] = mean of  A[i, j]  and  1 - A[j, i]        without NaN

    Args:
        answers (`torch.Tensor` of shape `(groups, K, K)`):
            `A[g, i, j]` is the oracle's probability in [0, 1] that completion i beats completion j, when i was shown
            first. NaN where it gave no verdict. The diagonal does not matter.

    Returns:
        `torch.Tensor` of shape `(groups, K, K)`: preferences as in [`preferences_from_scores`], which may be
        intransitive. NaN where neither order has a verdict.

    Example:

    ```python
    >>> import torch
    >>> nan = torch.nan
    >>> preferences_from_answers(torch.tensor([[[nan, 0.9, nan], [0.3, nan, 0.2], [nan, nan, nan]]]))
    tensor([[[0.5000, 0.8000,    nan],
             [0.2000, 0.5000, 0.2000],
             [   nan, 0.8000, 0.5000]]])

    ```
    """
    preferences = torch.stack([answers, 1 - answers.mT]).nanmean(dim=0)
    diagonal = torch.eye(answers.size(1), dtype=torch.bool, device=answers.device)
    return preferences.masked_fill(diagonal, 0.5)


def mean_preferences(preferences: Sequence[torch.Tensor], weights: Sequence[float] | None = None) -> torch.Tensor:
    """
    Combine the preferences of several oracles: a weighted vote, for which their scores need no common scale.

        P[i, j] = sum_k w_k P_k[i, j] / sum_k w_k        over the oracles k that could compare i and j

    `preferences` are one matrix of shape `(groups, K, K)` per oracle, NaN where that oracle could not compare. The
    result is NaN where none could. `weights` are not negative, and equal by default.

    Raises `ValueError` if the numbers of matrices and weights differ, or a weight is negative, or all are zero.
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

    Args:
        preferences (`torch.Tensor` of shape `(groups, K, K)`):
            Preference matrix, else `ValueError`. NaN where two completions could not be compared.
        include_self (`bool`, *optional*, defaults to `False`):
            Whether a completion's tie with itself (the diagonal, 1/2) counts, as in the paper's estimator and its
            code. It pulls win rates towards 1/2 by a factor (K - 1) / K, which is a rescale of eta.

    Returns:
        `torch.Tensor` of shape `(groups, K)`: win rates in [0, 1], with a mean of 1/2 if all were compared. NaN where
        a completion could be compared with no other one.

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
    rates = wins / comparisons  # 0 / 0 is NaN: compared with no other one
    # A sum of thirds is not exact, but a win rate of 1/2 must have no target (see `select_completions`)
    return torch.where((rates - 0.5).abs() < 1e-6, 0.5, rates)


def mean_win_rates(
    preferences: Sequence[torch.Tensor], weights: Sequence[float], include_self: bool = False
) -> torch.Tensor:
    """
    Win rates of a panel whose oracles have compared different pairs, each a random part of them.

        W_i = sum_k w_k W_ki / sum_k w_k        over the oracles k that could compare i with any other one

    If each opponent of completion i is equally likely to be chosen, the mean over the chosen ones has the win rate
    over all of them as its expectation, for each oracle, and so the sum. An average of preferences pair by pair would
    give an oracle that has compared all pairs too much weight. Arguments and result as in [`mean_preferences`] and
    [`win_rates`]; for complete preferences it equals `win_rates(mean_preferences(preferences, weights))`.
    """
    rates = torch.stack([win_rates(each, include_self) for each in preferences])
    votes = rates.new_tensor(list(weights)).view(-1, 1, 1) * ~rates.isnan()
    mean = (votes * rates.nan_to_num(nan=0.0)).sum(dim=0) / votes.sum(dim=0)  # 0 / 0 is NaN
    return torch.where((mean - 0.5).abs() < 1e-6, 0.5, mean)


def win_rates_from_scores(
    scores: torch.Tensor, comparison: Comparison = "hard", temperature: float = 1.0, include_self: bool = False
) -> torch.Tensor:
    """
    Win rates straight from scores: equal to `win_rates(preferences_from_scores(scores, ...), include_self)`.

    Hard comparisons need no matrix: after sorting, a completion beats those before its run of equal scores, so memory
    grows with K instead of K squared.

        W_i = (#{j: s_j < s_i} + 1/2 #{j != i: s_j = s_i}) / (n - 1)        n scorable completions

    Arguments, result and errors as in [`preferences_from_scores`] and [`win_rates`].
    """
    _check_scores(scores, comparison, temperature)
    if comparison == "bradley_terry":
        return win_rates(preferences_from_scores(scores, comparison, temperature), include_self)
    num_scorable = (~scores.isnan()).sum(dim=1, keepdim=True)
    # Unscorable completions sort behind everything, so that no finite score counts them; `minimum` does that for +inf
    ordered, _ = torch.sort(scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), dim=1)
    below = torch.searchsorted(ordered, scores.contiguous(), side="left")
    up_to = torch.searchsorted(ordered, scores.contiguous(), side="right").minimum(num_scorable)
    wins = below + 0.5 * (up_to - below - 1)
    comparisons = num_scorable - 1
    if include_self:
        wins, comparisons = wins + 0.5, comparisons + 1
    rates = wins.to(scores.dtype) / comparisons
    return rates.masked_fill(scores.isnan() | (num_scorable < 2), torch.nan)
