"""Checkpoints that lack some of their model's weights."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment
from transformers.integrations import deepspeed
from transformers.utils import logging

from .adapters import some


@contextmanager
def silent() -> Iterator[None]:
    """Silences transformers' advice to train weights that it has initialized, and its progress bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def whole_and_silent() -> Iterator[None]:
    """Also keeps transformers from dividing the model among processes."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        with silent(), patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def check_weights(what: str, path: str, kind: Any, brought: Collection[str] = (), **kwargs: Any) -> None:
    """
    Raise `ValueError` if a checkpoint lacks weights that no adapter has `brought`: transformers would take random
    numbers. Quantized checkpoints, and paths without safetensors, are not checked.
    """
    config = Path(path, "config.json")
    has_files = config.is_file() and any(config.parent.glob("*.safetensors"))
    if not has_files or "quantization_config" in json.loads(config.read_text()):
        return
    options = {"device_map": "meta", "use_safetensors": True, "output_loading_info": True, **kwargs}
    with whole_and_silent():
        model, info = kind.from_pretrained(path, **options)
    missing = set(info["missing_keys"]) - set(brought)
    if missing:
        raise ValueError(
            f"{what} {path!r} lacks the weights {some(missing)} of a {type(model).__name__}, so they would be random. "
            "Save it again with all of its weights, or pass another checkpoint."
        )
