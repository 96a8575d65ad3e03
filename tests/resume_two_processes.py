"""
What each process of tests/test_distributed.py's test of resume runs, under FSDP or DeepSpeed.

Usage: resume_two_processes.py FOLDER whole|ends|resumed
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from helpers import count_abc, make_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM
from two_processes import FSDP, MODEL  # first of all, since it lets accelerate shard on a CPU

from trl_sppo import SPPOConfig, SPPOTrainer


def main(folder: Path, part: str) -> None:
    torch.manual_seed(0)
    # Iterations of two optimizer steps; a checkpoint inside the second one
    args = SPPOConfig(
        str(folder / ("whole" if part == "whole" else "ends")), use_cpu=not FSDP, bf16=False, report_to="none",
        disable_tqdm=True, gradient_checkpointing=False, num_generations=4, per_device_train_batch_size=2,
        steps_per_generation=4, gradient_accumulation_steps=2, max_steps=6, max_completion_length=6, temperature=1.0,
        learning_rate=1e-2, logging_steps=1, save_steps=3,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [a + b for a in "abcdef" for b in ("x", "yz")]})
    model = Qwen2ForCausalLM(Qwen2Config(**MODEL))
    trainer = SPPOTrainer(model, count_abc, args, train_dataset=prompts, processing_class=make_tokenizer())
    step, sample, sampled = trainer.training_step, trainer._generate_single_turn, []

    def ends(*args, **kwargs):
        if part == "ends" and trainer._step == 9:  # inside iteration 2, whose rollouts are written
            os._exit(0)
        return step(*args, **kwargs)

    def record(*args, **kwargs):
        sampled.append(not trainer._recorder.groups)
        return sample(*args, **kwargs)

    trainer.training_step, trainer._generate_single_turn = ends, record
    trainer.train(resume_from_checkpoint=part == "resumed")
    trainer.save_model()
    # Iteration 1 is in the checkpoint, 2 is recalled
    assert sampled == ([False] if part == "resumed" else [True] * 3), sampled
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
