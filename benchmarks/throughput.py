"""What SPPOTrainer costs beside TRL's trainers at the same work, and what of it is this package's own code.

    trl-sppo quickstart                      # once: prepares the models in ./quickstart
    python benchmarks/throughput.py          # all parts, half an hour; --parts win_rates is quick

Trainers run in processes of their own, in turns. Times are CPU time of one thread: waiting for others does not count.
Work: SmolLM2-135M-Instruct with LoRA, optimizer steps of 32 completions of exactly 24 tokens, as in learning.py.
"""

import argparse
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learning_methods as learning
import torch
from transformers import TrainerCallback

import trl_sppo
from trl_sppo.preferences import win_rates_from_scores


STEPS = 3  # the first of them warms up
EXACT = {"generation_kwargs": {"min_new_tokens": learning.SAMPLING["max_completion_length"]}}
# A rollout of 32 completions per optimizer step, in one micro-batch, as OnlineDPO has it
ONE_STEP = {
    **EXACT,
    "per_device_train_batch_size": learning.STEP,
    "steps_per_generation": 1,
    "gradient_accumulation_steps": 1,
}
TRAININGS: dict[str, Callable] = {
    "GRPO": lambda clock, model, common: learning.train_grpo(clock, model, {**ONE_STEP, **common}),
    "SPPO, all": lambda clock, model, common: learning.train_sppo(clock, model, {**ONE_STEP, **common}),
    "SPPO, best and worst": lambda clock, model, common: learning.train_sppo(
        clock, model, {**ONE_STEP, **common}, train_on="best_and_worst"
    ),
    "OnlineDPO, checkpointing off": lambda clock, model, common: learning.train_online_dpo(
        clock, model, {**EXACT, **common}
    ),
    "OnlineDPO, checkpointing on (its default)": lambda clock, model, common: learning.train_online_dpo(
        clock, model, {**EXACT, "gradient_checkpointing": True, **common}
    ),
}


class Clock(TrainerCallback):
    """Notes the time after each optimizer step, and the time that rollouts take."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.now: list[float] = []
        self.rollouts: list[float] = []
        self.saves: list[float] = []
        self.started = self.first_step = self.step_ended = 0.0  # wall-clock: disks count

    def on_train_begin(self, *args, **kwargs):
        self.now = [time.process_time()]

    def on_step_end(self, *args, **kwargs):
        self.now.append(time.process_time())
        self.first_step = self.first_step or time.perf_counter()
        self.step_ended = time.perf_counter()

    def on_save(self, *args, **kwargs):
        self.saves.append(time.perf_counter() - self.step_ended)

    def time(self, rollout: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.process_time()
            output = rollout(*args, **kwargs)
            self.rollouts.append(time.process_time() - start)
            return output

        return timed


def prepare() -> tuple[Any, Clock]:
    torch.manual_seed(0)
    model, tokenizer = learning.load()
    learning.accurate([[{"role": "assistant", "content": "Fine."}]])  # loads the reward model
    return model, Clock(tokenizer)


def measure(name: str) -> dict[str, float]:
    """Seconds per optimizer step, those of its rollout, and the peak of memory."""
    from trl import GRPOTrainer

    model, clock = prepare()
    # The outermost method that samples and scores
    kind = trl_sppo.SPPOTrainer if name.startswith("SPPO") else GRPOTrainer
    name_of_rollout = "_generate_and_score_completions"
    setattr(kind, name_of_rollout, clock.time(getattr(kind, name_of_rollout)))
    with tempfile.TemporaryDirectory() as folder:
        TRAININGS[name](clock, model, {"output_dir": folder, "max_steps": STEPS})
    steps = [after - before for before, after in zip(clock.now, clock.now[1:], strict=False)][1:]
    rollouts = clock.rollouts[1:]
    return {
        "step": statistics.mean(steps),
        "rollout": statistics.mean(rollouts) if rollouts else math.nan,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def trainers(rounds: int) -> None:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in TRAININGS}
    for _ in range(rounds):
        for name, rows in results.items():
            rows.append(_in_a_process("measure", name))
            print(name, {key: round(value, 2) for key, value in rows[-1].items()}, flush=True)
    mean = {
        name: {key: statistics.mean(row[key] for row in rows) for key in rows[0]} for name, rows in results.items()
    }
    grpo = mean["GRPO"]
    print("| trainer | completions per second | of GRPO's | after the rollout, of GRPO's | peak memory |")
    print("|---|---|---|---|---|")
    for name, row in mean.items():
        ratios = [grpo["step"] / other["step"] for other in results[name]]
        spread = f"{grpo['step'] / row['step']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        training = (row["step"] - row["rollout"]) / (grpo["step"] - grpo["rollout"])
        print(
            f"| {name} | {learning.STEP / row['step']:.2f} | {spread} | "
            f"{'' if math.isnan(training) else f'{training:.2f}'} | {row['memory']:.2f} GiB |"
        )


OWN = str(Path(trl_sppo.__file__).parent)
# What is called there is TRL's and transformers' work, or the forward pass of a model
OTHERS = ("/trl/", "/transformers/", "/accelerate/", "/peft/", "torch/nn/modules/module.py", "benchmarks/")


def profile() -> dict[str, Any]:
    """The time in this package's functions, and in what these call that is no trainer's or model's.

    Every few milliseconds of CPU time a signal looks who is at work, and writes down the time since the last one. (A
    profiler that traces calls would make many small ones look far dearer than they are.)
    """
    model, clock = prepare()
    own: dict[str, float] = {}
    last = time.process_time()

    def sample(signum: int, frame: Any) -> None:
        nonlocal last
        since, last = time.process_time() - last, time.process_time()
        while frame is not None and not any(other in frame.f_code.co_filename for other in OTHERS):
            if frame.f_code.co_filename.startswith(OWN):
                own[frame.f_code.co_qualname] = own.get(frame.f_code.co_qualname, 0) + since
                return
            frame = frame.f_back

    signal.signal(signal.SIGPROF, sample)
    with tempfile.TemporaryDirectory() as folder:
        signal.setitimer(signal.ITIMER_PROF, 0.002, 0.002)
        TRAININGS["SPPO, best and worst"](clock, model, {"output_dir": folder, "max_steps": STEPS})
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"own": own, "step": clock.now[-1] - clock.now[0]}


def own_code(rounds: int) -> None:
    result = _in_a_process("profile")
    total = sum(result["own"].values())
    print(f"this package's own code: {total:.2f} s of {result['step']:.1f} s, {100 * total / result['step']:.2f} %")
    for name, seconds in sorted(result["own"].items(), key=lambda item: -item[1])[:10]:
        print(f"  {name}: {seconds:.3f} s")


def win_rates(rounds: int) -> None:
    print("| K | ten groups of K, hard comparisons | over K log K, of that for 1,000 |")
    print("|---|---|---|")
    torch.set_num_threads(1)
    seconds = {}
    for size in (8, 100, 1_000, 10_000, 100_000):
        scores = torch.randn(10, size)
        win_rates_from_scores(scores)
        times = []
        for _ in range(max(rounds, 20)):
            start = time.process_time()
            win_rates_from_scores(scores)
            times.append(time.process_time() - start)
        seconds[size] = statistics.median(times)
    unit = seconds[1_000] / (1_000 * math.log(1_000))
    for size, value in seconds.items():
        print(f"| {size:,} | {1000 * value:.3f} ms | {value / (size * math.log(size)) / unit:.2f} |")


SAVED = 3  # in the middle of an iteration of two optimizer steps


def save(name: str, folder: str) -> dict[str, float]:
    model, clock = prepare()
    options = {**learning.ROLLOUT, "save_strategy": "steps", "save_steps": SAVED, "max_steps": SAVED, **EXACT}
    _train(name, clock, model, {**options, "output_dir": folder, "save_only_model": False})
    checkpoint = Path(folder) / f"checkpoint-{SAVED}"
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    return {"save": clock.saves[-1], "size": size / 2**20}


def resume(name: str, folder: str) -> dict[str, float]:
    model, clock = prepare()
    checkpoint = str(Path(folder) / f"checkpoint-{SAVED}")
    _train(name, clock, model, {**learning.ROLLOUT, **EXACT, "output_dir": folder, "max_steps": SAVED + 1}, checkpoint)
    return {"resume": clock.first_step - clock.started}


def _train(name: str, clock: Clock, model, options: dict[str, Any], checkpoint: str | None = None) -> None:
    from trl import GRPOConfig, GRPOTrainer

    kinds: tuple[Any, Any] = (trl_sppo.SPPOTrainer, trl_sppo.SPPOConfig)
    if name == "GRPO":
        kinds = (GRPOTrainer, GRPOConfig)
    trainer = kinds[0](
        model=model,
        reward_funcs=learning.accurate,
        args=kinds[1](**options),
        train_dataset=learning.read_prompts("train"),
        processing_class=clock.tokenizer,
        peft_config=learning.LoraConfig(**learning.LORA),
        callbacks=[clock],
    )
    clock.started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)


def checkpoints(rounds: int) -> None:
    print("| trainer | saving a checkpoint | size | a resumed run, from `train()` to its first optimizer step |")
    print("|---|---|---|---|")
    for name in ("GRPO", "SPPO, all"):
        with tempfile.TemporaryDirectory() as folder:
            saved = _in_a_process("save", name, folder)
            resumed = _in_a_process("resume", name, folder)
        print(f"| {name} | {saved['save']:.2f} s | {saved['size']:.1f} MiB | {resumed['resume']:.1f} s |", flush=True)


def _in_a_process(*command: str) -> dict[str, Any]:
    output = subprocess.run(
        [sys.executable, __file__, "--process", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        text=True,
    )
    return json.loads(output.stdout.splitlines()[-1])


PARTS = {"trainers": trainers, "own_code": own_code, "win_rates": win_rates, "checkpoints": checkpoints}
PROCESSES: dict[str, Callable] = {"measure": measure, "profile": profile, "save": save, "resume": resume}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--process", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        name, *rest = args.process
        print(json.dumps(PROCESSES[name](*rest)))
        return
    for part in args.parts:
        print(f"\n## {part}", flush=True)
        PARTS[part](args.rounds)


if __name__ == "__main__":
    main()
