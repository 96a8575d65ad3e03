"""When does a continuous win rate teach more than a binary one? Games whose exact answers are known.

    python benchmarks/signal_games.py              # half an hour; draws docs/signal.png

A policy over 20 actions is a softmax of 20 logits. Each iteration samples 128 completions in groups of K, and an
oracle gives one verdict per pair of a group. What differs is the signal that the policy learns from:

    continuous      win rates of all completions of a group
    binary          1 above 1/2, 0 below (`sppo_hard`), of all
    best and worst  the same for the best and the worst alone: also the first gradient of DPO on that pair
    DPO             DPO's loss on that pair

In *fitted* iterations the logit of each sampled action moves by eta times its mean target: the regression's minimum,
and the update that the theory is about. In iterations of *two gradient steps* the same loss is not minimised, as with
language models. Updates are written out here, for thousands of games at once, and the trainer plays some of them too:
the policies must be the same. Games are transitive (Bradley-Terry) or cyclic (each pair at random). With noise q, a
verdict is a fair coin in a share q of the comparisons.
"""

import argparse
import logging
import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from game import play, random_game, random_policy


ACTIONS, PER_STEP, ETA = 20, 128, 10.0
ITERATIONS, STEPS = 100, 2  # STEPS is the number of gradient steps per iteration
GROUPS = (2, 4, 8, 16)
NOISES = (0.0, 0.5, 0.9)
KINDS = ("transitive", "cyclic")
SIGNALS = ("continuous", "binary", "best and worst", "DPO")
# Of fitted iterations it is eta, of gradient steps the learning rate of gradient descent
GRIDS = {"fitted": [2.0**n for n in range(-3, 5)], "two steps": [2.0**n for n in range(-5, 3)]}


def make_games(kind: str, number: int, seed: int) -> torch.Tensor:
    """Preferences of shape `(number, ACTIONS, ACTIONS)`."""
    if kind == "cyclic":
        return torch.stack([random_game(ACTIONS, seed + i) for i in range(number)])
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(number, ACTIONS, generator=generator, dtype=torch.float64)
    return torch.sigmoid(scores.unsqueeze(2) - scores.unsqueeze(1))


def verdicts_of(
    games: torch.Tensor, actions: torch.Tensor, noise: float, generator: torch.Generator | None
) -> torch.Tensor:
    """
    One verdict per pair of a group, of shape `(R, G, K, K)`, for actions of shape `(R, G, K)`. Equal actions tie.
    Without a generator, the probabilities themselves.
    """
    first, second = actions.unsqueeze(3), actions.unsqueeze(2)
    chances = games[torch.arange(len(games)).view(-1, 1, 1, 1), first, second]
    if generator is not None:
        chances = (1 - noise) * chances + noise / 2
        drawn = (torch.rand(chances.shape, generator=generator) < chances).double().triu(1)
        chances = drawn + (1 - drawn.transpose(2, 3)).tril(-1)
    return torch.where(first == second, 0.5, chances)


def targets_of(verdicts: torch.Tensor, signal: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-ratios to regress to, in units of eta, and what is trained on: both of shape `(R, G, K)`."""
    size = verdicts.size(3)
    win_rates = (verdicts.sum(dim=3) - 0.5) / (size - 1)  # without the tie with itself
    kept = (win_rates.amax(dim=2, keepdim=True) > win_rates.amin(dim=2, keepdim=True)).expand_as(win_rates)
    if signal in ("best and worst", "DPO"):
        ends = torch.stack([win_rates.argmax(dim=2), win_rates.argmin(dim=2)], dim=2)
        kept = kept & torch.zeros_like(kept).scatter(2, ends, True)
    targets = win_rates - 0.5 if signal == "continuous" else (win_rates - 0.5).sign() / 2
    return torch.where(kept, targets, 0.0), kept


def gradient(
    logits: torch.Tensor,
    old: torch.Tensor,
    actions: torch.Tensor,
    targets: torch.Tensor,
    kept: torch.Tensor,
    dpo: bool,
) -> torch.Tensor:
    """Of the loss with respect to logits of shape `(R, ACTIONS)`; `old` are those that sampled."""
    moved = logits.log_softmax(1) - old.log_softmax(1)
    ratios = moved.gather(1, actions.flatten(1)).view_as(targets)
    if dpo:  # - log sigmoid((log-ratio of the best - log-ratio of the worst) / eta), a pair per group
        margins = (2 * targets * ratios * kept).sum(dim=2, keepdim=True)
        each = -torch.sigmoid(-margins / ETA) / ETA * 2 * targets * kept
        each = each * ETA**2  # the scale of the squared loss, for one grid of learning rates
    else:  # (log-ratio - eta target)^2
        each = 2 * (ratios - ETA * targets) * kept
    each = (each / kept.sum(dim=(1, 2), keepdim=True).clamp(min=1)).flatten(1)
    at_actions = torch.zeros_like(logits).scatter_add(1, actions.flatten(1), each)
    return at_actions - logits.softmax(1) * each.sum(dim=1, keepdim=True)


def exact_gradient(games: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What `gradient` estimates for the continuous signal, at `logits` = `old`: infinitely many completions."""
    policy = logits.softmax(1)
    targets = (games @ policy.unsqueeze(2)).squeeze(2) - 0.5
    return -2 * ETA * policy * (targets - (policy * targets).sum(dim=1, keepdim=True))


def sample(logits: torch.Tensor, size: int, generator: torch.Generator, number: int = PER_STEP) -> torch.Tensor:
    return logits.softmax(1).multinomial(number, replacement=True, generator=generator).view(len(logits), -1, size)


def fit(logits: torch.Tensor, actions: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The mean target of each sampled action, in units of eta, and 0 for the others."""
    sums, counts = (
        torch.zeros_like(logits).scatter_add(1, actions.flatten(1), each.flatten(1).double())
        for each in (targets, kept)
    )
    return sums / counts.clamp(min=1)


def train(
    way: str, games: torch.Tensor, start: torch.Tensor, signal: str, size: int, noise: float, rate: float, seed: int
) -> torch.Tensor:
    """Duality gaps of the last and of the mean policy after each iteration, of shape `(2, ITERATIONS + 1, R)`."""
    generator = torch.Generator().manual_seed(seed)
    logits, total, gaps = start.log(), torch.zeros_like(start), []
    for iteration in range(ITERATIONS + 1):
        policy = logits.softmax(1)
        total = total + policy
        pair = torch.stack([policy, total / (iteration + 1)])
        gaps.append(2 * (games @ pair.unsqueeze(3)).squeeze(3).amax(dim=2) - 1)
        old, actions = logits, sample(logits, size, generator)
        targets, kept = targets_of(verdicts_of(games, actions, noise, generator), signal)
        if way == "fitted":
            logits = logits + rate * fit(logits, actions, targets, kept)
        else:
            for _ in range(STEPS):
                logits = logits - rate * gradient(logits, old, actions, targets, kept, signal == "DPO")
    return torch.stack(gaps, dim=1)


# Tables


@dataclass
class Numbers:
    """Independent values, with a normal 95 % interval for their mean."""

    values: torch.Tensor

    def __str__(self) -> str:
        return f"{self.values.mean():.3f} ± {1.96 * self.values.std() / len(self.values) ** 0.5:.3f}"


Found = dict[tuple[str, int], tuple[float, torch.Tensor]]


def play_all(way: str, kind: str, noise: float, number: int) -> Found:
    """For each signal and K, the gaps over time in `number` games, at the best learning rate of other games."""
    which = 0 if kind == "transitive" else 1  # the last policy, or, where that circles, the mean
    (games, start), sweep = (
        (make_games(kind, n, seed), policies(n, seed)) for n, seed in ((number, 0), (number // 2, 9000))
    )
    found = {}
    for size in GROUPS:
        for signal in SIGNALS if way == "two steps" else SIGNALS[:3]:
            ends = {rate: train(way, *sweep, signal, size, noise, rate, 1)[which, -1].mean() for rate in GRIDS[way]}
            rate = min(ends, key=lambda rate: ends[rate])
            if rate in (GRIDS[way][0], GRIDS[way][-1]):
                print(f"({signal}, K = {size}: the best learning rate is at the end of the grid)")
            found[signal, size] = rate, train(way, games, start, signal, size, noise, rate, 2)[which]
    return found


def policies(number: int, seed: int) -> torch.Tensor:
    return torch.stack([random_policy(ACTIONS, seed + i) for i in range(number)])


def show(way: str, kind: str, noise: float, found: Found) -> None:
    signals = list(dict.fromkeys(signal for signal, _ in found))
    first = found[signals[0], GROUPS[0]][1][0].mean()
    print(
        f"\n{way}, {kind}, noise {noise:g}: duality gap, from {first:.3f}, after {ITERATIONS * PER_STEP} completions,"
    )
    print(
        "what the others have more than the continuous signal, and the share of completions after which it was there"
    )
    print("| K | " + " | ".join(signals) + " |\n|" + "---|" * (len(signals) + 1))
    for size in GROUPS:
        ours = found["continuous", size][1]
        cells = [f"{Numbers(ours[-1])} (rate {found['continuous', size][0]:g})"]
        for signal in signals[1:]:
            rate, gaps = found[signal, size]
            reached = (ours.mean(dim=1) <= gaps[-1].mean()).nonzero()
            share = f"{reached[0].item() / ITERATIONS:.2f}" if len(reached) else "never"
            cells.append(f"{gaps[-1].mean():.3f}: {Numbers(gaps[-1] - ours[-1])}, {share} (rate {rate:g})")
        print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


def gradients(kind: str, noise: float, number: int) -> None:
    """Print cosines with the exact gradient, and the continuous one's variance beside Hoeffding's formula."""
    games = make_games(kind, number, 5000)
    logits = torch.stack([random_policy(ACTIONS, i) for i in range(number)]).log()
    exact = exact_gradient(games, logits)
    generator = torch.Generator().manual_seed(0)
    print(f"\n{kind}, noise {noise:g}: mean cosine with the exact gradient of one step of {PER_STEP} completions")
    print("| K | " + " | ".join(SIGNALS[:3]) + " | variance, measured / theory |\n|" + "---|" * 5)
    # The noise makes the mean gradient smaller, without turning it
    shrunk = (1 - noise) * exact
    for size in GROUPS:
        draws: dict[str, list[torch.Tensor]] = {signal: [] for signal in SIGNALS[:3]}
        for _ in range(50):
            actions = sample(logits, size, generator)
            verdicts = verdicts_of(games, actions, noise, generator)
            for signal, estimates in draws.items():
                targets, kept = targets_of(verdicts, signal)
                kept = torch.ones_like(kept) if signal == "continuous" else kept  # the mean over all: a U-statistic
                estimates.append(gradient(logits, logits, actions, targets, kept, False))
        cosines = {
            signal: torch.cosine_similarity(torch.stack(estimates), exact.unsqueeze(0), dim=2).mean(dim=0)
            for signal, estimates in draws.items()
        }
        measured = (torch.stack(draws["continuous"]) - shrunk).square().sum(dim=2).mean(dim=0)
        ratio = measured / variance(games, logits.softmax(1), noise, size)
        print(
            f"| {size} | " + " | ".join(str(Numbers(c)) for c in cosines.values()) + f" | {Numbers(ratio)} |",
            flush=True,
        )


def gate(spread: float, noise: float, number: int, size: int = 8) -> None:
    """
    Print what S-SPPO's gate (arXiv 2606.01561) would do: preferences of similar completions are shrunk towards 1/2.
    Five kinds of completions have four variants each, whose scores differ by `spread` times a normal number.
    """
    generator = torch.Generator().manual_seed(1)
    kinds, variants = (torch.randn(number, n, generator=generator, dtype=torch.float64) for n in (5, ACTIONS))
    scores = 2 * kinds.repeat_interleave(ACTIONS // 5, dim=1) + spread * variants
    games = torch.sigmoid(scores.unsqueeze(2) - scores.unsqueeze(1))
    kind = torch.arange(ACTIONS) // (ACTIONS // 5)
    logits = policies(number, 0).log()
    found: dict[float, list[torch.Tensor]] = {0.0: [], 0.5: [], 1.0: []}
    for _ in range(50):
        actions = sample(logits, size, generator)
        verdicts = verdicts_of(games, actions, noise, generator) - 0.5
        similar = (kind[actions].unsqueeze(3) == kind[actions].unsqueeze(2)).double()
        for shrunk, cosines in found.items():
            targets, _ = targets_of(0.5 + (1 - shrunk * similar) * verdicts, "continuous")
            estimate = gradient(logits, logits, actions, targets, torch.ones_like(targets, dtype=torch.bool), False)
            cosines.append(torch.cosine_similarity(estimate, exact_gradient(games, logits), dim=1))
    cells = [f"{shrunk:g}: {Numbers(torch.stack(cosines).mean(dim=0))}" for shrunk, cosines in found.items()]
    print(
        f"variants differ by {spread:g}, noise {noise:g}, cosine by how much is shrunk: {', '.join(cells)}", flush=True
    )


def variance(games: torch.Tensor, policy: torch.Tensor, noise: float, size: int) -> torch.Tensor:
    """
    Of the continuous gradient of `PER_STEP` completions, summed over the logits. In a group it is a U-statistic of
    h(a, b) = (V_ab - 1/2) (e_a - e_b) / 2, times 2 eta, so with zeta_1 = Var E[h | a] and zeta_2 = Var h (Hoeffding,
    1948, 5.13):

        Var = (2 eta)^2 (K / N) 2 / (K (K - 1)) ( 2 (K - 2) zeta_1 + zeta_2 )
    """
    mean_verdicts = (1 - noise) * (games - 0.5)  # E[V] - 1/2, 0 on the diagonal
    identity = torch.eye(ACTIONS, dtype=games.dtype)
    # E[h | a] = (e_a c_a - pi * P_a) / 2 with c_a = sum_b pi_b P_ab
    given = (identity * (mean_verdicts @ policy.unsqueeze(2)) - mean_verdicts * policy.unsqueeze(1)) / 2
    mean = (policy.unsqueeze(2) * given).sum(dim=1, keepdim=True)
    zeta_1 = (policy * (given - mean).square().sum(dim=2)).sum(dim=1)
    # |h|^2 = (1/2)^2 |e_a - e_b|^2 / 4, which is 2 / 16 for different actions
    squares = (1 - policy.square().sum(dim=1)) / 8
    zeta_2 = squares - mean.square().sum(dim=(1, 2))
    of_group = 2 / (size * (size - 1)) * (2 * (size - 2) * zeta_1 + zeta_2)
    return (2 * ETA) ** 2 * size / PER_STEP * of_group


# The trainer


def distance_to_trainer(way: str, signal: str, iterations: int = 5, size: int = 8) -> float:
    """The largest total variation between the trainer's policies and those of the same updates of the same samples."""
    game, start = random_game(ACTIONS, 0), random_policy(ACTIONS, 0)
    rollouts: list[torch.Tensor] = []

    def sampler(policy: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
        rollouts.append(policy.multinomial(number, replacement=True, generator=generator))
        return rollouts[-1]

    options: dict[str, Any] = {} if signal == "continuous" else {"loss_type": "sppo_hard"}
    if signal == "best and worst":
        options["train_on"] = "best_and_worst"
    rate, eta = 0.25, ETA
    if way == "fitted":
        rate = eta = 0.5
        options |= {"eta": eta, "steps": 200, "learning_rate": 0.02}
    else:
        options |= {"eta": eta, "steps": STEPS, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": rate}
    policies, trainer, _ = play(
        game, start, iterations, group_size=PER_STEP, sampler=sampler, num_generations=size, **options
    )
    # The table's only weights are those of its LM head, whose gradient is that of the logits times the hidden state
    hidden = cast(Any, trainer.model).model(torch.tensor([[0]])).last_hidden_state[0, -1]
    apart = 0.0
    for actions, before, after in zip(rollouts, policies, policies[1:], strict=False):
        logits, actions = before.log().unsqueeze(0), actions.view(1, -1, size)
        old = logits
        targets, kept = targets_of(verdicts_of(game.unsqueeze(0), actions, 0.0, None), signal)
        if way == "fitted":
            logits = logits + eta * fit(logits, actions, targets, kept)
        else:
            for _ in range(STEPS):
                each = gradient(logits, old, actions, targets, kept, False)
                logits = logits - rate * hidden.square().sum() * each
        apart = max(apart, 0.5 * (logits.softmax(1)[0] - after).abs().sum().item())
    return apart


def draw(results: dict[tuple[str, float], Found], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(NOISES), 7), layout="constrained")
    axes = figure.subplots(len(KINDS), len(NOISES), sharey="row")
    completions = torch.arange(ITERATIONS + 1) * PER_STEP
    for row, kind in zip(axes, KINDS, strict=True):
        for axis, noise in zip(row, NOISES, strict=True):
            for i, signal in enumerate(SIGNALS[:3]):
                for size, style in ((4, ":"), (16, "-")):
                    curve = results[kind, noise][signal, size][1].mean(dim=1)
                    axis.plot(completions, curve, style, color=f"C{i}", label=f"{signal}, K = {size}")
            pairs = results[kind, noise]["continuous", 2][1].mean(dim=1)
            axis.plot(completions, pairs, color="black", linewidth=1, label="all three, K = 2")
            axis.set(title=f"{kind}, noise {noise:g}", xlabel="completions", yscale="log")
        row[0].set_ylabel("duality gap of the " + ("last policy" if kind == "transitive" else "mean policy"))
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--games", type=int, default=400, help="Per kind, and half as many for the sweep.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "signal.png")
    args = parser.parse_args()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # `rollout_func`
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # the tensors are small
    for way in GRIDS:
        for signal in SIGNALS[:3]:
            apart = distance_to_trainer(way, signal)
            print(f"{way}, {signal}: total variation to the trainer's policies at most {apart:.1e}", flush=True)
    for kind in KINDS:
        for noise in NOISES:
            gradients(kind, noise, args.games)
    for spread, noise in product((0.0, 0.5, 2.0), NOISES):
        gate(spread, noise, args.games)
    results: dict[tuple[str, str, float], Found] = {}
    for way, kind, noise in product(GRIDS, KINDS, NOISES):
        found = results[way, kind, noise] = play_all(way, kind, noise, args.games)
        show(way, kind, noise, found)
    draw({(kind, noise): results["fitted", kind, noise] for kind in KINDS for noise in NOISES}, args.output)


if __name__ == "__main__":
    main()
