"""Does the last policy come to the solution of the game? SPPO, INPO, and INPO with a reference that moves (COMAL).

    python benchmarks/last_iterate.py        # minutes; draws docs/last_iterate.png

SPPO's theorem is about the mean of its policies; people use the last. INPO (arXiv 2407.00617) adds a KL term towards
the initial policy to the game, whose solution its last policy approaches. COMAL (arXiv 2410.23223) makes that policy
the next reference, again and again: its last policy approaches the solution of the game itself. The trainer plays two
games, and the exact updates 100 random ones.
"""

import argparse
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from game import (
    GAME_SEED,
    ROCK_PAPER_SCISSORS,
    duality_gap,
    make_model,
    multiplicative_weights,
    play,
    random_game,
    random_policy,
    set_policy,
)


ETA, BETA, EVERY = 2.0, 0.1, 8  # of INPO. The reference moves after so many iterations
ETA_OF_SPPO = 0.5  # a larger one circles further out
FITS = 30  # optimizer steps per iteration
SHOWN = (0, 8, 16, 32, 64, 96)
WAYS = ("SPPO", "INPO", "INPO, moving reference")


def exact(way: str, preferences: torch.Tensor, start: torch.Tensor, iterations: int) -> list[float]:
    """Duality gaps of the last policy by the exact updates."""
    policy = reference = start
    gaps = [duality_gap(policy, preferences)]
    for iteration in range(1, iterations + 1):
        if way == "SPPO":
            policy = multiplicative_weights(policy, preferences, ETA_OF_SPPO)
        else:  # pi_t^(1 - eta beta) pi_0^(eta beta) exp(eta P(y > pi_t))
            anchor = (1 - ETA * BETA) * policy.log() + ETA * BETA * reference.log()
            policy = (anchor + ETA * preferences @ policy).softmax(0)
        if way == WAYS[2] and iteration % EVERY == 0:
            reference = policy
        gaps.append(duality_gap(policy, preferences))
    return gaps


def trained(way: str, preferences: torch.Tensor, start: torch.Tensor, iterations: int) -> list[float]:
    """The same by the trainer."""
    options: dict[str, Any] = {"steps": FITS, "logging_steps": FITS}
    with tempfile.TemporaryDirectory() as folder:
        if way == "SPPO":
            options |= {"eta": ETA_OF_SPPO, "baseline": "log_mean_exp"}
        else:
            initial = make_model(len(start))
            set_policy(initial, start)
            initial.save_pretrained(folder)  # the reference is loaded from there
            options |= {"model": folder, "loss_type": "inpo", "eta": ETA, "beta": BETA}
        if way == WAYS[2]:
            options |= {
                "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": EVERY * FITS,
            }  # fmt: skip
        policies, *_ = play(preferences, start, iterations, **options)
    return [duality_gap(policy, preferences) for policy in policies]


def draw(games: dict[str, dict[str, list[float]]], many: dict[str, torch.Tensor], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    *axes, last = figure.subplots(1, len(games) + 1, sharey=True)
    for axis, (name, gaps) in zip(axes, games.items(), strict=True):
        for way, values in gaps.items():
            axis.plot(values, label=way)
        axis.set(title=f"The trainer, {name}", xlabel="iteration", yscale="log", ylim=(1e-4, 1.1))
    for i, (way, curves) in enumerate(many.items()):
        low, median, high = curves.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=curves.dtype), dim=0)
        last.plot(median, color=f"C{i}", label=way)
        last.fill_between(range(len(median)), low.clamp(min=1e-4), high, color=f"C{i}", alpha=0.15, linewidth=0)
    last.set(title=f"Exact updates, {len(curves)} random games", xlabel="iteration")
    axes[0].set_ylabel("duality gap of the last policy")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=96)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "last_iterate.png")
    args = parser.parse_args()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # `rollout_func`
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    games = {
        "rock–paper–scissors": (ROCK_PAPER_SCISSORS, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)),
        "random 8-action game": (random_game(8, GAME_SEED), random_policy(8, GAME_SEED)),
    }
    found: dict[str, dict[str, list[float]]] = {}
    print("duality gap of the last policy after iterations" + "".join(f"{t:>8}" for t in SHOWN))
    for name, (preferences, start) in games.items():
        for way in WAYS:
            found.setdefault(name, {})[way] = gaps = trained(way, preferences, start, args.iterations)
            for who, values in (("trainer", gaps), ("exact", exact(way, preferences, start, args.iterations))):
                shown = "".join(f"{values[t]:>8.3f}" for t in SHOWN if t <= args.iterations)
                print(f"{f'{name}, {way}, {who}':<60}{shown}", flush=True)
    length = 4 * args.iterations
    many = {
        way: torch.tensor(
            [exact(way, random_game(8, seed), random_policy(8, seed), length) for seed in range(100)],
            dtype=torch.float64,
        )
        for way in WAYS
    }
    for way, curves in many.items():
        for t in (*SHOWN, length):
            low, median, high = curves[:, t].quantile(torch.tensor([0.1, 0.5, 0.9], dtype=curves.dtype)).tolist()
            print(f"100 random games, {way}, {t} iterations: median {median:.3f}, 10 to 90 % {low:.3f} to {high:.3f}")
    draw(found, many, args.output)


if __name__ == "__main__":
    main()
