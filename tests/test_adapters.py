"""Adapters given by path: a policy's is trained further, a reward model's scores as it was saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, count_abc, make_tokenizer
from datasets import Dataset
from fixed import weights
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)
from trl import ModelConfig

from trl_sppo import SPPOTrainer, check, train
from trl_sppo.adapters import adopt_options, base_of, is_adapter, tokenizer_of
from trl_sppo.checkpoints import last_whole_checkpoint, read_beginning
from trl_sppo.rewards import MicroBatchedRewardModel, load_reward_models


KINDS = {
    "lora": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "embeddings": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "whole modules": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"),
    "pissa": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}
TOKENS = torch.tensor([[3, 4, 5, 29, 6, 9]])


@torch.no_grad()
def moved(model, seed=1):
    """The model with its adapter away from where adapters begin."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save_adapter(base: str, folder: Path, kind="lora", seed=1) -> str:
    model = AutoModelForCausalLM.from_pretrained(base)
    moved(get_peft_model(model, KINDS[kind]), seed).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter(tiny_policy, tmp_path):
    """A LoRA adapter without a tokenizer, away from its beginning."""
    return save_adapter(tiny_policy, tmp_path / "adapter")


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        output = model(TOKENS).logits
    model.train()
    return output


def as_peft_loads(base: str, adapter: str) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


# ---- Policies


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_run_begins_where_the_adapter_is(make_trainer, tiny_policy, tmp_path, kind, beta):
    """So do all kinds, and with `beta` the initial policy is the base model with the adapter, not without."""
    adapter = save_adapter(tiny_policy, tmp_path / "adapter", kind)
    expected = as_peft_loads(tiny_policy, adapter)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(tiny_policy))).abs().max() > 1e-3
    trainer = make_trainer(adapter, beta=beta, trainer_kwargs={"processing_class": None})
    torch.testing.assert_close(logits(trainer.model), expected)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and not any("ref" in name.split(".") for name in trained)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed and changed <= trained
    if beta:
        log = trainer.state.log_history
        assert log[0]["kl_to_initial_policy"] == pytest.approx(0, abs=1e-7)
        assert log[1]["kl_to_initial_policy"] > 1e-7
        trainer.model.set_adapter("ref")
        torch.testing.assert_close(logits(trainer.model), expected)
