"""What can be known about vLLM without vLLM: that a sync leaves the policy as it was, and what is refused."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from helpers import TINY
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

from trl_sppo import SPPOConfig
from trl_sppo.checks.models import check_sharding
from trl_sppo.models.adapters import keep_reference
from trl_sppo.rollouts.weight_sync import prepare_weight_sync


def generation_of(policy):
    """TRL's own walk over the parameters of a policy, without an engine."""
    generation = object.__new__(VLLMGeneration)
    generation.model, generation.mode = policy, "server"
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    return generation


def lora_generation(tiny_model):
    return generation_of(
        get_peft_model(tiny_model.bfloat16(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    )


def test_trls_own_sync_moves_the_base_weights(tiny_model):
    generation = lora_generation(tiny_model)
    weight = generation.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.detach().clone()
    list(generation._iter_named_params())
    assert not torch.equal(weight, before), (
        "TRL's own sync is exact by now: trl_sppo/rollouts/weight_sync.py has less to do"
    )


def test_a_sync_reads_the_policy_and_merges_in_float32(tiny_model):
    names = [name for name, _ in tiny_model.named_parameters()]
    generation = lora_generation(tiny_model)
    model = generation.model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = (getattr(layer, f"lora_{part}")["default"].weight.float() for part in "AB")
    merged = (layer.base_layer.weight.float() + layer.scaling["default"] * (b @ a)).bfloat16()

    before = {name: (parameter.data_ptr(), parameter.detach().clone()) for name, parameter in model.named_parameters()}
    prepare_weight_sync(generation)
    for _ in range(3):
        sent = dict(generation._iter_named_params())
    assert list(sent) == names
    assert torch.equal(sent["model.layers.0.self_attn.q_proj.weight"], merged)
    for name, parameter in model.named_parameters():
        address, value = before[name]
        assert parameter.data_ptr() == address and torch.equal(parameter, value), name
    assert not any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))
    model.merge_adapter()  # PEFT's again
    assert layer.merged


def lora(**options):
    return {"default": LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **options})}


FORMS = {
    "LoRA": lora(),
    "all linear layers": lora(target_modules="all-linear"),
    "rsLoRA": lora(use_rslora=True, lora_alpha=3),
    "DoRA": lora(use_dora=True),
    "bias": lora(target_modules=["q_proj"], lora_bias=True),
    "embeddings and head, tied": lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "modules_to_save": lora(modules_to_save=["norm"]),
    "new tokens": lora(trainable_token_indices=[3, 5]),
    "parameters": lora(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
    "two adapters": {**lora(), "other": LoraConfig(r=2, target_modules=["q_proj", "k_proj"])},
    "IA3": {"default": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])},
    "VeRA": {"default": VeraConfig(r=4, target_modules=["q_proj"])},
    "LoHa": {"default": LoHaConfig(r=4, target_modules=["q_proj"])},
    "norms, which change places": {"default": LNTuningConfig(target_modules=["norm"])},
}


def merged_by_peft(policy):
    policy.merge_adapter()
    return {
        name.replace(".base_layer", "").replace("modules_to_save.default.", ""): value
        for name, value in policy.get_base_model().named_parameters()
        if policy.prefix not in name and "original_module" not in name
    }


def adapted(model, form):
    (first, config), *others = FORMS[form].items()
    policy = get_peft_model(model, config, adapter_name=first, autocast_adapter_dtype=False)
    for name, other in others:
        policy.add_adapter(name, other)
    if others:
        policy.base_model.set_adapter([first, *(name for name, _ in others)])
    return policy


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_sent_is_pefts_own_merge(tiny_model, form, dtype):
    """Of a copy in float32, to the last bit, and then rounded once. The policy is not touched."""
    torch.manual_seed(0)
    policy = adapted(tiny_model.to(dtype), form)
    for parameter in policy.parameters():
        parameter.data += (0.1 * torch.randn(parameter.shape)).to(dtype)
    copied = copy.deepcopy(policy).float()
    names = dict(generation_of(copy.deepcopy(policy))._iter_named_params())
    expected = merged_by_peft(copied)
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    generation = generation_of(policy)
    prepare_weight_sync(generation)
    sent = dict(generation._iter_named_params())
    assert sent.keys() == names.keys() == expected.keys()
    for name, tensor in sent.items():
        assert torch.equal(tensor, expected[name].to(dtype)), name
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_hooks_of_gradients_stay(tiny_model):
    """DDP reduces gradients in a hook of autograd's, which a parameter loses if it gets values of another dtype."""
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    policy = get_peft_model(tiny_model.bfloat16(), config, autocast_adapter_dtype=False)
    parameter = policy.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
    called = []
    node.register_hook(lambda *_: called.append(1))
    generation = generation_of(policy)
    prepare_weight_sync(generation)
    for expected in (1, 2):
        policy(torch.tensor([[3, 4, 5]])).logits.sum().backward()
        assert len(called) == expected
        list(generation._iter_named_params())


def test_a_sync_that_fails_halfway_leaves_the_policy_as_it_was(tiny_model):
    generation = lora_generation(tiny_model)
    model = generation.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    prepare_weight_sync(generation)
    sync = generation._iter_named_params()
    for _ in range(3):
        next(sync)
    sync.close()  # what an exception in the receiver comes to
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    model.merge_adapter()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged


def test_without_an_adapter_and_on_a_gpu_the_backend_stays_trls(tiny_model):
    generation = object.__new__(VLLMGeneration)
    generation.model, generation.mode = tiny_model, "colocate"
    generation.accelerator = SimpleNamespace(device=torch.device("cuda"))
    before = dict(vars(generation))
    prepare_weight_sync(generation)
    assert vars(generation) == before


@pytest.mark.parametrize(
    ("variable", "options", "has_adapter", "bits", "message"),
    [
        ("FSDP", {"use_vllm": True}, True, None, "use_vllm=True with an adapter under FSDP1: .*whole matrices.*fsdp2"),
        ("FSDP", {"use_vllm": True}, True, 4, "use_vllm=True with a policy in 4 bit under FSDP: .*multi_gpu"),
        ("FSDP", {"beta": 0.1}, False, None, "beta=0.1 needs the initial policy, which transformers 5.17.0 .*5.23"),
        (
            "DEEPSPEED",
            {"reward_quantization": "8bit"},
            False,
            None,
            "reward_quantization='8bit' does not work under DeepSpeed.*its URL",
        ),
    ],
)
def test_what_sharding_rules_out(monkeypatch, variable, options, has_adapter, bits, message):
    # Made before the environment is set: else transformers would import DeepSpeed, and stay configured for it
    args = SPPOConfig("unused", use_cpu=True, bf16=False, **options)
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    with pytest.raises(ValueError, match=message):
        check_sharding(args, has_adapter, bits)
    monkeypatch.delenv(f"ACCELERATE_USE_{variable}")
    check_sharding(args, has_adapter, bits)


def test_an_adapter_with_vllm_under_fsdp2(monkeypatch):
    args = SPPOConfig("unused", use_cpu=True, bf16=False, use_vllm=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharding(args, has_adapter=True, bits=None)
    with pytest.raises(ValueError, match="in 4 bit under FSDP"):
        check_sharding(args, has_adapter=True, bits=4)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    sizes = {**TINY, "hidden_size": 64, "intermediate_size": 128}  # bitsandbytes' kernels for the CPU want 32s
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


def in_4_bit(path, dtype=torch.bfloat16, nested=True):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype).train()


@pytest.mark.parametrize(
    "form",
    ["LoRA", "all linear layers", "rsLoRA", "DoRA", "bias", "embeddings and head, tied", "modules_to_save",
     "new tokens", "two adapters"],
)  # fmt: skip
@pytest.mark.parametrize(("dtype", "nested"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_of_4_bit_weights_what_the_policy_computes_with_is_sent(saved, form, dtype, nested):
    """As if the policy had been loaded with those weights, and PEFT had merged it in float32. Rounded once."""
    torch.manual_seed(0)
    policy = adapted(in_4_bit(saved, dtype, nested), form)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = (parameter + 0.1 * torch.randn(parameter.shape)).bfloat16()  # TRL's dtype of an adapter
    reference = adapted(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32), form)
    quantized = []
    for (name, parameter), (_, plain) in zip(policy.named_parameters(), reference.named_parameters(), strict=True):
        if isinstance(parameter, bnb.nn.Params4bit):  # products with unit vectors are its columns
            unit = torch.eye(plain.shape[1], dtype=dtype)
            parameter = bnb.matmul_4bit(unit, parameter, quant_state=parameter.quant_state).T.contiguous()
            quantized.append(name.removeprefix("base_model.model.").replace(".base_layer", ""))
            assert not torch.equal(plain, parameter.float()), name
        plain.data = parameter.detach().to(torch.float32, copy=True)
    assert len(quantized) == 7 * 2
    held = {name: (parameter, parameter.detach().clone()) for name, parameter in policy.named_parameters()}
    states = {
        name: {key: value.clone() for key, value in parameter.quant_state.as_dict(packed=True).items()}
        for name, (parameter, _) in held.items()
        if isinstance(parameter, bnb.nn.Params4bit)
    }
    generation = generation_of(policy)
    prepare_weight_sync(generation)
    for _ in range(2):
        sent = dict(generation._iter_named_params())
    expected = merged_by_peft(reference)
    assert sent.keys() == expected.keys()
    for name, tensor in sent.items():
        assert tensor.dtype == dtype or name not in quantized
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    for name, parameter in policy.named_parameters():
        before, value = held[name]
        assert parameter is before and torch.equal(parameter, value), name
        for key, was in states.get(name, {}).items():
            assert torch.equal(parameter.quant_state.as_dict(packed=True)[key], was), (name, key)


def test_other_adapters_of_4_bit_weights_are_refused(saved):
    generation = generation_of(adapted(in_4_bit(saved), "IA3"))
    with pytest.raises(ValueError, match=r"with peft.tuners.ia3.*4-bit.*q_proj: .*use LoRA"):
        prepare_weight_sync(generation)


def test_weights_packed_for_inference_are_refused(saved):
    """bitsandbytes dequantizes them to other weights, without an error."""
    generation = generation_of(adapted(in_4_bit(saved), "LoRA"))
    prepare_weight_sync(generation)
    for parameter in generation.model.parameters():
        if isinstance(parameter, bnb.nn.Params4bit):
            parameter.data, parameter.quant_state = bnb.nn.modules._convert_weight_packed_for_cpu(
                parameter.data, parameter.quant_state
            )
    with pytest.raises(RuntimeError, match=r"packed the policy's 4-bit weights.*Do not call model.eval\(\)"):
        list(generation._iter_named_params())


FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True)
EIGHT_BIT = BitsAndBytesConfig(load_in_8bit=True)
IN_8_BIT = r"use_vllm=True with a policy in 8 bit: .*another policy\. Set load_in_4bit=True"
SAVED = r"use_vllm=True with model '.*', which is saved in 4 bit: .*full precision with load_in_4bit=True"


@pytest.mark.parametrize(
    ("where", "options", "kwargs", "message"),
    [
        ("argument", {}, {"quantization_config": EIGHT_BIT}, IN_8_BIT),
        ("argument", {"model_init_kwargs": {"quantization_config": EIGHT_BIT}}, {}, IN_8_BIT),
        ("checkpoint", {}, {}, SAVED),
        ("checkpoint, loaded", {}, {}, SAVED),
    ],
)
def test_quantized_policies_that_cannot_sample_with_vllm(make_trainer, saved, where, options, kwargs, message):
    model = "./not-even-looked-at"
    if "checkpoint" in where:
        in_4_bit(saved).save_pretrained(f"{saved}-4bit")
        model = f"{saved}-4bit"
    if "loaded" in where:
        model = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(ValueError, match=message):
        make_trainer(model=model, use_vllm=True, trainer_kwargs=kwargs, **options)


def test_server_mode_needs_a_cuda_device(make_trainer):
    with pytest.raises(ValueError, match=r"vllm_mode='server' needs a CUDA device.*'colocate'"):
        make_trainer(model="./not-even-looked-at", use_vllm=True, vllm_mode="server")


def test_vllm_is_missing(make_trainer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"use_vllm=True needs vLLM.*pip install trl-sppo\[vllm\]"):
        make_trainer(model="./not-even-looked-at", use_vllm=True)


@pytest.mark.parametrize(
    ("config", "bits", "problem"),
    [
        ({"version": 1}, None, "an adapter under FSDP1: it has no whole matrices"),
        ({}, 4, "a policy in 4 bit under FSDP: packed weights"),
        (None, None, None),  # transformers' default is FSDP2
    ],
)
def test_fsdp_of_transformers_own_options(monkeypatch, config, bits, problem):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    args = SPPOConfig("out", use_cpu=True, bf16=False, report_to="none")
    args.use_vllm, args.fsdp, args.fsdp_config = True, True, config
    with pytest.raises(ValueError, match=problem) if problem else nullcontext():
        check_sharding(args, has_adapter=True, bits=bits, deepspeed=False)


@pytest.mark.parametrize("form", ["LoRA", "DoRA", "bias", "modules_to_save", "parameters", "IA3"])
def test_of_an_inactive_adapter_nothing_is_sent(tiny_model, form):
    """As the reference of `sync_ref_model` and `beta`: vLLM knows none of its names."""
    torch.manual_seed(0)
    policy = adapted(tiny_model, form)
    generation = generation_of(policy)
    prepare_weight_sync(generation)
    expected = {name: tensor.clone() for name, tensor in generation._iter_named_params()}
    keep_reference(policy, disable_dropout=False)
    actual = dict(generation._iter_named_params())
    assert actual.keys() == expected.keys() and not any("ref" in name for name in actual)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0)
