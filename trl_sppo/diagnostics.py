"""
What the preferences of a rollout say about the oracles behind them, at no extra forward pass. Pure torch.

Preferences are matrices of shape `(groups, K, K)`, win rates and lengths have shape `(groups, K)`. NaN marks what
could not be compared, and is left out. Each function returns a scalar `torch.Tensor`, NaN if nothing is left.
"""

from collections.abc import Sequence

import torch


def share_of_ties(preferences: torch.Tensor) -> torch.Tensor:
    """
    Share of the compared pairs that are even, P = 1/2.

    Example:

    ```python
    >>> import torch
    >>> share_of_ties(torch.tensor([[[0.5, 0.9, 0.5], [0.1, 0.5, 1.0], [0.5, 0.0, 0.5]]]))  # one pair of three
    tensor(0.3333)

    ```
    """
    return ((_pairs(preferences) - 0.5).abs() < 1e-6).float().mean()


def share_saturated(preferences: torch.Tensor, certainty: float = 0.95) -> torch.Tensor:
    """
    Share of the compared pairs about which there is next to no doubt: P above `certainty`, which is in [0.5, 1], or
    below 1 - `certainty`. Hard comparisons saturate wherever they do not tie.
    """
    return ((_pairs(preferences) - 0.5).abs() > certainty - 0.5).float().mean()


def share_intransitive(preferences: torch.Tensor) -> torch.Tensor:
    """
    Share of the triads of completions that beat each other in a circle: P[i, j], P[j, k] and P[k, i] all above 1/2,
    of those whose three pairs were all compared. Scores cannot do that, a vote of several oracles or a pairwise oracle
    can. A quarter would be pure chance.

        number of circular triads = trace(A^3) / 3        A[i, j] = [P[i, j] > 1/2]

    Example:

    ```python
    >>> import torch
    >>> share_intransitive(torch.tensor([[[0.5, 0.9, 0.2], [0.1, 0.5, 0.6], [0.8, 0.4, 0.5]]]))
    tensor(1.)

    ```
    """
    diagonal = torch.eye(preferences.size(1), dtype=torch.bool, device=preferences.device)
    # Counts of more than some 200 completions do not fit into float32's integers
    beats = ((preferences > 0.5 + 1e-6) & ~diagonal).double()
    compared = (~preferences.isnan() & ~diagonal).double()
    circles = (beats @ beats * beats.mT).sum() / 3
    triads = (compared @ compared * compared.mT).sum() / 6
    return (circles / triads).float()


def panel_disagreement(preferences: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    How far the oracles of a panel are apart: mean |P_a[i, j] - P_b[i, j]|, in [0, 1], over the pairs of completions
    and the pairs of oracles that both compared them. `preferences` has one matrix per oracle; NaN with fewer than two.
    With hard comparisons and no ties it is the share of pairs on which two oracles disagree: 1/2 is pure chance.
    """
    if len(preferences) < 2:
        return torch.tensor(torch.nan)
    panel = torch.stack([_pairs(matrix, drop=False) for matrix in preferences])
    first, second = torch.combinations(torch.arange(len(panel), device=panel.device)).T
    return (panel[first] - panel[second]).abs().nanmean()


def order_disagreement(answers: torch.Tensor) -> torch.Tensor:
    """
    How much a pairwise oracle's answer depends on which completion it is shown first: mean |A[i, j] + A[j, i] - 1|, in
    [0, 1], over the pairs that were answered in both orders. `A[g, i, j]` is the probability that i beats j when i is
    shown first. An oracle that always favours the first place has 1.
    """
    return _pairs((answers + answers.mT - 1).abs()).mean()


def length_correlation(win_rates: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    Pearson correlation of win rate and length within the groups: both are centred on their group's mean. NaN if all
    win rates or all lengths of each group are equal.
    """
    lengths = lengths.to(win_rates.dtype).masked_fill(win_rates.isnan(), torch.nan)
    x = (win_rates - win_rates.nanmean(dim=1, keepdim=True)).flatten()
    y = (lengths - lengths.nanmean(dim=1, keepdim=True)).flatten()
    return (x * y).nansum() / (x.square().nansum() * y.square().nansum()).sqrt()


def share_of_duplicates(fingerprints: torch.Tensor) -> torch.Tensor:
    """
    Share of the completions that equal another one of their group. `fingerprints`, of shape `(groups, K)`, are any
    numbers that are equal for equal completions.
    """
    equal = fingerprints.unsqueeze(2) == fingerprints.unsqueeze(1)
    return (equal.sum(dim=2) > 1).float().mean()


def win_rate_spread(win_rates: torch.Tensor) -> torch.Tensor:
    """How far apart the win rates of a group are: their standard deviation, at most 1/2, the mean over groups."""
    centred = win_rates - win_rates.nanmean(dim=1, keepdim=True)
    return centred.square().nanmean(dim=1).sqrt().nanmean()


def _pairs(matrices: torch.Tensor, drop: bool = True) -> torch.Tensor:
    """The entries above the diagonal, without those that are NaN if `drop`."""
    k = matrices.size(-1)
    row, column = torch.triu_indices(k, k, offset=1, device=matrices.device)
    entries = matrices[..., row, column]
    return entries[~entries.isnan()] if drop else entries
