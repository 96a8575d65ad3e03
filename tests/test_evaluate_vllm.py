"""`trl-sppo eval` with a real vLLM on the CPU: the samples are the policy's, with an adapter and without."""

import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sppo.evaluation.policies import Sampling, sample


POLICY = os.environ.get("TRL_SPPO_TEST_POLICY")
if not POLICY:
    pytest.skip(
        "needs vLLM, and TRL_SPPO_TEST_POLICY set to a folder with SmolLM2-135M-Instruct: .ci/run has both",
        allow_module_level=True,
    )
import vllm  # noqa: E402, F401  (here it must be there)


# The logits of the two likeliest tokens are further apart than bfloat16 rounds, with the adapter but for one question
QUESTIONS = ["What is the capital of Japan?", "Explain gravity.", "Who wrote Hamlet?", "Repeat: one, two, three."]
PROMPTS = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS])


def test_vllm_samples_what_transformers_samples(tmp_path, monkeypatch):
    """At next to no temperature both take the likeliest tokens; ties by rounding may differ late."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(POLICY)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(tmp_path / "adapter")
    found = {}
    for policy in (POLICY, str(tmp_path / "adapter")):
        for use_vllm in (False, True):
            sampling = Sampling(num_generations=2, max_completion_length=6, temperature=1e-3, use_vllm=use_vllm)
            groups = sample(policy, PROMPTS, sampling)
            assert all(1 <= length <= 6 for group in groups for length in group["lengths"])
            found[policy, use_vllm] = [[each[0]["content"] for each in group["completions"]] for group in groups]
        same = [a == b for a, b in zip(found[policy, True], found[policy, False], strict=True)]
        assert sum(same) >= 3, (found[policy, True], found[policy, False])
    assert found[POLICY, True] != found[str(tmp_path / "adapter"), True]
