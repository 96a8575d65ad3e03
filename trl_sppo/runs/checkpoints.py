"""Checkpoints: whole and torn ones, and the runs that can resume from them."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..files import _now, read_beginning, write_atomically


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"  # in each checkpoint
FORMAT = 4  # of a checkpoint's files besides transformers' own
REPLACED = ".replaced"  # a whole checkpoint, while one of the same step is being written

# Options that determine, with the number of processes, how an iteration is divided. They may differ between a
# checkpoint and the run that resumes it, if what is named here still holds as many completions
SIZES = {"gradient_accumulation_steps": "an optimizer step", "steps_per_generation": "an iteration"}
DIVIDED_BY = ("num_processes", "per_device_train_batch_size", *SIZES)
LAYOUT = ("num_generations", "num_iterations", "keep_groups_together")  # must not differ

# Settings of an adapter that may differ between a checkpoint and the run that resumes it
_FREE = {
    "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version",
    "lora_dropout",
}  # fmt: skip
# Settings that PEFT keeps when it adds the adapter to a model. It completes the others
_SETTLED = {"peft_type", "r", "lora_alpha", "bias", "lora_bias", "init_lora_weights", "use_dora", "use_rslora"}
# Facts of which at most a hash is known
_HASHED = {
    "base_weights": "the base model",
    "initial_adapter": "the adapter that the run began with",
    "tokenizer": "the tokenizer or its chat template",
}
_BLOCKS, _BLOCK = 64, 4096  # blocks to read of each file of weights, and bytes of a block


def write_manifest(checkpoint: Path, step: int, args: Any, form: dict[str, Any], can_be_divided: bool = True) -> None:
    """
    Declare a checkpoint whole, with facts for a run that resumes from it. It is written last. `can_be_divided` is
    whether its rollouts can be dealt out to other processes.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    manifest = {
        "format": FORMAT,
        "written_at": _now(),
        "files": {str(path.relative_to(checkpoint)): path.stat().st_size for path in files},
        "step": step,
        "can_be_resumed": not args.save_only_model,
        "can_be_divided": can_be_divided,
        "layout": layout_of(args),
        "form": form,
    }
    write_atomically(checkpoint / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises `ValueError`, with the reason, if the checkpoint is torn."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"it has no {MANIFEST}, which is written last") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read: {error}") from error
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"its file {name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"its file {name} has {path.stat().st_size} bytes instead of {size}")
    return manifest


def _checkpoints(folder: str | Path) -> tuple[dict[Path, str], dict[Path, str]]:
    """Whole checkpoints of the last run in a folder, with their time; and why the others do not count."""
    began_at = read_beginning(str(folder)).get("began_at", "")
    whole: dict[Path, str] = {}
    others: dict[Path, str] = {}
    for path in Path(folder).glob("checkpoint-*"):
        if path.is_dir() and _step(path) >= 0:
            try:
                written_at = read_manifest(path)["written_at"]
            except ValueError as error:
                others[path] = f"is torn ({error})"
                continue
            if written_at >= began_at:
                whole[path] = written_at
            else:
                others[path] = "is an earlier run's"
    return whole, others


def last_whole_checkpoint(folder: str) -> Path | None:
    """The last whole checkpoint of the last run in a folder."""
    whole, _ = _checkpoints(folder)
    return max(whole, key=lambda path: whole[path], default=None)


def checkpoints_of_run(folder: str) -> dict[int, Path]:
    """By step, the whole checkpoints of the last run in a folder; all if no SPPOTrainer wrote it."""
    whole, others = _checkpoints(folder)
    if not read_beginning(folder):
        return {_step(path): path for path in (*whole, *others)}
    for path, why in others.items():
        logger.warning_once(f"{path} {why} and is left out.")
    return {_step(path): path for path in whole}


def find_checkpoint(resume_from_checkpoint: Any, output_dir: str) -> str | None:
    """The requested checkpoint, which must be whole, or with `True` the last whole one in `output_dir`, if any."""
    if not resume_from_checkpoint or str(resume_from_checkpoint).lower() == "false":
        return None
    if str(resume_from_checkpoint).lower() != "true":
        try:
            read_manifest(Path(resume_from_checkpoint))
        except ValueError as error:
            raise ValueError(
                f"resume_from_checkpoint must be a checkpoint's folder, got {str(resume_from_checkpoint)!r}: {error}. "
                "Pass another one, or `true` for the last whole one in output_dir."
            ) from error
        return str(resume_from_checkpoint)
    whole, others = _checkpoints(output_dir)
    found = max(whole, key=lambda path: whole[path], default=None)
    for path, why in others.items():
        if found is None or _step(path) >= _step(found):
            logger.warning_once(f"{path} {why}. Continuing from {found or 'the start'}.")
    if found is None:
        logger.warning_once(f"There is no checkpoint in {output_dir} yet: the run begins at step 0.")
    return None if found is None else str(found)


def layout_of(args: Any) -> dict[str, int]:
    """How a run with these arguments cuts an iteration into micro-batches."""
    return {"num_processes": args.world_size, **{name: getattr(args, name) for name in (*DIVIDED_BY[1:], *LAYOUT)}}


def sizes(layout: dict[str, int]) -> str:
    """How a layout divides an iteration, in words."""
    return ", ".join(f"{name}={layout[name]}" for name in DIVIDED_BY)


def _other_work(then: dict[str, int], now: dict[str, int]) -> list[str]:
    """Differences of two layouts in words, besides other ways to divide the same completions."""
    found = []
    for option, whole in SIZES.items():
        had, has = (
            layout["num_processes"] * layout["per_device_train_batch_size"] * layout[option] for layout in (then, now)
        )
        if had != has:
            found.append(f"{whole} had {had} completions ({sizes(then)}), now {has} ({sizes(now)})")
    return found + differences(*({name: layout[name] for name in LAYOUT} for layout in (then, now)))


def check_fits(checkpoint: str, args: Any, form: dict[str, Any] | None = None) -> None:
    """Raise `ValueError` if a run with these arguments, and this form as far as it is known, cannot continue."""
    manifest = read_manifest(Path(checkpoint))
    if not manifest["can_be_resumed"]:
        problem = "was saved with save_only_model=True, without the optimizer"
    elif manifest.get("format") != FORMAT:
        problem = "was written by another version of trl_sppo, with its rollouts and counters in another form"
    elif args.sync_ref_model and (form or {}).get("sharding"):
        problem = "does not hold the reference model, which sync_ref_model=True has changed and which is sharded"
    else:
        layout = {"keep_groups_together": False, **manifest["layout"]}  # older checkpoints do not name it
        now, sharding = layout_of(args), (form or {}).get("sharding")
        changed = _other_work(layout, now) + differences(manifest.get("form", {}), form or {})
        if not changed and not manifest.get("can_be_divided", True) and sizes(layout) != sizes(now):
            raise ValueError(
                f"{checkpoint} holds an iteration with images, which cannot be divided in another way: it was written "
                f"with {sizes(layout)}, now {sizes(now)}. Restore these, or resume from a checkpoint between two "
                "iterations."
            )
        if sharding == "deepspeed":  # which saves the optimizer by process
            changed += differences(*({"num_processes": each["num_processes"]} for each in (layout, now)))
        if not changed:
            return
        problem = f"belongs to a run with other options ({'; '.join(changed)}), whose state it holds"
    raise ValueError(
        f"{checkpoint} {problem}: this run cannot continue from it. Restore the options or the version, or begin a "
        f"new run from its weights with model_name_or_path={checkpoint!r} and another output_dir."
    )


def check_resume(args: Any, form: dict[str, Any] | None = None) -> None:
    """Raise `ValueError` if the checkpoint to resume from is missing, or belongs to a different run."""
    checkpoint = find_checkpoint(args.resume_from_checkpoint, str(args.output_dir))
    if checkpoint is not None:
        check_fits(checkpoint, args, form)


def how_to_go_on(output_dir: str) -> str:
    """How to continue a run that has ended."""
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is not None and not read_manifest(checkpoint)["can_be_resumed"]:
        return (
            f"The last checkpoint is {checkpoint}, of the model alone (save_only_model): a new run can begin with it."
        )
    place = "There is no checkpoint yet" if checkpoint is None else f"The last checkpoint is {checkpoint}"
    return (
        f"{place}; the same command with --resume_from_checkpoint true continues (in Python: "
        "`trainer.train(resume_from_checkpoint=True)`)."
    )


def _step(path: Path) -> int:
    """The optimizer step of a checkpoint, -1 if the folder is none."""
    match = re.fullmatch(rf"checkpoint-(\d+)(?:{re.escape(REPLACED)})?", path.name)
    return int(match[1]) if match else -1


def form_of(
    args: Any,
    model: str | nn.Module,
    peft_config: Any = None,  # of the adapter that is to be added
    optimizer: Any = None,  # instead of args.optim
    bits: int | None = None,  # 8 or 4, if the base model is quantized
    continued: str | None = None,  # folder of the adapter that the run began with
) -> dict[str, Any]:
    """Describe the trained model of a run for JSON. `model` is the policy, before or after its adapter is added."""
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
    if args.beta > 0:  # the initial policy is in the checkpoint only if it moves
        form["initial_adapter"] = fingerprint(continued or "")
        form["sync_ref_model"] = args.sync_ref_model
    # Both forms of torch's AdamW have the same state
    name = OptimizerNames(args.optim).value.removesuffix("_fused")
    form["optim"] = name if optimizer is None else type(optimizer).__name__
    form["sharding"] = None
    for each in ("fsdp", "deepspeed"):
        if getattr(args, each) or os.environ.get(f"ACCELERATE_USE_{each.upper()}", "").lower() == "true":
            form["sharding"] = each
    return json.loads(json.dumps(form, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def digest(*facts: Any) -> str:
    """A hash of facts."""
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def fingerprint(folder: str) -> str | None:
    """A hash of blocks of each file of weights. `None` if there are no files."""
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
    """Known differences between two forms, in words."""
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
