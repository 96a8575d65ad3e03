"""Prompts with images, on a tiny model that sees."""

import copy
import math

import pytest
import torch
from helpers import image_dataset, image_score, weights

from trl_sppo.errors import RunError
from trl_sppo.runs.checkpoints import read_manifest


@pytest.mark.parametrize("options", [{}, {"train_on": "best_and_worst", "num_iterations": 2}, {"beta": 1.0}])
@pytest.mark.parametrize("split", [(8, 1), (2, 4)])
def test_training_with_images(make_trainer, seeing, tmp_path, options, split):
    model, processor = seeing
    if "beta" in options:
        model.save_pretrained(tmp_path / "seeing")
        processor.save_pretrained(tmp_path / "seeing")
        model = str(tmp_path / "seeing")
    trainer = make_trainer(
        model=model, reward_funcs=image_score, per_device_train_batch_size=split[0], max_steps=4,
        gradient_accumulation_steps=split[1], **options,
        trainer_kwargs={"train_dataset": image_dataset(), "processing_class": processor},
    )  # fmt: skip
    before = weights(trainer)
    pixels = []
    forward = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
        pixels.append(kwargs["pixel_values"].shape[0] == len(args[1])) or forward(*args, **kwargs)
    )
    trainer.train()
    assert pixels and all(pixels)  # one image a row, in each pass
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == 4 and all(math.isfinite(row["loss"]) for row in log)
    kept = 0.5 if "train_on" in options else 1
    assert all(0 < row["win_rate/kept"] <= kept for row in log)
    moved = [name for name, value in weights(trainer).items() if not torch.equal(value, before[name])]
    assert any("vision" in name for name in moved) and any("language" in name for name in moved)


@pytest.mark.shows("log_multimodal")
@pytest.mark.parametrize("logs", [True, False])
def test_images_are_part_of_the_log_of_completions(make_trainer, seeing, logs):
    model, processor = seeing
    kwargs = {"train_dataset": image_dataset(), "processing_class": processor}
    trainer = make_trainer(
        model=model, reward_funcs=image_score, log_multimodal=logs, max_steps=1, trainer_kwargs=kwargs
    )
    trainer.train()
    assert len(trainer._logs["images"]) == (8 if logs else 0)


def test_the_split_does_not_matter_with_images_either(make_trainer, seeing):
    """Fixed rollouts, of which only the best and the worst are trained on: dropped rows are masked, not cut."""
    model, processor = seeing
    letters = [[3, 4, 1], [9, 1], [20, 12, 5, 1], [6, 6, 1]]

    def generate(trainer):
        original = trainer._generate_single_turn

        def fixed(prompt_ids, *args, **kwargs):
            original(prompt_ids, *args, **kwargs)
            return [letters[i % 4] for i in range(len(prompt_ids))], None

        return fixed

    results = []
    for per_device, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            model=copy.deepcopy(model), reward_funcs=image_score, train_on="best_and_worst", optim="sgd", max_steps=2,
            num_iterations=2, max_grad_norm=0.0, lr_scheduler_type="constant", learning_rate=3e-3,
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
            trainer_kwargs={"train_dataset": image_dataset(), "processing_class": processor},
        )  # fmt: skip
        trainer._generate_single_turn = generate(trainer)
        trainer.train()
        results.append(weights(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-6, msg=name)


def test_a_checkpoint_inside_an_iteration_with_images_says_so(make_trainer, seeing, tmp_path):
    model, processor = seeing
    make_trainer(
        model=model, reward_funcs=image_score, num_iterations=2, max_steps=2, save_strategy="steps", save_steps=1,
        output_dir=str(tmp_path), trainer_kwargs={"train_dataset": image_dataset(), "processing_class": processor},
    ).train()  # fmt: skip
    assert [read_manifest(tmp_path / f"checkpoint-{step}")["can_be_divided"] for step in (1, 2)] == [False, True]


def test_groups_of_images_cannot_be_kept_together(make_trainer, seeing):
    model, processor = seeing
    trainer = make_trainer(
        model=model, reward_funcs=image_score, keep_groups_together=True,
        trainer_kwargs={"train_dataset": image_dataset(), "processing_class": processor},
    )  # fmt: skip
    with pytest.raises(
        RunError, match="keep_groups_together=True, which loss_type='inpo' needs, does not work with images"
    ):
        trainer.train()
