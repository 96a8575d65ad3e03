"""Time per token of the ways to sample with transformers, when completions end at different lengths.

    trl-sppo quickstart                                    # once: prepares ./quickstart, trains there
    python benchmarks/ended_rows.py

`generate` computes rows that have ended until the longest has, and by itself each prompt as often as it is sampled.
Beside the trainer's sampling, which computes it once: TRL's, the trainer's with the prompts sorted by length a quarter
at a time, and TRL's `use_transformers_continuous_batching`, which puts new prompts in the place of rows that ended.
Prompts are the quickstart's, with other plots before them: log-normal, median 2, sigma 1.2; or with `--short` as they
are. Times are CPU time of one thread.
"""

import argparse
import random
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from generation import make_trainer

import trl_sppo.trainer
from trl_sppo.quickstart.run import FOLDER


GROUP, PARTS = 8, 4


def make_prompts(folder: Path, number: int, short: bool) -> list[list[dict[str, str]]]:
    rng, rows = random.Random(0), load_dataset(str(folder / "prompts"), split="train")["prompt"]
    if short:
        return rows[:number]
    texts = [row[-1]["content"] for row in rows]
    return [
        [{"role": "user", "content": " ".join([*rng.sample(texts, min(int(rng.lognormvariate(0.7, 1.2)), 40)), text])}]
        for text in texts[:number]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192, help="At most, of each completion.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="Prompts as they are, of nearly equal length.")
    parser.add_argument("--continuous", action="store_true", help="Time continuous batching too, the slowest.")
    args = parser.parse_args()

    torch.set_num_threads(1)
    prompts = make_prompts(args.folder, args.prompts, args.short)
    options: dict[str, Any] = {
        "per_device_train_batch_size": args.prompts * GROUP, "max_completion_length": args.tokens,
        "temperature": 0.8, "use_cpu": True, "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    whole = make_trainer(args.folder, prompts, **options)
    shared: Any = trl_sppo.trainer.shared_prompts
    names = {
        "TRL's": (whole, 1, lambda model: nullcontext()),
        "prompts computed once": (whole, 1, shared),
        "prompts computed once, sorted, in quarters": (whole, PARTS, shared),
        "prompts computed each time, sorted, in quarters": (whole, PARTS, lambda model: nullcontext()),
    }
    if args.continuous:
        continuous = make_trainer(args.folder, prompts, use_transformers_continuous_batching=True, **options)
        names["continuous batching"] = (continuous, 1, shared)
    whole._generate_single_turn(whole._tokenize_prompts(prompts[:1])[0], None, {}, 1)  # warms up
    ms: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(args.rounds):
        order = list(names.items())
        for name, (trainer, parts, sharing) in order[seed % len(order) :] + order[: seed % len(order)]:
            torch.manual_seed(seed)
            trl_sppo.trainer.shared_prompts = sharing
            ids, _, fields = trainer._tokenize_prompts([prompt for prompt in prompts for _ in range(GROUP)])
            ids = sorted(ids, key=len) if parts > 1 else ids
            size, tokens, start = len(ids) // parts, 0, time.process_time()
            for first in range(0, len(ids), size):
                completions, _ = trainer._generate_single_turn(ids[first : first + size], None, fields, GROUP)
                tokens += sum(len(completion) for completion in completions)
            ms[name].append(1000 * (time.process_time() - start) / tokens)
            print(
                f"{name}: {ms[name][-1]:.1f} ms per token, {tokens / len(ids):.0f} tokens per completion", flush=True
            )
    print("\n| way | ms per token | relative to TRL's |\n|---|---|---|")
    for name, values in ms.items():
        ratios = [value / first for value, first in zip(values, ms["TRL's"], strict=True)]
        spread = f"{statistics.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.mean(values):.1f} | {spread} |")


if __name__ == "__main__":
    main()
