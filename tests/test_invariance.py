"""The same optimizer step, to 1e-6 in float32, however the same rollouts are split, ordered and padded."""

import copy

import pytest
import torch
from helpers import COMPLETIONS, alphabet_score, fixed_rollout, weights
from peft import LoraConfig


ALL = {"all": {}, "threshold": {"win_rate_threshold": 0.8}, "best and worst": {"train_on": "best_and_worst"}}
OBJECTIVES = {
    "default": {},
    "log-mean-exp": {"baseline": "log_mean_exp", "comparison": "bradley_terry"},
    "KL": {"beta": 2.0, "forward_kl_share": 0.5},
    "hard": {"loss_type": "sppo_hard"},
}


def steps_of(fixed, model, lora: bool = False, **options) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights after two passes over one rollout by plain gradient descent, and the losses."""
    torch.manual_seed(0)  # of a new adapter
    kwargs = options.pop("trainer_kwargs", {})
    if lora:
        kwargs["peft_config"] = LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
    trainer = fixed(
        model=model if isinstance(model, str) else copy.deepcopy(model),
        num_iterations=2,
        max_steps=2,
        learning_rate=3e-3,
        trainer_kwargs=kwargs,
        **options,
    )
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = max((after[name] - before[name]).abs().max().item() for name in after)
    assert moved > 1e-3  # a thousand times the tolerance
    return after, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_same(actual, expected) -> None:
    for name, value in expected[0].items():
        torch.testing.assert_close(actual[0][name], value, rtol=0, atol=1e-6, msg=name)
    assert actual[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    ("objective", "chosen"),
    [("default", "all"), ("default", "best and worst"), ("KL", "threshold"), ("log-mean-exp", "all"), ("hard", "all")],
)
def test_micro_batches_and_accumulation(fixed, tiny_policy, objective, chosen, lora):
    options = {**OBJECTIVES[objective], **ALL[chosen]}
    whole = steps_of(fixed, tiny_policy, lora, **options)
    for per_device, accumulation in ((8, 2), (1, 16)):
        split = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        assert_same(steps_of(fixed, tiny_policy, lora, **options, **split), whole)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_order_inside_a_group(fixed, tiny_policy, monkeypatch, objective, lora):
    options = {**OBJECTIVES[objective], **ALL["threshold"]}  # of two that tie for best, the first would be taken
    expected = steps_of(fixed, tiny_policy, lora, **options)
    shuffled = {prompt: [group[k] for k in (2, 3, 1, 0)] for prompt, group in COMPLETIONS.items()}
    monkeypatch.setattr("helpers.COMPLETIONS", shuffled)
    assert_same(steps_of(fixed, tiny_policy, lora, **options), expected)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding(fixed, tiny_policy, objective, lora):
    expected = steps_of(fixed, tiny_policy, lora, **OBJECTIVES[objective])
    assert_same(steps_of(fixed, tiny_policy, lora, pad_to_multiple_of=16, **OBJECTIVES[objective]), expected)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_padding_by_a_long_neighbour_that_is_not_trained_on(fixed, tiny_policy, lora):
    """A longer completion in the same rollout widens every row; here it is dropped, since it cannot be scored."""

    def score(completion_ids, **kwargs):
        return [None if i % 4 == 1 else value for i, value in enumerate(alphabet_score(completion_ids))]

    def with_long_second(prompts, trainer):
        output = fixed_rollout(prompts, trainer)
        output["completion_ids"] = [
            [*ids[:-1], *[5] * 40, 1] if i % 4 == 1 else ids for i, ids in enumerate(output["completion_ids"])
        ]
        return output

    expected = steps_of(fixed, tiny_policy, lora, reward_funcs=score)
    kwargs = {"rollout_func": with_long_second}
    assert_same(steps_of(fixed, tiny_policy, lora, reward_funcs=score, trainer_kwargs=kwargs), expected)
