"""Prompts with images, on a tiny model that sees."""

import copy
import math

import pytest
import torch
from conftest import TINY, make_tokenizer
from datasets import Dataset
from fixed import weights
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def seeing():
    """A tiny LLaVA and its processor: an image is 4 patches of 8 x 8 pixels."""
    tokenizer = make_tokenizer(extra_special_tokens={"image_token": "<image>"}, chat_template=TEMPLATE)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size), tokenizer, patch_size=8, chat_template=TEMPLATE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = Qwen2Config(**{**TINY, "vocab_size": image_id + 1})
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id, pad_token_id=0, eos_token_id=1)
    )
    return model, processor


def dataset(with_images: bool = True) -> Dataset:
    prompts = [[{"role": "user", "content": letter}] for letter in "abcd"]
    columns = {"prompt": prompts}
    if with_images:
        columns["image"] = [Image.new("RGB", (16, 16), color=(60 * i, 255 - 60 * i, 30)) for i in range(4)]
    return Dataset.from_dict(columns)


def score(completions, **kwargs):
    return [float(sum(map(ord, completion[0]["content"]))) for completion in completions]


@pytest.mark.parametrize("options", [{}, {"train_on": "best_and_worst", "num_iterations": 2}, {"beta": 1.0}])
@pytest.mark.parametrize("split", [(8, 1), (2, 4)])
def test_training_with_images(make_trainer, seeing, tmp_path, options, split):
    model, processor = seeing
    if "beta" in options:
        model.save_pretrained(tmp_path / "seeing")
        processor.save_pretrained(tmp_path / "seeing")
        model = str(tmp_path / "seeing")
    trainer = make_trainer(
        model=model, reward_funcs=score, per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1],
        max_steps=4, trainer_kwargs={"train_dataset": dataset(), "processing_class": processor}, **options,
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
    kwargs = {"train_dataset": dataset(), "processing_class": processor}
    trainer = make_trainer(model=model, reward_funcs=score, log_multimodal=logs, max_steps=1, trainer_kwargs=kwargs)
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
            model=copy.deepcopy(model), reward_funcs=score, train_on="best_and_worst", optim="sgd", max_steps=2,
            num_iterations=2, max_grad_norm=0.0, lr_scheduler_type="constant", learning_rate=3e-3,
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
            trainer_kwargs={"train_dataset": dataset(), "processing_class": processor},
        )  # fmt: skip
        trainer._generate_single_turn = generate(trainer)
        trainer.train()
        results.append(weights(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-6, msg=name)
