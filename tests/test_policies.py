"""Policies that are loaded outside a training: adapters of all kinds, and what vLLM can serve of them."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from helpers import TINY, make_tokenizer
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_sppo.evaluation.policies import Sampling, check_policy, load_policy, sample


LAYERS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS = {
    "LoRA": LoraConfig(r=2, **LAYERS),
    "biases": LoraConfig(r=2, bias="all", **LAYERS),
    "LoRA biases": LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"]),
    "rsLoRA": LoraConfig(r=2, use_rslora=True, **LAYERS),
    "DoRA": LoraConfig(r=2, use_dora=True, **LAYERS),
    "ranks": LoraConfig(r=2, rank_pattern={"q_proj": 4}, **LAYERS),
    "alphas": LoraConfig(r=2, alpha_pattern={"v_proj": 3}, **LAYERS),
    "modules_to_save": LoraConfig(r=2, modules_to_save=["lm_head", "norm"], **LAYERS),
    "embeddings": LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "target_parameters": LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.gate_proj.weight"]),
    "LoRA and tokens": LoraConfig(r=2, trainable_token_indices=[3, 4], **LAYERS),
    "PiSSA": LoraConfig(r=2, init_lora_weights="pissa", **LAYERS),
    "OLoRA": LoraConfig(r=2, init_lora_weights="olora", **LAYERS),
    "tokens": peft.TrainableTokensConfig(token_indices=[3, 4]),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(r=2, **LAYERS),
    "LoKr": peft.LoKrConfig(r=2, **LAYERS),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **LAYERS),
    "OFT": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "VeRA": peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"]),
    "VB-LoRA": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, target_modules=["q_proj"]),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "FourierFT": peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"]),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=3),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
}
SERVED_BY_VLLM = {"LoRA", "rsLoRA", "embeddings"}
PROMPT = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def make_adapter(tmp_path, monkeypatch):
    """A function that saves an adapter of a kind as if it had been trained, and returns the trained policy."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**TINY, initializer_range=0.5)).save_pretrained("base")
    make_tokenizer().save_pretrained("base")

    def make(config):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config.task_type = "CAUSAL_LM"
            model = get_peft_model(Qwen2ForCausalLM.from_pretrained("base"), config).eval()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += torch.randn_like(parameter) * 0.5
            model.save_pretrained("adapter")
        return model

    return make


def edit(**values):
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@torch.no_grad()
def logits(model):
    return model(PROMPT).logits


@pytest.mark.filterwarnings("ignore")  # what PEFT says of its rarer kinds
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_what_was_trained(make_adapter, kind):
    trained = make_adapter(KINDS[kind])
    loaded = load_policy("adapter").eval()
    assert torch.equal(logits(loaded), logits(trained))
    assert not torch.equal(logits(loaded)[:, -4:], logits(Qwen2ForCausalLM.from_pretrained("base")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_lacks_weights_is_refused(make_adapter, kind, position):
    make_adapter(KINDS[kind])
    weights = load_file("adapter/adapter_model.safetensors")
    name = sorted(name for name in weights if "base_layer" not in name)[position]  # which is the base model's own
    del weights[name]
    save_file(weights, "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    for load in (check_policy, load_policy):
        with pytest.raises(ValueError, match=r"'adapter' (is an adapter that does not fit|uses prefix)") as error:
            load("adapter")
        if kind != "prefix tuning" or load is load_policy:
            assert name.removesuffix(".weight") in str(error.value).replace(".default", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_with_weights_that_have_no_place_is_refused(make_adapter, kind):
    make_adapter(KINDS[kind])
    weights = load_file("adapter/adapter_model.safetensors")
    extra = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    save_file({**weights, extra: torch.ones(2, 16)}, "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.7\.self_attn\.q_proj"):
        load_policy("adapter")


@pytest.mark.parametrize("kind", ["biases", "LoRA biases"])
def test_an_adapter_that_lacks_biases_is_refused(make_adapter, kind):
    make_adapter(KINDS[kind])
    weights = load_file("adapter/adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("bias"))
    del weights[name]
    save_file(weights, "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        check_policy("adapter")
    assert name.removesuffix(".bias") in str(error.value)


def test_an_adapter_of_another_base_is_refused(make_adapter):
    make_adapter(KINDS["LoRA"])
    Qwen2ForCausalLM(Qwen2Config(**{**TINY, "hidden_size": 32})).save_pretrained("base")
    with pytest.raises(ValueError, match="does not fit its base model 'base'"):
        check_policy("adapter")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "prefix tuning"])
def test_what_vllm_cannot_serve_is_refused_before_anything_is_loaded(make_adapter, kind, monkeypatch):
    monkeypatch.setattr("trl_sppo.evaluation.policies.check_vllm_is_installed", lambda: None)
    make_adapter(KINDS[kind])
    if kind in SERVED_BY_VLLM:
        check_policy("adapter", use_vllm=True)
    else:
        with pytest.raises(ValueError, match=r"use_vllm=True with adapter 'adapter', which has .*plain LoRA only"):
            check_policy("adapter", use_vllm=True)


def test_ranks_of_vllm(make_adapter, monkeypatch):
    monkeypatch.setattr("trl_sppo.evaluation.policies.check_vllm_is_installed", lambda: None)
    make_adapter(KINDS["LoRA"])
    edit(r=513)
    with pytest.raises(ValueError, match="which has r=513: vLLM samples with plain LoRA only"):
        check_policy("adapter", use_vllm=True)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "adapter 'adapter' does not name the model it belongs to. Write base_model_name_or_path into its "
         "adapter_config.json"),
        ("", "does not name the model it belongs to"),
        ("models/policy", "the base model 'models/policy' of adapter 'adapter' is neither"),
        ("models/gone/policy", "relative to the current directory, or base_model_name_or_path in adapter_config.json"),
        ("../policy", "the base model '../policy' of adapter 'adapter' is neither"),
        ("adapter", "'adapter' is itself an adapter. Merge that into its own base first"),
    ],
)  # fmt: skip
def test_bases_that_are_not_there(make_adapter, base, message):
    make_adapter(KINDS["LoRA"])
    edit(base_model_name_or_path=base)
    with pytest.raises(ValueError) as error:
        check_policy("adapter")
    assert message in str(error.value)


def test_a_base_is_relative_to_the_current_directory(make_adapter, monkeypatch):
    """As in PEFT, and not to the adapter's folder."""
    make_adapter(KINDS["LoRA"])
    check_policy("adapter")
    monkeypatch.chdir("adapter")
    with pytest.raises(ValueError, match="the base model 'base' of adapter"):
        check_policy(".")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "prefix tuning"])
def test_sampling_is_of_the_adapted_policy(make_adapter, kind):
    """At next to no temperature: the likeliest token."""
    trained = make_adapter(KINDS[kind])
    check_policy("adapter")
    groups = sample("adapter", Dataset.from_dict({"prompt": ["ab"]}), Sampling(1, 1, temperature=1e-5))
    token = trained(make_tokenizer()("ab", return_tensors="pt")["input_ids"]).logits[0, -1].argmax()
    assert groups[0]["completions"] == [make_tokenizer().decode(token, skip_special_tokens=True)]


@pytest.mark.filterwarnings("ignore")
def test_prefix_tuning_is_refused(make_adapter):
    """If `generate` has learned to put the prefix in, allow it."""
    trained = make_adapter(KINDS["prefix tuning"])
    with pytest.raises(ValueError, match="uses prefix tuning"):
        check_policy("adapter")
    if Version(transformers.__version__) < Version("5.24"):
        return  # there it does
    inputs = make_tokenizer()("ab", return_tensors="pt")
    output = trained.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True,
                              return_dict_in_generate=True, pad_token_id=0)  # fmt: skip
    base = Qwen2ForCausalLM.from_pretrained("base")(**inputs).logits[:, -1]
    assert torch.allclose(output.logits[0], base, atol=1e-5)
