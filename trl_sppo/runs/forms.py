"""What a run trains: its base model, its adapter, its optimizer. A checkpoint fits only a run of the same form."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers.training_args import OptimizerNames


# Of an adapter's configuration: what may differ between a checkpoint and the run that resumes it
_FREE = {
    "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version",
    "lora_dropout",
}  # fmt: skip
# And what PEFT leaves as it is when it adds the adapter to a model. It settles the rest
_SETTLED = {"peft_type", "r", "lora_alpha", "bias", "lora_bias", "init_lora_weights", "use_dora", "use_rslora"}
# What only the hash is known of, if that
_HASHED = {
    "base_weights": "the base model",
    "initial_adapter": "the adapter that the run began with",
    "tokenizer": "the tokenizer or its chat template",
}
_BLOCKS, _BLOCK = 64, 4096  # of each file of weights: so many blocks are read, of so many bytes


def form_of(
    args: Any,
    model: str | nn.Module,
    peft_config: Any = None,  # of the adapter that is to be added
    optimizer: Any = None,  # in the place of args.optim
    bits: int | None = None,  # 8 or 4, if the base model is quantized
    continued: str | None = None,  # folder of the adapter that the run began with
) -> dict[str, Any]:
    """Describe, as JSON can, what a run trains. `model` is the policy, before or after its adapter is added."""
    is_added = peft_config is None and hasattr(model, "peft_config")
    if is_added:
        peft_config = next(iter(cast(Any, model).peft_config.values()))
    path = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    adapter = None
    if peft_config is not None:
        settled = peft_config.to_dict()
        names = settled.keys() - _FREE if is_added else settled.keys() & _SETTLED
        adapter = {name: settled[name] for name in sorted(names)}
    form: dict[str, Any] = {"adapter": adapter, "bits": bits, "optim_args": args.optim_args}
    if adapter is not None or args.beta > 0:  # otherwise nothing of it is left
        form |= {"base": path, "base_weights": fingerprint(path)}
    if args.beta > 0:  # the initial policy is not in the checkpoint
        form["initial_adapter"] = fingerprint(continued or "")
    # Both forms of torch's AdamW have the same state
    name = OptimizerNames(args.optim).value.removesuffix("_fused")
    form["optim"] = name if optimizer is None else type(optimizer).__name__
    sharding = (
        name
        for name in ("fsdp", "deepspeed")
        if getattr(args, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true"
    )
    form["sharding"] = next(sharding, None)
    return json.loads(json.dumps(form, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def digest(*facts: Any) -> str:
    """The same for the same facts."""
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def fingerprint(folder: str) -> str | None:
    """The same for the same weights, wherever they are: of blocks of each file. `None` where there are no files."""
    files = sorted(Path(folder).glob("*.safetensors")) if folder else []
    hashed = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for i in range(_BLOCKS):
                file.seek(max(size - _BLOCK, 0) * i // (_BLOCKS - 1))
                hashed.update(file.read(_BLOCK))
    return hashed.hexdigest()[:16] if files else None


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what is known of two forms and differs."""
    then, now = _flat(then), _flat(now)
    if then.get("base_weights") is not None and then["base_weights"] == now.get("base_weights"):
        del then["base"]  # it may have been moved
    found = []
    for name in [name for name in then if name in now and then[name] != now[name]]:
        if name not in _HASHED:
            found.append(f"{name} was {then[name]!r}, now {now[name]!r}")
        elif None not in (then[name], now[name]):
            found.append(f"{_HASHED[name]} was another one")
    return found


def _flat(form: dict[str, Any]) -> dict[str, Any]:
    if "adapter" not in form:
        return dict(form)
    adapter = form["adapter"] or {}
    details = {f"the adapter's {name}": value for name, value in adapter.items() if name != "peft_type"}
    return {**form, "adapter": adapter.get("peft_type"), **details}
