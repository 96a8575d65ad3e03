"""
Thousands of optimizer steps of a tiny model, with rollouts, evaluations and checkpoints: what grows?

    python benchmarks/soak.py --steps 2000

Prints, for resident memory, open files, threads and disk use, the slope over the second half of the run with a 95 %
interval: a line through the means of 20 blocks, whose errors are nearly independent.
"""

import argparse
import gc
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets import Dataset
from kill_and_resume import make_policy
from peft import LoraConfig
from transformers import TrainerCallback

from trl_sppo import SPPOConfig, SPPOTrainer


BLOCKS = 20
T_975 = 2.101  # quantile of Student's t with BLOCKS - 2 degrees of freedom
MEASURES = {"resident memory": "MiB", "open files": "", "threads": "", "disk use": "MiB"}


class Watch(TrainerCallback):
    """Writes down at each step what the process holds."""

    def __init__(self, folder: Path, steps: int, forget_log: bool):
        self.folder = folder
        self.forget_log = forget_log
        self.process = psutil.Process()
        self.rows = np.ones((steps, len(MEASURES)))  # all of its memory now: it must not be what grows

    def on_step_end(self, args, state, control, **kwargs):
        if self.forget_log:
            del state.log_history[:-10]
        if state.global_step % 10 == 0:
            gc.collect()  # what is garbage is not held
        disk = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        memory, process = self.process.memory_info().rss, self.process
        self.rows[state.global_step - 1] = memory / 2**20, process.num_fds(), process.num_threads(), disk / 2**20


def vowels(completions: list[str], **kwargs) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def longer(prompts, first, second, **kwargs) -> list[float]:
    return [0.5 + 0.1 * max(-5, min(5, len(a) - len(b))) for a, b in zip(first, second, strict=True)]


def soak(steps: int, forget_log: bool, folder: Path) -> np.ndarray:
    """
    Train.

    Args:
        steps (`int`):
            Optimizer steps.
        forget_log (`bool`):
            Whether to keep the last rows of the log only. transformers keeps all, in memory and in each checkpoint.
        folder (`Path`):
            Where to.

    Returns:
        `np.ndarray` of shape `(steps, 4)`: the measures after each step.
    """
    make_policy(folder / "policy")
    torch.manual_seed(0)
    args = SPPOConfig(
        str(folder / "run"), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        num_generations=4, per_device_train_batch_size=4, steps_per_generation=4, gradient_accumulation_steps=2,
        max_steps=steps, max_completion_length=8, temperature=1.0, learning_rate=1e-3, beta=0.1, logging_steps=50,
        save_steps=50, save_total_limit=2, rollouts_total_limit=2, eval_strategy="steps", eval_steps=50,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [a + b for a in "abcdefgh" for b in "ijklmnop"]})
    watch = Watch(folder, steps, forget_log)
    trainer = SPPOTrainer(
        str(folder / "policy"),
        vowels,
        args,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        preference_func=longer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[watch],
    )
    trainer.train()
    return watch.rows


def slope(values: np.ndarray) -> tuple[float, float, float]:
    """The slope per 1,000 steps over the second half, and its 95 % interval."""
    half = values[len(values) // 2 :]
    size = len(half) // BLOCKS
    means = half[: size * BLOCKS].reshape(BLOCKS, size).mean(axis=1)
    thousands = np.arange(BLOCKS) * size / 1000
    x, y = thousands - thousands.mean(), means - means.mean()
    estimate = (x @ y) / (x @ x)
    error = np.sqrt(((y - estimate * x) ** 2).sum() / (BLOCKS - 2) / (x @ x))
    return estimate, estimate - T_975 * error, estimate + T_975 * error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--forget_log", action="store_true", help="keep the last ten rows of the log only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(args.steps, args.forget_log, Path(folder))
    print(f"{'':18}{'step 100':>12}{'half':>12}{'end':>12}   slope over the second half, per 1,000 steps")
    for (name, unit), values in zip(MEASURES.items(), rows.T, strict=True):
        mean, low, high = slope(values)
        at = [values[min(99, len(values) - 1)], values[len(values) // 2], values[-1]]
        print(
            f"{name:18}"
            + "".join(f"{value:12.1f}" for value in at)
            + f"   {mean:+.3f} [{low:+.3f}, {high:+.3f}] {unit}"
        )


if __name__ == "__main__":
    main()
