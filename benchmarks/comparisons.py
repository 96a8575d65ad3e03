"""Win rates from fewer comparisons than all: their error against that of the whole matrix.

    python benchmarks/comparisons.py                                    # 20 seconds
    python benchmarks/comparisons.py --plot docs/comparisons.png        # also the picture

Random groups of K completions: transitive ones (Bradley-Terry, strengths of standard deviation 1) and cyclic ones
(each preference drawn by itself). A verdict is a coin with the probability of the preference, or that probability
itself. The error is the root mean square over completions of estimated minus true win rate; the bias is its mean over
groups, for completions in order of their true win rate, at most over places. `random` is this package's
`comparisons_per_group`; `swiss` is a tournament, in which completions with equal wins so far meet.
"""

import argparse
import math

import torch

from trl_sppo.oracles.asking import random_pairs
from trl_sppo.preferences import win_rates


def game(kind: str, k: int, draw: torch.Generator) -> torch.Tensor:
    """True preferences, `(K, K)`."""
    if kind == "transitive":
        strengths = torch.randn(k, generator=draw)
        return torch.sigmoid(strengths[:, None] - strengths)
    upper = torch.rand(k, k, generator=draw).triu(1)
    return upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(k)


def verdicts(truth: torch.Tensor, noisy: bool, draw: torch.Generator) -> torch.Tensor:
    if not noisy:
        return truth
    upper = (torch.rand(truth.shape, generator=draw) < truth).float().triu(1)
    return upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(len(truth))


def swiss(said: torch.Tensor, num_rounds: int, draw: torch.Generator) -> torch.Tensor:
    """The pairs of a tournament: in each round neighbours in the order of wins so far, if they have not met."""
    k = len(said)
    met, wins = torch.eye(k, dtype=torch.bool), torch.zeros(k)
    for _ in range(num_rounds):
        left = sorted(range(k), key=lambda i: (-wins[i].item(), torch.rand(1, generator=draw).item()))
        while left:
            i = left.pop(0)
            j = next((j for j in left if not met[i, j]), None)
            if j is not None:
                left.remove(j)
                met[i, j] = met[j, i] = True
                wins[i], wins[j] = wins[i] + said[i, j], wins[j] + said[j, i]
    return met & ~torch.eye(k, dtype=torch.bool)


def errors(kind: str, k: int, num_pairs: int, schedule: str, noisy: bool, groups: int) -> tuple[float, float]:
    """Root mean square error of win rates, and the largest bias of a place."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for group in range(groups):
        truth = game(kind, k, draw)
        said = verdicts(truth, noisy, draw)
        if schedule == "swiss":
            chosen = swiss(said, round(2 * num_pairs / k), draw)
        else:
            chosen = random_pairs(k, num_pairs, seed=group)
        estimate = win_rates(said.masked_fill(~chosen, torch.nan)[None])[0]
        true = win_rates(truth[None])[0]
        found.append((estimate - true)[true.argsort()])
    difference = torch.stack(found)
    return difference.square().nanmean().sqrt().item(), difference.nanmean(dim=0).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2000)
    parser.add_argument("--plot", help="file of the picture")
    args = parser.parse_args()
    k, most = args.group_size, math.comb(args.group_size, 2)
    rounds = range(1, k)
    rows: dict[tuple[str, bool, str], list[tuple[int, float, float]]] = {}
    print("| preferences | verdict | schedule | pairs of a group | error | largest bias |")
    print("|---|---|---|---|---|---|")
    for kind in ("transitive", "cyclic"):
        for noisy in (True, False):
            for schedule in ("random", "swiss"):
                for number in rounds:
                    num_pairs = min(number * k // 2, most)
                    error, bias = errors(kind, k, num_pairs, schedule, noisy, args.groups)
                    rows.setdefault((kind, noisy, schedule), []).append((num_pairs, error, bias))
                    said = "a coin" if noisy else "its probability"
                    print(f"| {kind} | {said} | {schedule} | {num_pairs} | {error:.3f} | {bias:.3f} |")
    if args.plot:
        plot(rows, args.plot)


def plot(rows: dict[tuple[str, bool, str], list[tuple[int, float, float]]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, layout="constrained")
    styles = {"random": "-", "swiss": ":"}
    for (kind, noisy, schedule), values in rows.items():
        if noisy:
            pairs, error, bias = zip(*values, strict=True)
            color = {"transitive": "C0", "cyclic": "C1"}[kind]
            for axis, column in zip(axes, (error, bias), strict=True):
                axis.plot(pairs, column, styles[schedule], color=color, label=f"{kind}, {schedule}", marker=".")
    axes[0].set(xlabel="pairs of a group that are compared", ylabel="error of win rates")
    axes[1].set(xlabel="pairs of a group that are compared", ylabel="largest bias of a place")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
