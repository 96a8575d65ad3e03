"""Configurations of the models that recipes name, from the config.json of each: what needs no hub and no weights."""

import re
from copy import deepcopy
from pathlib import Path

import yaml
from conftest import make_tokenizer
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)


RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _config(kind: type, sizes: tuple[int, ...], vocab_size: int, **more) -> PreTrainedConfig:
    architecture = kind.__name__.removesuffix("Config") + "ForCausalLM"
    if more.get("num_labels") == 1:
        architecture = kind.__name__.removesuffix("Config") + "ForSequenceClassification"
    values = dict(zip(SIZES, sizes, strict=True)) | more
    return kind(**values, vocab_size=vocab_size, architectures=[architecture])


POLICIES = {
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _config(
        LlamaConfig, (2048, 8192, 24, 32, 32), 49152, tie_word_embeddings=True
    ),
    "HuggingFaceTB/SmolLM3-3B": _config(SmolLM3Config, (2048, 11008, 36, 16, 4), 128256, tie_word_embeddings=True),
    "Qwen/Qwen2.5-0.5B-Instruct": _config(Qwen2Config, (896, 4864, 24, 14, 2), 151936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _config(Qwen2Config, (1536, 8960, 28, 12, 2), 151936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B-Instruct": _config(Qwen2Config, (3584, 18944, 28, 28, 4), 152064),
    "Qwen/Qwen3-4B-Instruct-2507": _config(
        Qwen3Config, (2560, 9728, 36, 32, 8), 151936, head_dim=128, tie_word_embeddings=True
    ),
    "Qwen/Qwen3-8B": _config(Qwen3Config, (4096, 12288, 36, 32, 8), 151936, head_dim=128),
    "google/gemma-2-9b-it": _config(
        Gemma2Config, (3584, 14336, 42, 16, 8), 256000, head_dim=256, query_pre_attn_scalar=256,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _config(LlamaConfig, (4096, 14336, 32, 32, 8), 128256),
    "meta-llama/Meta-Llama-3-8B-Instruct": _config(LlamaConfig, (4096, 14336, 32, 32, 8), 128256),
    "mistralai/Mistral-7B-Instruct-v0.2": _config(MistralConfig, (4096, 14336, 32, 32, 8), 32000),
}  # fmt: skip

# Of the Skywork models: those of Qwen3 and Llama-3.1, on which they were trained
REWARD_MODELS = {
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": _config(
        Qwen3Config, (1024, 3072, 28, 16, 8), 151936, head_dim=128, num_labels=1
    ),
    "Skywork/Skywork-Reward-V2-Qwen3-1.7B": _config(
        Qwen3Config, (2048, 6144, 28, 16, 8), 151936, head_dim=128, num_labels=1
    ),
    "Skywork/Skywork-Reward-V2-Qwen3-4B": _config(
        Qwen3Config, (2560, 9728, 36, 32, 8), 151936, head_dim=128, num_labels=1
    ),
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": _config(LlamaConfig, (4096, 14336, 32, 32, 8), 128256, num_labels=1),
}  # fmt: skip

# What the model cards say: billions of parameters
CARDS = {
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1.71,
    "HuggingFaceTB/SmolLM3-3B": 3.08,
    "Qwen/Qwen2.5-0.5B-Instruct": 0.49,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen/Qwen2.5-7B-Instruct": 7.61,
    "Qwen/Qwen3-4B-Instruct-2507": 4.0,
    "Qwen/Qwen3-8B": 8.2,
    "google/gemma-2-9b-it": 9.24,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8.03,
    "mistralai/Mistral-7B-Instruct-v0.2": 7.24,
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": 0.6,
    "Skywork/Skywork-Reward-V2-Qwen3-1.7B": 1.7,
    "Skywork/Skywork-Reward-V2-Qwen3-4B": 4.0,
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": 7.5,
}


def options_of(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def header_of(path: Path) -> str:
    return path.read_text().split("\n\n")[0]


def gpu_of(path: Path) -> float:
    """Memory of a GPU in GB, as the header of a recipe says."""
    (gigabytes,) = set(re.findall(r"GPUs? with (\d+) GB", header_of(path)))
    return float(gigabytes)


def at_hand(path: Path, folder: Path) -> list[str]:
    """Options that give a recipe its models as folders with a configuration and a tokenizer, as from the hub."""
    changed = []
    for option, configs in {"model_name_or_path": POLICIES, "reward_model_name_or_path": REWARD_MODELS}.items():
        name = options_of(path).get(option)
        if name in configs:
            deepcopy(configs[name]).save_pretrained(folder / name)
            make_tokenizer().save_pretrained(folder / name)
            changed += [f"--{option}", str(folder / name)]
    return changed
