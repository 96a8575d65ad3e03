"""docs/memory.md is arithmetic: its numbers are recomputed here, from the models' configurations and the recipes."""

import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import make_tokenizer
from peft import LoraConfig
from recipe_files import POLICIES, RECIPES, REWARD_MODELS, at_hand, gpu_of, header_of, options_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer
from trl import ModelConfig, get_quantization_config
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from trl_sppo.oracles.reward_models import _quantization_config
from trl_sppo.planning.memory import NF4, ModelSize, peak, size_of
from trl_sppo.planning.plan import read


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "memory.md").read_text()

MODELS = [
    "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "Skywork/Skywork-Reward-V2-Qwen3-4B",
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B", "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
]  # fmt: skip
SERVED = "Skywork/Skywork-Reward-V2-Llama-3.1-8B"
ASSUMED_PROMPT = 1024


@cache
def facts(name: str, lora: bool = False) -> ModelSize:
    """What the arithmetic needs to know about a model."""
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    config = deepcopy({**POLICIES, **REWARD_MODELS}[name])
    return size_of(config, adapter, is_reward_model=name in REWARD_MODELS)


def recipe(name: str) -> dict:
    return options_of(RECIPES / f"{name}.yaml")


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


WITH_A_TABLE = re.findall(r"^### `(.+)\.yaml`$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("name", WITH_A_TABLE)
def test_budgets(name, tmp_path):
    path = RECIPES / f"{name}.yaml"
    expected = read(str(path), at_hand(path, tmp_path), gpu_of(path) * 1e9).rows
    *rows, (last, _, most) = [row for row in table(f"`{name}.yaml`") if not row[0].startswith("the other GPU")]
    assert [row[0] for row in rows] == list(expected)
    for what, arithmetic, gigabytes in rows:
        assert evaluate(arithmetic) == pytest.approx(expected[what], rel=1e-9), what
        assert gigabytes == f"{expected[what] / 1e9:.2f}", what
    value, phase = peak(expected)
    assert last == f"**sum, while {phase}**" and most == f"**{value / 1e9:.1f}**"


@pytest.mark.parametrize("name", WITH_A_TABLE)
def test_the_head_is_not_the_peak(name):
    """The page leaves out what the log-probabilities take, since another moment of the same pass takes more."""
    options = recipe(name)
    policy = facts(options["model_name_or_path"])
    micro_batch, completion = options["per_device_train_batch_size"], options["max_completion_length"]
    padded = (4096 if options.get("use_vllm") else ASSUMED_PROMPT) + completion
    tile = min(TOKEN_CHUNK_SIZE, micro_batch * completion) * _CHUNKED_LOGPROB_CHUNK_SIZE * 2
    # The final norm keeps float32 and two in bf16; the hidden states of the completions, and their gradient in both
    head = tile + micro_batch * (padded * policy.hidden * 8 + completion * policy.hidden * 8)
    layer = facts(options["model_name_or_path"], lora=options.get("use_peft", False)).kept
    assert head < micro_batch * padded * 2 * layer


def test_models():
    rows = {row[0].strip("`"): row[1:] for row in table("The models")}
    assert rows.keys() == {name.split("/")[1] for name in MODELS}
    for name in MODELS:
        known = facts(name, lora=name in POLICIES)
        values = [known.parameters, known.matrices, known.cache, known.adapter or None]
        values += [None if name == SERVED else known.kept]
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
    is_policy, config = name in POLICIES, deepcopy({**POLICIES, **REWARD_MODELS}[name])
    with torch.device("meta"):
        model = (AutoModelForCausalLM if is_policy else AutoModelForSequenceClassification).from_config(config)
    options = recipe("qwen2.5-7b-instruct/qlora-24gb")
    if is_policy:
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
    assert weights.nbytes + scales == 1024 * 1024 * NF4[True]
    assert re.search(r"1/2 \+ 1/64 \+ 4/\(64 × 256\) = ([\d.]+)", PAGE)[1] == f"{NF4[True]:.4f}"


def test_served_reward_model_and_vllm_server():
    policy, reward = facts("Qwen/Qwen2.5-7B-Instruct"), facts(SERVED)
    for name, model in [("vllm-server", policy), ("served-reward-model", reward)]:
        rows = [row for row in table(f"`qwen2.5-7b-instruct/{name}.yaml`") if row[0].startswith("the other GPU")]
        values = [0.92 * 80e9, model.parameters * 2]  # vLLM's default, and what of it the weights take
        assert [evaluate(row[1]) for row in rows] == values
        assert [row[2] for row in rows] == [f"{value / 1e9:.2f}" for value in values]
        header = header_of(RECIPES / "qwen2.5-7b-instruct" / f"{name}.yaml")
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
        "logits": micro_batch * completion * (policy.embedding // policy.hidden) * 4,
        "tile": TOKEN_CHUNK_SIZE * _CHUNKED_LOGPROB_CHUNK_SIZE * 2,
        "head": policy.embedding * (2 + 4 + 2),
        "whole gradients": policy.parameters * 2,
        "copy in a weight sync": 3 * policy.widest * 4,
    }
    for arithmetic, value in found.items():
        assert round(evaluate(arithmetic) / 1e9, 2) == value, arithmetic
    assert sorted(map(evaluate, found)) == sorted(expected.values())
    rest = options["vllm_gpu_memory_utilization"] * 80e9 - policy.parameters * 2
    longest = int(rest // (options["vllm_max_model_length"] * policy.cache))
    assert f"at most {longest} completions of {options['vllm_max_model_length']:,} tokens" in text
    full = facts("Qwen/Qwen2.5-7B-Instruct").kept
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
