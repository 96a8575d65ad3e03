"""Optimizer steps whose gradient is not finite: skipped and counted, up to a limit."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from ..errors import RunError


logger = logging.get_logger(__name__)

# In a row: a broken policy stays broken. The same number as for an oracle without verdicts
MAX_SKIPPED_STEPS = 3


class NonFiniteSteps:
    """Skips steps whose gradient is not finite. `MAX_SKIPPED_STEPS` in a row end the run, with the batch saved."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.num_skipped = self._in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"num_skipped": self.num_skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_skipped, self._in_a_row = state["num_skipped"], state["in_a_row"]

    def passes(self, norm: torch.Tensor | float, trainer: Any) -> bool:
        """Whether a gradient's norm, the same on all processes, is finite. If not, the gradients are removed."""
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if math.isfinite(norm):
            self._in_a_row = 0
            return True
        for parameter in trainer.model.parameters():
            parameter.grad = None
        step = trainer.state.global_step + 1
        self.num_skipped += 1
        self._in_a_row += 1
        logger.warning(f"optimizer step {step} is skipped: its gradient is not finite. {self.num_skipped} so far.")
        if self._in_a_row == MAX_SKIPPED_STEPS:
            folder = Path(trainer.args.output_dir) / f"nonfinite-step-{step}"
            save_batch(trainer, folder)
            raise RunError(
                f"the gradient was not finite in {MAX_SKIPPED_STEPS} optimizer steps in a row. The last batch is in "
                f"{folder}. Lower learning_rate, set max_grad_norm, use bf16, or resume from an earlier checkpoint."
            )
        return False


def save_batch(trainer: Any, folder: Path) -> None:
    """Save this process's micro-batches of the current optimizer step: tensors and texts."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = trainer.accelerator.process_index
    slices, steps = trainer._buffered_inputs, trainer.args.gradient_accumulation_steps
    first = trainer.state.global_step * steps % len(slices)  # which is a multiple of `steps`
    micro_batches = slices[first : first + steps]
    torch.save(micro_batches, folder / f"micro_batches_{rank}.pt")
    with open(folder / f"texts_{rank}.jsonl", "w") as file:
        for batch in micro_batches:
            for prompt, completion in zip(batch["prompt_ids"], batch["completion_ids"], strict=True):
                texts = [trainer._tokenizer.decode(ids) for ids in (prompt, completion)]
                file.write(json.dumps(dict(zip(("prompt", "completion"), texts, strict=True))) + "\n")
