"""What can be known about vLLM without vLLM: that a sync leaves the policy as it was, and what is refused."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.generation.vllm_generation import VLLMGeneration

from trl_sppo import SPPOConfig
from trl_sppo.checks.models import check_sharding
from trl_sppo.rollouts.weight_sync import prepare_weight_sync


def lora_generation(tiny_model):
    """TRL's own walk over the parameters of a LoRA policy in bfloat16, without an engine."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    generation = object.__new__(VLLMGeneration)
    generation.model, generation.mode = get_peft_model(tiny_model.bfloat16(), lora), "server"
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    return generation


def test_a_hundred_syncs_of_an_adapter_leave_the_base_weights_as_they_were(tiny_model):
    names = [name for name, _ in tiny_model.named_parameters()]
    generation = lora_generation(tiny_model)
    model = generation.model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight
    merged = (weight + layer.get_delta_weight("default")).detach().bfloat16()

    before = weight.detach().clone()
    list(generation._iter_named_params())
    assert not torch.equal(weight, before), (
        "TRL's own sync is exact by now: trl_sppo/rollouts/weight_sync.py has less to do"
    )

    with torch.no_grad():
        weight.copy_(before)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    prepare_weight_sync(generation)
    for _ in range(100):
        sent = dict(generation._iter_named_params())  # looked at after the adapter is out again
    assert list(sent) == names
    assert torch.equal(sent["model.layers.0.self_attn.q_proj.weight"], merged)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_sync_that_fails_halfway_leaves_them_too(tiny_model):
    generation = lora_generation(tiny_model)
    model = generation.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    prepare_weight_sync(generation)
    sync = generation._iter_named_params()
    next(sync)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged
    sync.close()  # what an exception in the receiver comes to
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.merged
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_without_an_adapter_and_on_a_gpu_the_backend_stays_trls(tiny_model):
    generation = object.__new__(VLLMGeneration)
    generation.model, generation.mode = tiny_model, "colocate"
    generation.accelerator = SimpleNamespace(device=torch.device("cuda"))
    before = dict(vars(generation))
    prepare_weight_sync(generation)
    assert vars(generation) == before


@pytest.mark.parametrize(
    ("variable", "options", "has_adapter", "message"),
    [
        ("FSDP", {"use_vllm": True}, True, "use_vllm=True with an adapter under FSDP: .*zero3"),
        ("FSDP", {"beta": 0.1}, False, "beta=0.1 needs the initial policy, which transformers 5.17.0 .*5.23"),
        (
            "DEEPSPEED",
            {"reward_quantization": "8bit"},
            False,
            "reward_quantization='8bit' does not work under DeepSpeed.*its URL",
        ),
    ],
)
def test_what_sharding_rules_out(monkeypatch, variable, options, has_adapter, message):
    # Made before the environment is set: else transformers would import DeepSpeed, and stay configured for it
    args = SPPOConfig("unused", use_cpu=True, bf16=False, **options)
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    with pytest.raises(ValueError, match=message):
        check_sharding(args, has_adapter)
    monkeypatch.delenv(f"ACCELERATE_USE_{variable}")
    check_sharding(args, has_adapter)


FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True)


@pytest.mark.parametrize(
    ("where", "options", "kwargs"),
    [
        ("argument", {}, {"quantization_config": FOUR_BIT}),
        ("argument", {}, {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}),
        ("model_init_kwargs", {"model_init_kwargs": {"quantization_config": FOUR_BIT}}, {}),
        ("checkpoint", {}, {}),
        ("model", {}, {}),
    ],
)
def test_a_quantized_policy_cannot_sample_with_vllm(make_trainer, tiny_policy, tmp_path, where, options, kwargs):
    model = "./not-even-looked-at"
    if where in ("checkpoint", "model"):
        model = AutoModelForCausalLM.from_pretrained(tiny_policy, quantization_config=FOUR_BIT)
    if where == "checkpoint":
        model.save_pretrained(tmp_path / "quantized")
        model = str(tmp_path / "quantized")
    message = r"use_vllm=True with a policy in [48] bit: .*sample from another policy.*Set use_vllm=False"
    with pytest.raises(ValueError, match=message):
        make_trainer(model=model, use_vllm=True, trainer_kwargs=kwargs, **options)


def test_server_mode_needs_a_cuda_device(make_trainer):
    with pytest.raises(ValueError, match=r"vllm_mode='server' needs a CUDA device.*'colocate'"):
        make_trainer(model="./not-even-looked-at", use_vllm=True, vllm_mode="server")


def test_vllm_is_missing(make_trainer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"use_vllm=True needs vLLM.*pip install trl-sppo\[vllm\]"):
        make_trainer(model="./not-even-looked-at", use_vllm=True)
