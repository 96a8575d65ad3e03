"""
Diagnostics of oracles from the preferences of a rollout, without a forward pass. Pure torch.

Preferences have shape `(groups, K, K)`, win rates and lengths `(groups, K)`. NaN marks missing comparisons and is
ignored. Each function returns a scalar `torch.Tensor`, NaN if nothing is left.
"""

from collections.abc import Sequence

import torch


def share_of_ties(preferences: torch.Tensor) -> torch.Tensor:
    """
    Share of the compared pairs that tie, P = 1/2.

    Example:

    ```python
    >>> import torch
    >>> share_of_ties(torch.tensor([[[0.5, 0.9, 0.5], [0.1, 0.5, 1.0], [0.5, 0.0, 0.5]]]))  # one pair of three
    tensor(0.3333)

    ```
    """
    return ((_pairs(preferences) - 0.5).abs() < 1e-6).float().mean()


def share_saturated(preferences: torch.Tensor, certainty: float = 0.95) -> torch.Tensor:
    """Share of the compared pairs with P above `certainty`, which is in [0.5, 1], or below 1 - `certainty`."""
    return ((_pairs(preferences) - 0.5).abs() > certainty - 0.5).float().mean()


def share_intransitive(preferences: torch.Tensor) -> torch.Tensor:
    """
    Share of triads of completions that beat each other in a circle: P[i, j], P[j, k] and P[k, i] all above 1/2. Only
    triads with three compared pairs count. Scores form no circles; pairwise oracles and votes may. Chance gives 1/4.

        number of circular triads = trace(A^3) / 3        A[i, j] = [P[i, j] > 1/2]

    Example:

    ```python
    >>> import torch
    >>> share_intransitive(torch.tensor([[[0.5, 0.9, 0.2], [0.1, 0.5, 0.6], [0.8, 0.4, 0.5]]]))
    tensor(1.)

    ```
    """
    diagonal = torch.eye(preferences.size(1), dtype=torch.bool, device=preferences.device)
    # In float32, counts are exact only up to some 200 completions
    beats = ((preferences > 0.5 + 1e-6) & ~diagonal).double()
    compared = (~preferences.isnan() & ~diagonal).double()
    circles = (beats @ beats * beats.mT).sum() / 3
    triads = (compared @ compared * compared.mT).sum() / 6
    return (circles / triads).float()


def panel_disagreement(preferences: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Disagreement inside a panel: mean |P_a[i, j] - P_b[i, j]|, in [0, 1], over pairs of completions and the pairs of
    oracles that compared them. `preferences` has one matrix per oracle; the result is NaN with fewer than two. For
    hard comparisons without ties it is the share of pairs on which two oracles disagree, 1/2 by chance.
    """
    if len(preferences) < 2:
        return torch.tensor(torch.nan)
    panel = torch.stack([_pairs(matrix, drop=False) for matrix in preferences])
    first, second = torch.combinations(torch.arange(len(panel), device=panel.device)).T
    return (panel[first] - panel[second]).abs().nanmean()


def agreement(preferences: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Agreement of the oracles of a panel: the share of pairs that two of them order alike, among those that both order,
    1/2 by chance. `preferences` has one matrix per oracle. The result has shape `(oracles, oracles)`, NaN where there
    is nothing to compare.

    Example:

    ```python
    >>> import torch
    >>> first = torch.tensor([[[0.5, 0.9, 0.8], [0.1, 0.5, 0.6], [0.2, 0.4, 0.5]]])
    >>> second = torch.tensor([[[0.5, 1.0, 0.0], [0.0, 0.5, 0.5], [1.0, 0.5, 0.5]]])  # alike, not alike, tied
    >>> agreement([first, second])
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])

    ```
    """
    orders = torch.stack([(_pairs(matrix, drop=False) - 0.5) for matrix in preferences]).flatten(1)
    orders = orders.masked_fill(orders.isnan() | (orders.abs() < 1e-6), 0.0).sign()
    return (orders @ orders.T / (orders.abs() @ orders.abs().T) + 1) / 2  # 0 / 0 is NaN


def order_disagreement(answers: torch.Tensor) -> torch.Tensor:
    """
    Dependence of a pairwise oracle on the order: mean |A[i, j] + A[j, i] - 1|, in [0, 1], over pairs compared in both
    orders. `A[g, i, j]` is the probability that i beats j when i is shown first. Always favouring the first gives 1.
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
    """Share of the completions that equal another of their group, by `(groups, K)` numbers equal for equal ones."""
    equal = fingerprints.unsqueeze(2) == fingerprints.unsqueeze(1)
    return (equal.sum(dim=2) > 1).float().mean()


def win_rate_spread(win_rates: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the win rates of a group, at most 1/2, as a mean over groups."""
    centred = win_rates - win_rates.nanmean(dim=1, keepdim=True)
    return centred.square().nanmean(dim=1).sqrt().nanmean()


def _pairs(matrices: torch.Tensor, drop: bool = True) -> torch.Tensor:
    """The entries above the diagonal, without NaN if `drop`."""
    k = matrices.size(-1)
    row, column = torch.triu_indices(k, k, offset=1, device=matrices.device)
    entries = matrices[..., row, column]
    return entries[~entries.isnan()] if drop else entries
