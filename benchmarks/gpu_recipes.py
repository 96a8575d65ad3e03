"""The recipes on one GPU: memory and time of each phase of an iteration, beside the arithmetic of `trl-sppo check`."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from gpu_tools import (
    ON_GPU,
    ROOT,
    Meter,
    Rollouts,
    WarmUp,
    args,
    checkpoint,
    config_of,
    emit,
    gb,
    longest_completion,
    longest_prompt,
    prompts,
    synchronize,
)

import trl_sppo.trainer
from trl_sppo import SPPOTrainer, train
from trl_sppo.planning.plan import Plan, read


ROLLOUT = ("generating", "weight sync", "scoring", "rest of the rollout")
# Dense bf16 tensor operations per second, by NVIDIA's data sheets of the SXM cards
BF16_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def recipe(case: str, use_vllm: bool) -> None:
    """Two iterations of a recipe, each of one optimizer step, through the code that `trl-sppo train` runs."""
    path = ROOT / "recipes" / f"{case}.yaml"
    options = yaml.safe_load(path.read_text())
    longest = longest_completion(options["max_completion_length"])
    micro, steps = options["per_device_train_batch_size"], options["gradient_accumulation_steps"]
    micro, steps = (4, 4) if args.rehearse else (micro, steps)
    rows = micro * steps
    folder = Path(args.work) / f"prompts-{rows}"
    if not folder.exists():
        folder.mkdir()
        prompts(2 * rows // 8, rows // 8).to_parquet(folder / "train.parquet")
    given = {
        "model_name_or_path": checkpoint(options["model_name_or_path"]),
        "reward_model_name_or_path": checkpoint(options["reward_model_name_or_path"]),
        "dataset_name": folder, "output_dir": Path(args.work) / f"run-{case.replace('/', '-')}", "max_steps": 2,
        "per_device_train_batch_size": micro, "steps_per_generation": steps, "gradient_accumulation_steps": steps,
        "shuffle_dataset": False, "max_completion_length": longest, "save_strategy": "no", "logging_steps": 1,
        "log_completions": False, "use_vllm": use_vllm, "report_to": "none",
    }  # fmt: skip
    if use_vllm:
        given["vllm_max_model_length"] = longest_prompt() + longest
    if args.rehearse:
        given |= {"use_cpu": True, "bf16": False, "dtype": "float32"}
    argv = ["--config", str(path), *(str(part) for name, value in given.items() for part in (f"--{name}", value))]
    total = torch.cuda.get_device_properties(0).total_memory if ON_GPU else 80e9
    plan = read(str(path), argv[2:], total, longest_prompt())

    meter, rollouts = Meter(), Rollouts(longest, rows)
    tokens: dict[str, int] = defaultdict(int)
    sampler, planned = "vLLM" if use_vllm else "transformers", _arithmetic(plan)

    def emit_phases(of_rollout: bool) -> None:
        if not rollouts.is_warm:
            return
        for phase in [phase for phase in meter.seconds if (phase in ROLLOUT) == of_rollout]:
            # vLLM's memory that sleeps still counts as allocated, and is not
            allocated = meter.allocated[phase] if ON_GPU and not use_vllm else None
            arithmetic = planned.get(phase)
            emit(
                "Recipes: seconds, and peaks of memory in GB, of an iteration",
                recipe=case, sampler=sampler, phase=phase, seconds=round(meter.seconds[phase], 2),
                allocated=gb(allocated), used_on_the_card=gb(meter.used[phase]), by_arithmetic=gb(arithmetic),
                allocated_of_arithmetic=round(allocated / arithmetic, 3) if allocated and arithmetic else None,
            )  # fmt: skip

    _count_tokens(tokens)
    meter.wrap(SPPOTrainer, "_generate_single_turn", "generating")
    meter.wrap(SPPOTrainer, "_calculate_rewards", "scoring")
    meter.wrap(SPPOTrainer, "_generate_and_score_completions", "rest of the rollout")
    _call_after(SPPOTrainer, "_generate_and_score_completions", lambda: emit_phases(of_rollout=True))
    meter.wrap(SPPOTrainer, "training_step", "training")
    start = synchronize()
    with rollouts.at_work():
        trainer = train.build_trainer(argv)
        if use_vllm:
            rollouts.end_vllm(trainer.vllm_generation.llm)
            meter.wrap(trainer.vllm_generation, "sync_weights", "weight sync")
        loaded = synchronize()
        trainer.add_callback(WarmUp(meter, rollouts, tokens.clear))
        trainer.train()

    assert tokens["trained"], "nothing was trained on: the reward model tells no completions apart"
    emit_phases(of_rollout=False)
    assert plan.policy is not None
    head = plan.policy.embedding  # of completions only; an embedding that is not the head multiplies nothing
    tied = config_of(options["model_name_or_path"]).tie_word_embeddings
    layers = plan.policy.parameters - head * (1 if tied else 2)
    # Forward 2 and backward 4 per weight and token; frozen weights have no gradient. Recomputation does not count
    operations = (4 if options.get("use_peft") else 6) * (layers * tokens["trained"] + head * tokens["completion"])
    peak = next((value for name, value in BF16_PEAKS.items() if ON_GPU and name in torch.cuda.get_device_name()), None)
    emit(
        "Recipes: speed",
        recipe=case, sampler=sampler, start_s=round(loaded - start, 1),
        iteration_s=round(sum(meter.seconds.values()), 1), completions=rows,
        generated_tokens=rollouts.tokens, generated_per_s=rollouts.tokens / meter.seconds["generating"],
        trained_tokens=tokens["trained"], trained_per_s=tokens["trained"] / meter.seconds["training"],
        columns_per_token=round(tokens["columns"] / tokens["trained"], 2),
        of_bf16_peak=peak and round(operations / meter.seconds["training"] / peak, 3),
    )  # fmt: skip


def _call_after(owner: Any, method: str, work: Callable[[], Any]) -> None:
    original = getattr(owner, method)

    def called(*args, **kwargs):
        result = original(*args, **kwargs)
        work()
        return result

    setattr(owner, method, called)


def _count_tokens(tokens: dict[str, int]) -> None:
    """Count the tokens that are trained on, and the columns that are computed for them."""
    loss, log_probs = SPPOTrainer._compute_loss, trl_sppo.trainer.log_probs

    def compute_loss(self, model, inputs):
        prompt, completion = (int(inputs[f"{part}_mask"][inputs["kept"]].sum()) for part in ("prompt", "completion"))
        tokens["trained"] += prompt + completion
        tokens["completion"] += completion
        tokens["in the loss"] = True
        try:
            return loss(self, model, inputs)
        finally:
            tokens["in the loss"] = False

    def count(model, ids, mask, *args):
        tokens["columns"] += len(ids) * int(mask.sum(dim=1).max()) * bool(tokens["in the loss"])
        return log_probs(model, ids, mask, *args)

    SPPOTrainer._compute_loss = compute_loss  # type: ignore[method-assign]
    trl_sppo.trainer.log_probs = count


def _arithmetic(plan: Plan) -> dict[str, float]:
    """The peak of each phase by the arithmetic of `trl-sppo check`, in bytes."""
    if plan.rows is None:  # on a CPU it counts nothing
        return {}
    always = sum(size for name, size in plan.rows.items() if ": " not in name)
    phases: dict[str, float] = defaultdict(float)
    for name, size in plan.rows.items():
        if ": " in name:
            phases[name.split(": ")[0]] += size
    generating = max(phases.get("generating", 0), phases.pop("reading prompts", 0))
    return {name: always + size for name, size in {**phases, "generating": generating}.items()}
