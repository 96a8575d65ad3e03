"""Time and memory after the rollout, beside TRL's GRPO, with prompts and completions of realistic lengths.

    python benchmarks/training_pass.py                 # one optimizer step of each, in turns: 35 minutes

All trainers get the same 128 completions of 16 prompts, and a micro-batch size of 8. Lengths are log-normal with the
means and standard deviations of WildChat's turns in tokens (Zhao et al., 2024, arXiv 2405.01470, table 1), and at most
1,024 each, as in the recipes. Policy: a Qwen2 of 5 million parameters with random weights, on one thread.
"""

import argparse
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from gpu_tools import tokenizer_of
from transformers import AutoModelForCausalLM, Qwen2Config
from trl import GRPOConfig, GRPOTrainer

from trl_sppo import SPPOConfig, SPPOTrainer
from trl_sppo.rollouts import micro_batches


PROMPTS, GROUP, MICRO = 16, 8, 8
LONGEST = 1024
WILDCHAT = {"prompts": (295.58, 1609.18), "completions": (441.34, 410.91)}  # tokens: mean, standard deviation
KINDS: dict[str, dict[str, Any]] = {
    "GRPO": {},
    "SPPO, all": {},
    "SPPO, threshold 0.6": {"win_rate_threshold": 0.6},
    "SPPO, best and worst": {"train_on": "best_and_worst"},
    "SPPO, all, packed": {},
    "SPPO, all, groups together": {},
    "SPPO, all, prompts shared": {},
}


def draw(number: int, which: str, seed: int) -> list[int]:
    rng, (mean, deviation) = random.Random(seed), WILDCHAT[which]
    variance = math.log(1 + (deviation / mean) ** 2)
    middle = math.log(mean) - variance / 2
    return [min(max(int(rng.lognormvariate(middle, math.sqrt(variance))), 2), LONGEST) for _ in range(number)]


def score(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """Scores that have nothing to do with the length, and do not tie."""
    return [random.Random(str(ids)).random() for ids in completion_ids]


def policy() -> Any:
    config = Qwen2Config(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def packed(model: Any, ids: torch.Tensor, mask: torch.Tensor, logits_to_keep: int, *_: Any) -> tuple:
    """Instead of a pass over padded rows: all rows of a micro-batch behind each other in one, as other trainers do."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-logits_to_keep] = -100
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    is_token = mask.bool()
    outputs = model(
        input_ids=ids[is_token][None], position_ids=(mask.cumsum(dim=1) - 1)[is_token][None],
        shift_labels=following[is_token][None], fused_lm_head=True,
    )  # fmt: skip
    logps, entropies = (
        torch.zeros(ids.shape).masked_scatter(is_token, values[0])[:, -logits_to_keep - 1 : -1]
        for values in (outputs.log_probs, outputs.entropy)
    )
    return logps, entropies, outputs.aux_loss


def groups_together(step: list[dict[str, Any]], *_: Any) -> list[dict[str, Any]]:
    """Instead of rows by length: the completions of a prompt in one micro-batch."""
    batch = {
        name: torch.cat([each[name] for each in step]) if isinstance(value, torch.Tensor) and value.ndim else value
        for name, value in step[0].items()
    }
    _, groups = batch["prompt_ids"].unique(dim=0, return_inverse=True)
    rows = [(groups == group).nonzero().squeeze(1) for group in range(PROMPTS)]
    return [micro_batches.trim(micro_batches.take_rows(batch, each)) for each in rows]


def shared(model: Any, ids: torch.Tensor, mask: torch.Tensor, logits_to_keep: int, *_: Any) -> tuple:
    """The prompt of a micro-batch once, up to its last token, and then the completions over its keys and values."""
    prompt = ids[0, :-logits_to_keep][mask[0, :-logits_to_keep].bool()]
    cache = model.model(input_ids=prompt[None, :-1], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ids))
    labels = ids[:, -logits_to_keep:].masked_fill(mask[:, -logits_to_keep:] == 0, -100)
    outputs = model(
        input_ids=ids[:, -logits_to_keep - 1 : -1], past_key_values=cache, shift_labels=labels, fused_lm_head=True,
    )  # fmt: skip
    is_token = labels != -100
    return outputs.log_probs.where(is_token, 0.0), outputs.entropy.where(is_token, 0.0), outputs.aux_loss


def measure(name: str, seed: int, log_probabilities: bool) -> dict[str, float]:
    """Seconds of the rollout and of the rest of a generation batch, in CPU time, and what the step computes."""
    torch.set_num_threads(1)
    if name.endswith(("packed", "shared")):
        micro_batches._one_pass = packed if name.endswith("packed") else shared  # type: ignore[assignment]
    if name.endswith(("together", "shared")):
        micro_batches._cut_step = groups_together  # type: ignore[assignment]
    rng = random.Random(seed)
    prompts = ["".join(f"w{rng.randrange(5, 4096)}" for _ in range(n)) for n in draw(PROMPTS, "prompts", seed)]
    lengths = draw(PROMPTS * GROUP, "completions", seed + 1000)
    completions = [[*(rng.randrange(5, 4096) for _ in range(n - 1)), 1] for n in lengths]

    def rollout(batch: list, trainer: Any) -> dict[str, Any]:
        own = iter(completions[: len(batch)])
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in batch],
            "completion_ids": [next(own) for _ in batch], "logprobs": None,
        }  # fmt: skip

    model = policy()
    counted = {"columns": 0, "passes": 0}

    def count(module, args, kwargs):
        counted["columns"] += kwargs["input_ids"].numel() * torch.is_grad_enabled()
        counted["passes"] += torch.is_grad_enabled()

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer_class, config_class = (GRPOTrainer, GRPOConfig) if name == "GRPO" else (SPPOTrainer, SPPOConfig)
    steps = PROMPTS * GROUP // MICRO
    with tempfile.TemporaryDirectory() as folder:
        config: Any = config_class(
            folder, num_generations=GROUP, per_device_train_batch_size=MICRO, steps_per_generation=steps,
            gradient_accumulation_steps=steps, num_iterations=2 if log_probabilities else 1, max_steps=1,
            max_completion_length=LONGEST, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=1, shuffle_dataset=False, **KINDS[name],
        )  # fmt: skip
        trainer = trainer_class(
            model, score, config, Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer_of(model.config), rollout_func=rollout,
        )  # fmt: skip
        model(torch.ones(1, 8, dtype=torch.int64)).logits.sum().backward()  # loads libraries
        model.zero_grad()
        counted.update(columns=0, passes=0)
        trained, seconds = [0], [0.0]
        generate = trainer._generate_and_score_completions

        def timed(inputs: Any) -> Any:
            start = time.process_time()
            batch = generate(inputs)
            seconds[0] += time.process_time() - start
            kept = batch.get("kept", torch.ones(len(batch["prompt_ids"]), dtype=torch.bool))
            trained[0] = sum(int(batch[part][kept].sum()) for part in ("prompt_mask", "completion_mask"))
            return batch

        trainer._generate_and_score_completions = timed  # type: ignore[method-assign]
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        trainer.train()
        total = time.process_time() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rollout_s": seconds[0], "training_s": total - seconds[0], "memory_GB": (after - before) / 2**20,
        "columns_per_token": counted["columns"] / trained[0], "passes": counted["passes"],
        "grad_norm": next(row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row),
    }  # fmt: skip


def rounds(number: int, log_probabilities: bool) -> Iterator[dict[str, dict[str, float]]]:
    """Each round has its own lengths, and each trainer its own process."""
    for seed in range(number):
        row = {}
        for name in KINDS:
            if log_probabilities and name.startswith("SPPO, all,"):
                continue
            command = [sys.executable, __file__, "--measure", name, "--seed", str(seed)]
            command += ["--log_probabilities"] * log_probabilities
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, {key: round(value, 2) for key, value in row[name].items()}, flush=True)
        norms = [row[name]["grad_norm"] for name in row if name.startswith("SPPO, all")]
        assert max(norms) < min(norms) * (1 + 1e-4), "the forms of a micro-batch have other gradients"
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log_probabilities", action="store_true", help="Measure the pass at rollout instead.")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.seed, args.log_probabilities)))
        return
    rows = list(rounds(args.rounds, args.log_probabilities))
    what = "rollout_s" if args.log_probabilities else "training_s"
    print("\n| trainer | seconds | of GRPO's | columns per token | forward passes | peak memory, of GRPO's |")
    print("|---|---|---|---|---|---|")
    for name in rows[0]:
        mean = {key: statistics.mean(row[name][key] for row in rows) for key in rows[0][name]}
        ratios = [row[name][what] / row["GRPO"][what] for row in rows]
        memory = statistics.mean(row[name]["memory_GB"] / row["GRPO"]["memory_GB"] for row in rows)
        spread = f"{statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(
            f"| {name} | {mean[what]:.1f} | {spread} | {mean['columns_per_token']:.2f} | {mean['passes']:.0f} | "
            f"{memory:.2f} |"
        )


if __name__ == "__main__":
    main()
