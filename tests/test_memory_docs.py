"""docs/memory.md is arithmetic: its numbers are recomputed here, from the models' configurations and the recipes."""

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
import yaml
from conftest import make_tokenizer
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer
from trl import ModelConfig, get_quantization_config
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from trl_sppo.rewards import _quantization_config


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "memory.md").read_text()

# From the config.json of each model; of the Skywork models: from that of Qwen3-0.6B, Qwen3-4B and Llama-3.1-8B
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODELS = {
    "Qwen/Qwen2.5-7B-Instruct": (
        Qwen2ForCausalLM,
        Qwen2Config(**dict(zip(SIZES, (3584, 18944, 28, 28, 4), strict=True)), vocab_size=152064),
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **dict(zip(SIZES, (896, 4864, 24, 14, 2), strict=True)), vocab_size=151936, tie_word_embeddings=True
        ),
    ),
    "Skywork/Skywork-Reward-V2-Qwen3-4B": (
        Qwen3ForSequenceClassification,
        Qwen3Config(
            **dict(zip(SIZES, (2560, 9728, 36, 32, 8), strict=True)), head_dim=128, vocab_size=151936, num_labels=1
        ),
    ),
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": (
        Qwen3ForSequenceClassification,
        Qwen3Config(
            **dict(zip(SIZES, (1024, 3072, 28, 16, 8), strict=True)), head_dim=128, vocab_size=151936, num_labels=1
        ),
    ),
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": (
        LlamaForSequenceClassification,
        LlamaConfig(**dict(zip(SIZES, (4096, 14336, 32, 32, 8), strict=True)), vocab_size=128256, num_labels=1),
    ),
}
GPU = {"qwen2.5-0.5b-instruct/lora": 16e9, "qwen2.5-7b-instruct/qlora-24gb": 24e9}  # the others: 80e9
SERVED = "Skywork/Skywork-Reward-V2-Llama-3.1-8B"
ASSUMED_PROMPT = 1024
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)


def numel(parameters) -> int:
    return sum(p.numel() for p in parameters)


@cache
def facts(name: str) -> SimpleNamespace:
    """What the arithmetic needs to know about a model."""
    kind, config = MODELS[name]
    with torch.device("meta"):
        model = kind(config)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in ("lm_head", "score")}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = SimpleNamespace(
        parameters=numel(model.parameters()),
        matrices=numel(m.weight for m in linear.values()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        layer=numel(model.model.layers[0].parameters()),
        embedding=config.vocab_size * config.hidden_size,
        vocabulary=config.vocab_size,
        widest=max(m.weight.numel() for m in linear.values()),
        # Keys and values of all layers, in 2 bytes
        cache=config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 2,
        heads=config.num_attention_heads * head_dim,
        lora={},
    )
    if kind is Qwen2ForCausalLM:
        with torch.device("meta"):
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        values.lora[16] = numel(p for p in model.parameters() if p.requires_grad)
    return values


@cache
def kept_by_a_layer(name: str, lora: bool) -> int:
    """Bytes per token that one layer of full width keeps for its backward pass, in bf16."""
    kind, config = MODELS[name]
    config = config.__class__(**{**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 8, "layer_types": None})
    with torch.device("meta"):
        model = kind(config).bfloat16()
        if lora:
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    layer = (model.get_base_model() if lora else model).to_empty(device="cpu").model.layers[0].train()
    length = 24  # no size of a model
    hidden = torch.zeros(1, length, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotation = (torch.zeros(1, length, head_dim, dtype=torch.bfloat16),) * 2
    mask = torch.ones(1, 1, length, length, dtype=torch.bool)
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *rotation)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        # Weights, also those that autocast has cast, are counted elsewhere, and so is the mask
        if storage.data_ptr() not in shared and length in tensor.shape and tensor.shape[-2:] != mask.shape[-2:]:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(hidden, attention_mask=mask, position_embeddings=rotation)
    assert sum(kept.values()) % length == 0
    return sum(kept.values()) // length


def recipe(name: str) -> dict:
    return yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())


def budget(name: str) -> dict[str, float]:
    """Bytes on a GPU, by what takes them. What is there in one phase only begins with that phase and a colon."""
    options = recipe(name)
    gpu, processes = GPU.get(name, 80e9), options.get("num_processes", 1)
    policy = facts(options["model_name_or_path"])
    reward = facts(options["reward_model_name_or_path"]) if "//" not in options["reward_model_name_or_path"] else None
    lora, in_4_bit = options.get("use_peft", False), options.get("load_in_4bit", False)
    zero3 = options.get("accelerate_config") == "zero3"
    rows: dict[str, float] = {}

    assert options["dtype"] == "bfloat16" and options["gradient_checkpointing"] and options["bf16"]
    if in_4_bit:
        assert options["bnb_4bit_quant_type"] == "nf4" and options["use_bnb_nested_quant"]
        rows["policy, matrices in NF4"] = policy.matrices * NF4
        rows["policy, the rest in bf16"] = (policy.parameters - policy.matrices) * 2
    elif lora:
        rows["policy, bf16"] = policy.parameters * 2
    if lora:
        assert options["lora_target_modules"] == "all-linear"
        rows["adapter, with gradient and AdamW"] = policy.lora[options["lora_r"]] * (8 if in_4_bit else 16)
    else:
        rows["policy, with gradient and AdamW"] = policy.parameters * 16 / processes
    if reward is not None and options.get("reward_quantization") == "8bit":
        rows["reward model, matrices in 8 bit"] = reward.matrices
        rows["reward model, the rest in bf16"] = (reward.parameters - reward.matrices) * 2
    elif reward is not None:
        assert "reward_quantization" not in options
        rows["reward model, bf16"] = reward.parameters * 2 / (processes if zero3 else 1)

    completion = options["max_completion_length"]
    if options.get("vllm_mode") == "colocate":
        assert options["vllm_enable_sleep_mode"]
        text, padded = options["vllm_max_model_length"], options["vllm_max_model_length"] + completion
        rows["generating: vLLM"] = options["vllm_gpu_memory_utilization"] * gpu
    elif options.get("vllm_mode") == "server":
        header = (ROOT / "recipes" / f"{name}.yaml").read_text()
        text = int(re.search(r"--max-model-len (\d+)", header)[1])
        padded = text + completion
    else:
        assert not options.get("use_vllm")
        text = padded = ASSUMED_PROMPT + completion
        batch = options["per_device_train_batch_size"] * options["steps_per_generation"]
        chunk = options.get("generation_kwargs", {}).get("prefill_chunk_size", ASSUMED_PROMPT)
        layer = kept_by_a_layer(options["model_name_or_path"], lora)
        rows["reading prompts: cache, one layer, mask"] = (
            batch * (ASSUMED_PROMPT * policy.cache + chunk * layer) + batch * chunk * ASSUMED_PROMPT * 3
        )
        rows["generating: cache"] = batch * padded * policy.cache
        rows["generating: of one layer, for all heads"] = batch * padded * policy.heads * 2 * 2

    if reward is not None:
        layer = kept_by_a_layer(options["reward_model_name_or_path"], False)
        scored = options["reward_batch_size"]
        rows["scoring: one layer, mask"] = scored * text * layer + scored * text**2 * 3

    micro_batch = options["per_device_train_batch_size"]
    layer = kept_by_a_layer(options["model_name_or_path"], lora)
    rows["training: inputs of all layers, one layer twice, mask"] = (
        micro_batch * padded * (policy.layers * policy.hidden * 2 + 2 * layer) + micro_batch * padded**2 * 3
    )
    if in_4_bit:
        rows["training: a matrix in bf16"] = policy.widest * 2
    if options.get("accelerate_config") == "fsdp2":
        rows["training: gathered"] = (2 * policy.layer + policy.embedding) * 4
    if zero3:
        rows["training: gathered"] = 1_000_000_000 * 2 + 500_000_000 * 2  # DeepSpeed's defaults, see the page
    if not lora:
        rows["training: head"] = policy.embedding * (2 + 4 + 2)
    return rows


def total(rows: dict[str, float]) -> tuple[float, str]:
    """The most at a time, and in which phase."""
    phases: dict[str, float] = {}
    for name, value in rows.items():
        if ": " in name:
            phase = name.split(": ")[0]
            phases[phase] = phases.get(phase, 0) + value
    phase = max(phases, key=phases.__getitem__)
    return sum(value for name, value in rows.items() if ": " not in name) + phases[phase], phase


def evaluate(arithmetic: str) -> float:
    """The value of what is written in a table."""
    python = arithmetic.replace(",", "").replace("×", "*").replace("²", "**2")
    assert re.fullmatch(r"[\d.+*/() -]+", python), arithmetic
    return eval(python)


def table(heading: str) -> list[list[str]]:
    """Cells of the table under a heading."""
    sections = dict(re.findall(r"^##+ (.+?)\n(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
    rows = [line for line in sections[heading].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]  # below the head and its line


RECIPES = sorted(
    str(path.relative_to(ROOT / "recipes").with_suffix("")) for path in (ROOT / "recipes").glob("*/*.yaml")
)


@pytest.mark.parametrize("name", RECIPES)
def test_budgets(name):
    expected = budget(name)
    *rows, (last, _, most) = [row for row in table(f"`{name}.yaml`") if not row[0].startswith("the other GPU")]
    assert [row[0] for row in rows] == list(expected)
    for what, arithmetic, gigabytes in rows:
        assert evaluate(arithmetic) == pytest.approx(expected[what], rel=1e-9), what
        assert gigabytes == f"{expected[what] / 1e9:.2f}", what
    value, phase = total(expected)
    assert last == f"**sum, while {phase}**" and most == f"**{value / 1e9:.1f}**"
    # 10 % for what the page says it does not count
    assert value < 0.9 * GPU.get(name, 80e9)
    header = (ROOT / "recipes" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert f"{value / 1e9:.0f} GB" in header.split("By arithmetic")[1]


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_is_not_the_peak(name):
    """The page leaves out what the log-probabilities take, since another moment of the same pass takes more."""
    options = recipe(name)
    policy = facts(options["model_name_or_path"])
    micro_batch, completion = options["per_device_train_batch_size"], options["max_completion_length"]
    padded = (4096 if options.get("use_vllm") else ASSUMED_PROMPT) + completion
    tile = min(TOKEN_CHUNK_SIZE, micro_batch * completion) * _CHUNKED_LOGPROB_CHUNK_SIZE * 2
    # The final norm keeps float32 and two in bf16; the hidden states of the completions, and their gradient in both
    head = tile + micro_batch * (padded * policy.hidden * 8 + completion * policy.hidden * 8)
    layer = kept_by_a_layer(options["model_name_or_path"], options.get("use_peft", False))
    assert head < micro_batch * padded * 2 * layer


def test_models():
    rows = {row[0].strip("`"): row[1:] for row in table("The models")}
    assert rows.keys() == {name.split("/")[1] for name in MODELS}
    for name in MODELS:
        known = facts(name)
        values = [known.parameters, known.matrices, known.cache]
        values += [known.lora[16]] if known.lora else [None]
        if name == SERVED:
            values += [None]
        elif known.lora:
            values += [kept_by_a_layer(name, True)]
        else:
            values += [kept_by_a_layer(name, False)]
        expected = ["" if value is None else f"{value:,}" for value in values]
        assert rows[name.split("/")[1]] == expected, name
    # What the model cards say: billions of parameters, and without embeddings
    cards = {"Qwen/Qwen2.5-7B-Instruct": (7.61, 6.53), "Qwen/Qwen2.5-0.5B-Instruct": (0.49, 0.36)}
    cards |= {"Skywork/Skywork-Reward-V2-Qwen3-4B": (4.0, 3.6), "Skywork/Skywork-Reward-V2-Qwen3-0.6B": (0.6, 0.44)}
    for name, (all_of_them, without_embeddings) in cards.items():
        assert facts(name).parameters / 1e9 == pytest.approx(all_of_them, rel=0.01)
        assert facts(name).matrices / 1e9 == pytest.approx(without_embeddings, rel=0.01)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "Skywork/Skywork-Reward-V2-Qwen3-4B"])
def test_bitsandbytes_quantizes_the_matrices_of_the_layers(name):
    kind, config = MODELS[name]
    with torch.device("meta"):
        model = kind(config)
    options = recipe("qwen2.5-7b-instruct/qlora-24gb")
    if kind is Qwen2ForCausalLM:
        quantization = get_quantization_config(ModelConfig(dtype="bfloat16", load_in_4bit=options["load_in_4bit"]))
    else:
        quantization = _quantization_config(options["reward_quantization"])
    left = HfQuantizer.get_modules_to_not_convert(model, quantization.llm_int8_skip_modules)
    replace_with_bnb_linear(model, left, quantization)
    replaced = [module for module in model.modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert sum(module.in_features * module.out_features for module in replaced) == facts(name).matrices


def test_nf4_takes_what_the_page_says():
    weights, state = bnb.quantize_4bit(torch.randn(1024, 1024), quant_type="nf4", compress_statistics=True)
    scales = state.absmax.nbytes + state.state2.absmax.nbytes
    assert weights.nbytes + scales == 1024 * 1024 * NF4
    assert re.search(r"1/2 \+ 1/64 \+ 4/\(64 × 256\) = ([\d.]+)", PAGE)[1] == f"{NF4:.4f}"


def test_served_reward_model_and_vllm_server():
    policy, reward = facts("Qwen/Qwen2.5-7B-Instruct"), facts(SERVED)
    for name, model in [("vllm-server", policy), ("served-reward-model", reward)]:
        rows = [row for row in table(f"`qwen2.5-7b-instruct/{name}.yaml`") if row[0].startswith("the other GPU")]
        values = [0.92 * 80e9, model.parameters * 2]  # vLLM's default, and what of it the weights take
        assert [evaluate(row[1]) for row in rows] == values
        assert [row[2] for row in rows] == [f"{value / 1e9:.2f}" for value in values]
        header = (ROOT / "recipes" / "qwen2.5-7b-instruct" / f"{name}.yaml").read_text()
        assert f"{values[0] / 1e9:.0f} GB" in header.split("By arithmetic")[1].replace("\n# ", " ")


def test_equations_in_the_text():
    """Wherever the text says that arithmetic equals GB, it does; and the numbers are those of the models."""
    text = re.sub(r"\s+", " ", PAGE)
    found = {
        arithmetic: float(value)
        for arithmetic, value in re.findall(r"`([\d,.× +/()²-]+)` = ([\d.]+) GB", text)
    }  # fmt: skip
    policy = facts("Qwen/Qwen2.5-7B-Instruct")
    options = recipe("qwen2.5-7b-instruct/lora")
    micro_batch, completion = options["per_device_train_batch_size"], options["max_completion_length"]
    expected = {
        "logits": micro_batch * completion * policy.vocabulary * 4,
        "tile": TOKEN_CHUNK_SIZE * _CHUNKED_LOGPROB_CHUNK_SIZE * 2,
        "head": policy.embedding * (2 + 4 + 2),
        "whole gradients": policy.parameters * 2,
        "copy in CPU memory": policy.matrices * 2,
    }
    for arithmetic, value in found.items():
        assert round(evaluate(arithmetic) / 1e9, 2) == value, arithmetic
    assert sorted(map(evaluate, found)) == sorted(expected.values())
    rest = options["vllm_gpu_memory_utilization"] * 80e9 - policy.parameters * 2
    longest = int(rest // (options["vllm_max_model_length"] * policy.cache))
    assert f"at most {longest} completions of {options['vllm_max_model_length']:,} tokens" in text
    full = kept_by_a_layer("Qwen/Qwen2.5-7B-Instruct", False)
    assert f"{full:,} bytes per token without LoRA" in text


def test_long_prompts_are_left_out(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert f"<= {ASSUMED_PROMPT}" in code and f"{ASSUMED_PROMPT:,} tokens" in PAGE
    prompts = [[{"role": "user", "content": "a" * length}] for length in (3, 1000, 1030)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Dataset.from_dict({"prompt": prompts}))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: make_tokenizer())
    exec(code, {})
    assert load_dataset("prompts", split="train", cache_dir=str(tmp_path))["prompt"] == prompts[:2]
