"""bitsandbytes on the CPU: QLoRA from training to a merged model, and reward models in 8 and 4 bit."""

import bitsandbytes as bnb
import pytest
import torch
from helpers import TINY, make_tokenizer
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)


NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)
# bitsandbytes' kernels for the CPU want multiples of 32
CONFIG = {**TINY, "hidden_size": 64, "intermediate_size": 128}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def logits(model):
    with torch.inference_mode():
        return model.eval()(torch.tensor([[3, 4, 5, 29, 6]])).logits.float()


@pytest.fixture
def policy(tmp_path):
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**CONFIG)).save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


def test_qlora_trains_saves_loads_back_and_merges(make_trainer, policy, tmp_path):
    trainer = make_trainer(
        policy,
        model_init_kwargs={"dtype": "float32"},
        learning_rate=0.05,
        trainer_kwargs={"quantization_config": NF4, "peft_config": LORA},
    )
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert isinstance(layer, bnb.nn.Linear4bit)
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert layer.weight.dtype == torch.uint8 and layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested
    for name, parameter in trainer.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), f"{name} is frozen, and has changed"
    trained = logits(trainer.model)
    untrained = logits(AutoModelForCausalLM.from_pretrained(policy, quantization_config=NF4, dtype=torch.float32))
    assert (trained - untrained).abs().max() > 0.5

    trainer.save_model(str(tmp_path / "adapter"))
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    again = AutoModelForCausalLM.from_pretrained(policy, quantization_config=NF4, dtype=torch.float32)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    # TRL trains the adapter of a quantized model in bfloat16, PEFT loads it in float32
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=0.01)

    # Onto the base model in full precision, to be used without bitsandbytes: off by what 4 bit had rounded away
    full = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    plain = logits(full)
    merged = PeftModel.from_pretrained(full, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged - plain, trained - untrained, rtol=0.1, atol=0.1)


def test_why_vllm_cannot_sample_for_a_policy_in_8_bit(tmp_path):
    """vLLM would compute with the dequantized weights. bitsandbytes also rounds what they are multiplied by."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16}
    Qwen2ForCausalLM(Qwen2Config(**{**TINY, **sizes, "initializer_range": 0.05})).save_pretrained(tmp_path)
    tokens = torch.randint(3, 30, (8, 64))

    def logps(model):
        with torch.inference_mode():
            logps = model.eval()(tokens).logits[:, :-1].float().log_softmax(dim=-1)
        return logps.gather(2, tokens[:, 1:, None])

    config = BitsAndBytesConfig(load_in_8bit=True)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    own = logps(policy)
    plain = policy.dequantize()
    rounded, exact = logps(plain.bfloat16()), logps(plain.float())
    noise, difference = (rounded - exact).abs().mean(), (own - rounded).abs().mean()
    print(f"\nLLM.int8() and its dequantized weights differ by {difference:.4f}, bfloat16 and float32 by {noise:.4f}")
    assert difference > 2 * noise


def test_evaluations_during_qlora_on_a_cpu_are_refused(make_trainer):
    message = r"eval_strategy='steps' with a policy in 4 bit on a CPU: .*no gradient.*remove load_in_4bit"
    with pytest.raises(ValueError, match=message):
        make_trainer("./not-even-looked-at", eval_strategy="steps", trainer_kwargs={"quantization_config": NF4})


@pytest.fixture(params=["encoder", "decoder"])
def reward_model(request, tmp_path):
    """A saved reward model whose scores differ from text to text."""
    torch.manual_seed(0)
    if request.param == "encoder":
        sizes = {name: CONFIG[name] for name in ("hidden_size", "intermediate_size", "vocab_size")}
        config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_labels=1, initializer_range=0.1)
        model = BertForSequenceClassification(config)
    else:
        model = Qwen2ForSequenceClassification(Qwen2Config(**CONFIG, num_labels=1, initializer_range=0.1))
    model.bfloat16().save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


@pytest.mark.parametrize(("bits", "bytes_per_weight", "noise"), [("8bit", 1, 0.1), ("4bit", 0.5, 0.5)])
def test_reward_models_in_8_and_4_bit(make_trainer, reward_model, bits, bytes_per_weight, noise):
    prompts = ["ab", "fgh", "cd e", "xyz"] * 2
    completions = ["hello", "a", "the quick brown fox", "zz", "b", "or not", "jumps over", "lazy"]

    def scores(**options):
        trainer = make_trainer(reward_funcs=reward_model, reward_batch_size=3, max_steps=1, **options)
        rows = [{"prompt": prompt} for prompt in prompts]
        return trainer, trainer._calculate_rewards(rows, prompts, completions, None)[:, 0]

    _, full = scores()
    trainer, quantized = scores(reward_quantization=bits)
    assert 0 < (quantized - full).std() < noise * full.std()
    trainer.train()
    assert trainer.state.log_history[0]["win_rate/kept"] > 0

    model = trainer.reward_funcs[0].model
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    plain = {name for name, module in linear.items() if type(module) is torch.nn.Linear}
    assert plain in ({"score"}, {"classifier"})
    for name in linear.keys() - plain:
        weight = linear[name].weight
        assert weight.nbytes == bytes_per_weight * linear[name].in_features * linear[name].out_features, name


def test_messages(make_trainer):
    with pytest.raises(ValueError, match="reward_quantization must be '8bit' or '4bit', got 4"):
        make_trainer(reward_quantization=4)
    with pytest.raises(ValueError, match="reward_quantization='4bit' applies to reward models given by "):
        make_trainer(reward_quantization="4bit")
