"""SPPO's regression: targets, selection of completions, and the loss. Pure torch."""

from typing import Literal

import torch


TrainOn = Literal["all", "best_and_worst"]

# A win rate this close to the threshold is on it: a vote of three oracles is a sum of thirds, which float32 rounds
ROUNDING = 1e-6


def sppo_targets(win_rates: torch.Tensor, eta: float, baseline: torch.Tensor | float = 0.5) -> torch.Tensor:
    """
    The log-ratio that SPPO regresses to, log pi_{t+1}(y|x) / pi_t(y|x), in nats
    (https://huggingface.co/papers/2405.00675, Eq. 4.3).

        target = eta W - log Z = eta (W - b)        b = log Z / eta, which the paper sets to 1/2 (Eq. 4.7)

    Args:
        win_rates (`torch.Tensor` of any shape):
            Win rates W in [0, 1]. NaN gives a target of NaN.
        eta (`float`):
            Learning rate of the multiplicative-weights update. The official code's `beta` is 1 / eta.
        baseline (`float`, or `torch.Tensor` that broadcasts to `win_rates`, *optional*, defaults to `0.5`):
            The paper's constant, or [`log_mean_exp_baseline`].
    """
    return eta * (win_rates - baseline)


def log_mean_exp_baseline(win_rates: torch.Tensor, eta: float) -> torch.Tensor:
    """
    The group's own estimate of log Z / eta (https://huggingface.co/papers/2405.00675, below Eq. 4.5).

        b = 1/eta log( mean_j exp(eta W_j) )

    `win_rates` have shape `(groups, K)`, NaN where unscorable (left out). The result, of shape `(groups, 1)`, is
    between the mean win rate (small `eta`) and the highest one, NaN for a group without any.

    Example:

    ```python
    >>> import torch
    >>> log_mean_exp_baseline(torch.tensor([[1.0, 0.0]]), eta=2.0)  # log((e^2 + 1) / 2) / 2
    tensor([[0.7169]])

    ```
    """
    scorable = ~win_rates.isnan()
    exponents = (eta * win_rates).masked_fill(~scorable, -torch.inf)
    log_z = exponents.logsumexp(dim=1, keepdim=True) - scorable.sum(dim=1, keepdim=True).to(exponents.dtype).log()
    return log_z / eta


def head_to_head(preferences: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """
    Win rates of shape `(groups, K)` among the chosen completions only. For best and worst: the probability that one
    beats the other (`sppo_single` of the official code). NaN if a completion is not chosen or has no opponent.

        W_i = mean over the other chosen j of P[i, j]        P of shape (groups, K, K)

    Example:

    ```python
    >>> import torch
    >>> preferences = torch.tensor([[[0.5, 0.6, 0.9], [0.4, 0.5, 0.7], [0.1, 0.3, 0.5]]])
    >>> head_to_head(preferences, torch.tensor([[True, False, True]]))
    tensor([[0.9000,    nan, 0.1000]])

    ```
    """
    diagonal = torch.eye(preferences.size(1), dtype=torch.bool, device=preferences.device)
    meets = chosen.unsqueeze(1) & chosen.unsqueeze(2) & ~diagonal
    return preferences.masked_fill(~meets, torch.nan).nanmean(dim=2)


def select_completions(
    win_rates: torch.Tensor, train_on: TrainOn = "all", threshold: float | None = None
) -> torch.Tensor:
    """
    Select the completions to train on, as a bool tensor. Groups without two different win rates have none.

    Args:
        win_rates (`torch.Tensor` of shape `(groups, K)`):
            Win rates in [0, 1]. NaN is never chosen.
        train_on (`str`, *optional*, defaults to `"all"`):
            `"all"`, or `"best_and_worst"` for the completion with the highest and the one with the lowest win rate
            (the paper's experiments, Section 5; the first one where several tie).
        threshold (`float`, *optional*):
            In [0.5, 1]. Leaves only completions with W >= threshold or W <= 1 - threshold.

    Example:

    ```python
    >>> import torch
    >>> select_completions(torch.tensor([[1.0, 0.5, 0.5, 0.0], [0.5, 0.5, 0.5, 0.5]]), threshold=0.6)
    tensor([[ True, False, False,  True],
            [False, False, False, False]])

    ```
    """
    scorable = ~win_rates.isnan()
    best, best_index = win_rates.masked_fill(~scorable, -torch.inf).max(dim=1, keepdim=True)
    worst, worst_index = win_rates.masked_fill(~scorable, torch.inf).min(dim=1, keepdim=True)
    chosen = scorable & (best > worst)
    if train_on == "best_and_worst":
        chosen &= torch.zeros_like(chosen).scatter(1, torch.cat([best_index, worst_index], dim=1), True)
    if threshold is not None:
        chosen &= (win_rates >= threshold - ROUNDING) | (win_rates <= 1 - threshold + ROUNDING)
    return chosen


def sppo_loss(
    log_ratios: torch.Tensor,
    win_rates: torch.Tensor,
    eta: float,
    baseline: torch.Tensor | float = 0.5,
    weights: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    SPPO's loss (https://huggingface.co/papers/2405.00675, Eq. 4.7), a mean over completions:

        L = mean_i w_i ( log pi_theta(y_i|x) / pi_t(y_i|x) - eta (W_i - b_i) )^2

    Args:
        log_ratios (`torch.Tensor` of shape `(N,)`):
            log pi_theta(y|x) / pi_t(y|x) of each completion, summed over its tokens, in nats.
        win_rates (`torch.Tensor` of shape `(N,)`):
            Win rate of each completion in its group, in [0, 1]. A NaN win rate carries no weight and no gradient.
        eta, baseline:
            As in [`sppo_targets`]. `eta` is positive.
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weight of each completion, for example an importance ratio. Each still counts as one in the mean.
        num_items (`float`, *optional*):
            Divisor of the sum. By default the number of completions with a win rate; for a micro-batch, pass the
            number in the whole batch.

    Returns:
        `tuple` of the scalar loss and a `dict` of detached metrics of shape `(2,)`, numerator and denominator, to be
        added up over micro-batches before dividing: the mean log-ratio in nats (`log_ratio`), that of targets above
        and below 0 (`winner_log_ratio`, `loser_log_ratio`), and the sum of log-ratio times target over the sum of
        squared targets, which is 0 at the start and 1 at the minimum (`log_ratio_to_target`).

    Raises:
        `ValueError`: if `eta` is not positive, or the shapes differ.

    Example:

    ```python
    >>> import torch
    >>> loss, metrics = sppo_loss(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), eta=4.0)
    >>> loss  # ((1 - 2)^2 + (0 + 2)^2) / 2
    tensor(2.5000)
    >>> metrics["log_ratio_to_target"]  # 1 * 2 + 0 * -2 and 2^2 + 2^2
    tensor([2., 8.])

    ```
    """
    _check_eta(eta)
    if log_ratios.shape != win_rates.shape or log_ratios.ndim != 1:
        shapes = f"{tuple(log_ratios.shape)} and {tuple(win_rates.shape)}"
        raise ValueError(f"log_ratios and win_rates must have the same shape (N,), got {shapes}.")
    counted = ~win_rates.isnan()
    # Not multiplied by zero: NaN times zero is NaN, forward and backward.
    log_ratios = torch.where(counted, log_ratios, 0.0)
    targets = torch.where(counted, sppo_targets(win_rates, eta, baseline), 0.0).to(log_ratios.dtype)
    # (log-ratio - eta (W - b))^2
    per_completion_loss = (log_ratios - targets) ** 2
    if weights is not None:
        per_completion_loss = torch.where(counted, weights, 0.0) * per_completion_loss
    num_items = counted.sum().clamp(min=1) if num_items is None else num_items
    loss = per_completion_loss.sum() / num_items

    metrics = _log_ratio_metrics(log_ratios.detach(), targets, counted)
    metrics["log_ratio_to_target"] = torch.stack([(log_ratios.detach() * targets).sum(), targets.square().sum()])
    return loss, metrics


def inpo_loss(
    log_ratios: torch.Tensor,
    preferences: torch.Tensor,
    eta: float,
    ref_log_ratios: torch.Tensor | None = None,
    ref_share: float = 0.0,
    weights: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The squared loss on pairs of INPO (https://huggingface.co/papers/2407.00617), averaged over the partners j of each
    completion i, then over i:

        L = mean_i mean_j ( rho_i - rho_j - eta (P[i, j] - 1/2) )^2
        rho = log pi_theta - (1 - share) log pi_t - share log pi_0

    For a certain preference, eta (P - 1/2) is eta / 2, which the paper writes 1 / (2 eta). With a share of 1 this is
    IPO's loss (https://huggingface.co/papers/2310.12036, Eq. 17).

    Args:
        log_ratios (`torch.Tensor` of shape `(N,)`):
            log pi_theta(y|x) / pi_t(y|x) of each completion, summed over its tokens, in nats.
        preferences (`torch.Tensor` of shape `(N, N)`):
            P[i, j], in [0, 1], that completion i is preferred over j. NaN where two are not a pair.
        eta (`float`):
            As in [`sppo_targets`], positive.
        ref_log_ratios (`torch.Tensor` of shape `(N,)`, *optional*):
            log pi_t(y|x) / pi_0(y|x) of each completion, in nats.
        ref_share (`float`, *optional*, defaults to `0.0`):
            Share of the initial policy pi_0 in the reference, in [0, 1]: `eta * beta` of [`SPPOConfig`], and tau / eta
            in the paper.
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weight of each completion. A pair is weighted by the product of both.
        num_items (`float`, *optional*):
            Divisor of the sum over completions. By default the number of completions with a pair.

    Returns:
        `tuple` of the scalar loss and a `dict` of metrics, named as in [`sppo_loss`]. `log_ratio_to_target` is about
        differences of log-ratios in pairs. Winners are preferred to the average of their pairs.

    Raises:
        `ValueError`: if `eta` is not positive, or the shapes differ.

    Example:

    ```python
    >>> import torch
    >>> preferences = torch.tensor([[torch.nan, 1.0], [0.0, torch.nan]])
    >>> loss, _ = inpo_loss(torch.tensor([1.0, 0.0]), preferences, eta=4.0)
    >>> loss  # (1 - 0 - 4 / 2)^2
    tensor(1.)

    ```
    """
    _check_eta(eta)
    if log_ratios.ndim != 1 or preferences.shape != (len(log_ratios), len(log_ratios)):
        shapes = f"{tuple(log_ratios.shape)} and {tuple(preferences.shape)}"
        raise ValueError(f"log_ratios and preferences must have shapes (N,) and (N, N), got {shapes}.")
    pairs = ~preferences.isnan()
    paired = pairs.any(dim=1)

    def differences(values: torch.Tensor) -> torch.Tensor:
        return torch.where(pairs, values.unsqueeze(1) - values.unsqueeze(0), 0.0)

    log_ratios = torch.where(paired, log_ratios, 0.0)
    preferred = torch.where(pairs, eta * (preferences - 0.5), 0.0).to(log_ratios.dtype)
    # rho_i - rho_j = log-ratio_i - log-ratio_j + share (log pi_t/pi_0 of i - of j)
    targets = preferred
    if ref_log_ratios is not None:
        targets = preferred - ref_share * differences(torch.where(paired, ref_log_ratios, 0.0))
    per_pair_loss = (differences(log_ratios) - targets) ** 2
    if weights is not None:
        weights = torch.where(paired, weights, 0.0)
        per_pair_loss = per_pair_loss * weights.unsqueeze(1) * weights.unsqueeze(0)
    num_items = paired.sum().clamp(min=1) if num_items is None else num_items
    loss = (per_pair_loss.sum(dim=1) / pairs.sum(dim=1).clamp(min=1)).sum() / num_items

    log_ratios = log_ratios.detach()
    metrics = _log_ratio_metrics(log_ratios, preferred.sum(dim=1), paired)
    metrics["log_ratio_to_target"] = torch.stack([(differences(log_ratios) * targets).sum(), targets.square().sum()])
    return loss, metrics


def kl_to_initial_policy(
    logps: torch.Tensor, old_logps: torch.Tensor, ref_logps: torch.Tensor, forward_share: float = 0.0
) -> torch.Tensor:
    """
    Estimate the KL divergence between the policy and the initial one, from samples of pi_t: the regulariser of RSPO
    (https://huggingface.co/papers/2503.00030), which mixes both directions.

        reverse   KL(pi_theta || pi_0) = E_{pi_t} [ pi_theta/pi_t ( pi_0/pi_theta - 1 - log(pi_0/pi_theta) ) ]
        forward   KL(pi_0 || pi_theta) = E_{pi_t} [ pi_0/pi_t ( pi_theta/pi_0 - 1 - log(pi_theta/pi_0) ) ]

    Both are never negative. The ratios to pi_t correct values and gradients for the policy having moved since.
    `logps`, `old_logps` and `ref_logps` are log-probabilities of the samples under pi_theta, pi_t and pi_0. The result
    has one estimate per sample, in nats. `forward_share`, in [0, 1], is the weight of the forward direction.
    """
    reverse = _exp(logps - old_logps) * _k3(ref_logps - logps)
    forward = _exp(ref_logps - old_logps) * _k3(logps - ref_logps)
    return (1 - forward_share) * reverse + forward_share * forward


def kl_to_rollout_policy(log_ratios: torch.Tensor) -> torch.Tensor:
    """
    Estimates of KL(pi_t || pi_theta), one per sample of pi_t, from log r with r = pi_theta / pi_t: r - 1 - log r. They
    are in nats, never negative, and unbiased over all samples (http://joschu.net/blog/kl-approx.html).
    """
    return _k3(log_ratios)


def _check_eta(eta: float) -> None:
    if not eta > 0:
        raise ValueError(f"eta must be positive, got {eta}. The paper's beta = 1/eta = 0.001 is eta=1000.")


def _log_ratio_metrics(
    log_ratios: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor
) -> dict[str, torch.Tensor]:
    winners, losers = targets > 0, targets < 0
    return {
        "log_ratio": torch.stack([log_ratios.sum(), counted.sum()]),
        "winner_log_ratio": torch.stack([log_ratios[winners].sum(), winners.sum()]),
        "loser_log_ratio": torch.stack([log_ratios[losers].sum(), losers.sum()]),
    }


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    return _exp(log_ratio) - 1 - log_ratio


def _exp(x: torch.Tensor, largest: float = 20.0) -> torch.Tensor:
    """e^x, and its tangent above `largest`: finite and increasing where e^x would overflow."""
    return x.clamp(max=largest).exp() * (1 + (x - largest).clamp(min=0))
