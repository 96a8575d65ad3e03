"""The recipes, and the published configurations of their models for them."""

import re
import sys
from copy import deepcopy
from pathlib import Path

import yaml
from helpers import make_tokenizer


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from published_models import POLICIES, REWARD_MODELS  # noqa: E402


RECIPES = ROOT / "recipes"

# What the model cards say: billions of parameters
CARDS = {
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1.71,
    "HuggingFaceTB/SmolLM3-3B": 3.08,
    "Qwen/Qwen2.5-0.5B-Instruct": 0.49,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen/Qwen2.5-7B-Instruct": 7.61,
    "Qwen/Qwen3-4B-Instruct-2507": 4.0,
    "Qwen/Qwen3-4B-Thinking-2507": 4.0,
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
