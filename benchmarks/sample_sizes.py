"""How wide is the interval of a win rate, by numbers of prompts and of samples? From two real files of completions.

    trl-sppo quickstart                          # once: the policies
    trl-sppo eval --model_name_or_path quickstart/run --opponent_name_or_path quickstart/policy \
        --dataset_name quickstart/prompts --reward_funcs trl_sppo.quickstart.scores.vader \
        --reward_model_name_or_path quickstart/reward_model --max_completion_length 40 --num_generations 8
    python benchmarks/sample_sizes.py eval/model.parquet eval/opponent.parquet

Prompts and samples are drawn from the files at random, 200 times for each size.
"""

import argparse
import statistics

import torch

from trl_sppo.evaluation.play import aligned
from trl_sppo.evaluation.policies import load_completions
from trl_sppo.evaluation.statistics import outcomes_of_scores, win_rate
from trl_sppo.rows import to_tensor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("opponent")
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    groups, opponents = aligned(load_completions(args.model), load_completions(args.opponent))
    torch.manual_seed(0)
    for judge in groups[0]["scores"]:
        outcomes = outcomes_of_scores(
            *(to_tensor([group["scores"][judge] for group in side]) for side in (groups, opponents))
        )
        num_prompts, size, _ = outcomes.shape
        print(f"\n{judge}: {win_rate(outcomes)} with all {num_prompts} prompts and {size} samples")
        sizes = [s for s in (1, 2, 4, 8, 16) if s <= size]
        print("| prompts | " + " | ".join(f"{s} sample{'s' * (s > 1)}" for s in sizes) + " |")
        print("|---|" + "---|" * len(sizes))
        for prompts in (16, 32, 64, 128, 256):
            if prompts <= num_prompts:
                widths = [half_width(outcomes, prompts, samples, args.repeats) for samples in sizes]
                print(f"| {prompts} | " + " | ".join(f"{width:.3f}" for width in widths) + " |")


def half_width(outcomes: torch.Tensor, prompts: int, samples: int, repeats: int) -> float:
    """Mean half width of the interval over random choices of prompts and of both sides' samples."""
    widths = []
    for _ in range(repeats):
        rows = torch.randperm(outcomes.size(0))[:prompts]
        ours, theirs = (torch.randperm(size)[:samples] for size in outcomes.shape[1:])
        rate = win_rate(outcomes[rows][:, ours][:, :, theirs])
        widths.append((rate.high - rate.low) / 2)
    return statistics.mean(widths)


if __name__ == "__main__":
    main()
