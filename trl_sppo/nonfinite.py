"""Optimizer steps whose loss or gradient is no finite number: skipped, counted, and not for ever."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from .faults import RunError


logger = logging.get_logger(__name__)

# In a row. One bad batch is bad luck; a policy that is broken stays so. As many as for an oracle that stays silent
MAX_SKIPPED_STEPS = 3


class NonFiniteSteps(TrainerCallback):
    """
    Leaves the weights and the optimizer as they are where the loss or a gradient is not finite, in all processes, and
    ends the run after `MAX_SKIPPED_STEPS` of these in a row, with their batch on disk.

    DeepSpeed holds the gradients itself, and a scaler of float16 gradients looks at them itself: then this does not.

    Args:
        trainer:
            A [`ResumableTrainer`].
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        losses, trainer._losses_are_finite = trainer._losses_are_finite, []
        if trainer.is_deepspeed_enabled or trainer.accelerator.scaler is not None:
            return
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        local = (g.to_local() if hasattr(g, "to_local") else g for g in gradients)  # FSDP has a shard of each
        flags = [*losses, *(g.isfinite().all() for g in local)]
        finite = torch.stack([flag.to(args.device) for flag in flags]).all()
        if not trainer.agree(int(not finite)):
            trainer._skipped_in_a_row = 0
            return
        for parameter in trainer.model.parameters():
            parameter.grad = None  # which an optimizer passes over
        trainer._skipped_steps += 1
        trainer._skipped_in_a_row += 1
        trainer._metrics["train"]["skipped_steps"] = [trainer._skipped_steps]
        logger.warning(
            f"optimizer step {state.global_step + 1} is skipped: its loss or gradient is not finite. "
            f"{trainer._skipped_steps} so far."
        )
        if trainer._skipped_in_a_row == MAX_SKIPPED_STEPS:
            folder = Path(args.output_dir) / f"nonfinite-step-{state.global_step + 1}"
            save_batch(trainer, folder)
            raise RunError(
                f"the loss or the gradient was not finite in {MAX_SKIPPED_STEPS} optimizer steps in a row. The last "
                f"batch is in {folder}. Lower learning_rate, set max_grad_norm, or use bf16 instead of fp16; if the "
                "weights themselves are broken, resume from an earlier checkpoint."
            )


def save_batch(trainer: Any, folder: Path) -> None:
    """
    Save this process's micro-batches of an optimizer step: tensors (`torch.load` reads them with `weights_only=True`),
    and the texts.

    Args:
        trainer:
            A [`ResumableTrainer`].
        folder (`Path`):
            Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank = trainer.accelerator.process_index
    micro_batches = trainer.micro_batches_of_step()
    torch.save(micro_batches, folder / f"micro_batches_{rank}.pt")
    with open(folder / f"texts_{rank}.jsonl", "w") as file:
        for batch in micro_batches:
            for prompt, completion in zip(batch["prompt_ids"], batch["completion_ids"], strict=True):
                texts = [trainer._tokenizer.decode(ids) for ids in (prompt, completion)]
                file.write(json.dumps(dict(zip(("prompt", "completion"), texts, strict=True))) + "\n")
