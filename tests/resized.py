"""
Run by test_distributed.py in some number of processes: small trainings of four optimizer steps.

Usage: resized.py FOLDER NAME PER_DEVICE_TRAIN_BATCH_SIZE GRADIENT_ACCUMULATION_STEPS CHECKPOINT|"" CASE...
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from helpers import COMPLETIONS, alphabet_score, make_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM
from two_processes import FSDP, MODEL, WORLD, lora, rollout  # first of all, since it lets accelerate shard on a CPU

from trl_sppo import SPPOConfig, SPPOTrainer


# In the first, two optimizer steps share a generation batch: which completions each has depends on the processes
CASES: dict[str, tuple[int, dict]] = {
    "sppo": (2, {"num_iterations": 2}),
    "inpo": (1, {"num_iterations": 2, "loss_type": "inpo", "beta": 0.1}),
}


def main(folder: Path, name: str, batch_size: int, accumulation: int, checkpoint: str, cases: list[str]) -> None:
    for case in cases:
        steps, options = CASES[case]
        torch.manual_seed(0)
        args = SPPOConfig(
            str(folder / case / name), use_cpu=not FSDP, bf16=False, report_to="none", disable_tqdm=True,
            gradient_checkpointing=False, num_generations=4, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation, steps_per_generation=steps * accumulation, max_steps=4,
            learning_rate=1e-2, adam_epsilon=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", logging_steps=2,
            save_steps=1, shuffle_dataset=False, **options,
        )  # fmt: skip
        assert WORLD * batch_size * accumulation == 8
        trainer = SPPOTrainer(
            Qwen2ForCausalLM(Qwen2Config(**MODEL)), alphabet_score, args,
            train_dataset=Dataset.from_dict({"prompt": list(COMPLETIONS)}), processing_class=make_tokenizer(),
            rollout_func=rollout, peft_config=lora() if case == "inpo" else None,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(folder / case / checkpoint) if checkpoint else None)
        trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    folder, name, batch_size, accumulation, checkpoint, *cases = sys.argv[1:]
    main(Path(folder), name, int(batch_size), int(accumulation), checkpoint, cases)
