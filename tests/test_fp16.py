"""Training with a scaler of float16 gradients: torch's own, with float16 autocast, on a CPU."""

import pytest
import torch
from helpers import history, weights
from transformers import TrainerCallback

from trl_sppo.runs.nonfinite import MAX_SKIPPED_STEPS


class Watch(TrainerCallback):
    """Keeps the scale, the weights and the state of the optimizer after each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        self.steps.append((trainer.accelerator.scaler.get_scale(), weights(trainer)))


@pytest.fixture
def start(make_trainer, tiny_policy, tmp_path):
    """A function that builds a trainer as accelerate does for `fp16` on a GPU; its first scale is far too large."""

    def build(folder, optim):
        torch.manual_seed(0)
        watch = Watch()
        watch.trainer = trainer = make_trainer(
            model=tiny_policy, fp16=True, optim=optim, learning_rate=1e-3, max_steps=16, seed=3, eta=1.0,
            save_strategy="steps", save_steps=1, output_dir=str(tmp_path / folder),
            trainer_kwargs={"callbacks": [watch]},
        )  # fmt: skip
        trainer.accelerator.native_amp = True  # accelerate leaves out both on a CPU
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
        return trainer, watch.steps

    return build


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.shows("fp16")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])  # the latter skips steps in its kernel
def test_a_step_that_overflows_is_skipped(start, tmp_path, optim):
    """The scaler's way: the scale is halved and nothing is counted, also more often in a row than ends other runs."""
    trainer, steps = start("whole", optim)
    last_scale, last_weights = 2.0**22, weights(trainer)
    trainer.train()
    skipped = []
    for scale, now in steps:
        skipped.append(scale == last_scale / 2)
        assert skipped[-1] or scale in (last_scale, 2 * last_scale)
        assert same(now, last_weights) == skipped[-1]
        last_scale, last_weights = scale, now
    first = skipped.index(False)  # the first step that is taken
    assert first > MAX_SKIPPED_STEPS and skipped.count(False) >= 6
    assert any(scale == 2 * before for (before, _), (scale, _) in zip(steps[first:], steps[first + 1 :], strict=False))
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == 16 and not any("skipped_steps" in row for row in log)

    # A resumed run has the scale, and how many steps it has gone without an overflow
    resumed, again = start("resumed", optim)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{first + 2}"))
    assert [scale for scale, _ in again] == [scale for scale, _ in steps[first + 2 :]]
    assert same(again[-1][1], steps[-1][1])
    logs = [[str(sorted(row.items())) for row in history(each)] for each in (resumed, trainer)]  # NaN is not itself
    assert logs[0] == logs[1]
