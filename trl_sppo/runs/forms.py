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
    then, now = dict(then), dict(now)
    found = []
    weights = then.pop("base_weights", None), now.pop("base_weights", None)
    if None not in weights:
        if weights[0] != weights[1]:
            found.append(f"the base model was {then['base']!r}, now {now['base']!r} with other weights")
        then.pop("base", None)  # it may have been moved
    for name, problem in (
        ("initial_adapter", "the adapter that the run began with was another one"),
        ("tokenizer", "the tokenizer or its chat template was another one"),
    ):
        each = then.pop(name, None), now.pop(name, None)
        if None not in each and each[0] != each[1]:
            found.append(problem)
    adapters = [form.pop("adapter") for form in (then, now) if "adapter" in form]
    if len(adapters) == 2:
        old, new = adapters
        if (old is None) != (new is None):
            words = ["the whole policy" if each is None else f"an adapter ({each['peft_type']})" for each in adapters]
            found.append(f"{words[0]} was trained, now {words[1]}")
        elif old is not None:
            found += [
                f"the adapter's {name} was {old[name]!r}, now {new[name]!r}"
                for name in old.keys() & new.keys()
                if old[name] != new[name]
            ]
    return found + [
        f"{name} was {then[name]!r}, now {now[name]!r}" for name in then if then[name] != now.get(name, then[name])
    ]
