"""
Kills runs with SIGKILL at random points, resumes them, and counts how many end as the run that was not killed.

    python benchmarks/kill_and_resume.py --points 50

About half of the points lie anywhere in a run's time. The others are moments at which a file is opened for writing:
those in which a checkpoint, or the rollouts of an iteration, are being written; one in six is the manifest, which a
checkpoint gets last. A killed run is resumed by the same command with `resume_from_checkpoint=True`; every third is
killed a second time before that. The policy is tiny and random, of float32 on a CPU; sampled by transformers; scored
by a reward function and a pairwise oracle.
"""

import argparse
import faulthandler
import json
import os


os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive the forks by which runs are started

import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trl_sppo import SPPOConfig, SPPOTrainer
from trl_sppo.runs.checkpoints import last_whole_checkpoint


LETTERS = [chr(ord("a") + i) for i in range(26)]
# How each case is called: (LoRA or full, beta, processes)
CASES = list(product(("full", "lora"), (0.0, 0.1), (1, 2)))


def name(case: tuple[str, float, int]) -> str:
    return "{}-beta{}-{}".format(*case)


def step(checkpoint: Path) -> int:
    return int(re.findall(r"\d+", checkpoint.name)[0])


def make_policy(folder: Path) -> None:
    """A tiny random policy, one token per letter."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=29, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def note(folder: Path, what: str) -> None:
    """Count a call, so that it stays counted when the process is killed."""
    with open(folder / "calls.txt", "a") as file:
        file.write(f"{what}\n")


def train(case: tuple[str, float, int], policy: Path, folder: Path, resume: bool) -> None:
    """One run, from its start or from its last checkpoint, in this process."""
    kind, beta, world = case
    torch.manual_seed(0)

    def vowels(completions: list[str], **kwargs) -> list[float]:
        if trainer.model.training:
            note(folder, f"score {trainer._step}")
        return [float(sum(letter in "aeiou" for letter in text)) for text in completions]

    def longer(prompts, first, second, **kwargs) -> list[float]:
        if trainer.model.training:
            note(folder, f"compare {trainer._step}")
        return [0.5 + 0.1 * max(-5, min(5, len(a) - len(b))) for a, b in zip(first, second, strict=True)]

    args = SPPOConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
        num_generations=4, per_device_train_batch_size=4 // world, steps_per_generation=4,
        gradient_accumulation_steps=2, num_iterations=2, max_steps=20, max_completion_length=8, temperature=1.0,
        learning_rate=1e-2, beta=beta, logging_steps=2, save_steps=3, save_total_limit=2, eval_strategy="steps",
        eval_steps=5, per_device_eval_batch_size=4, rollouts_total_limit=2,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": ["ab", "cde", "fg", "hij", "k", "lmno", "pq", "rst", "uv", "wxyz"]})
    trainer = SPPOTrainer(
        str(policy),
        vowels,
        args,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(2)),
        preference_func=longer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if kind == "lora" else None,
    )
    sample = trainer._generate_single_turn

    def counting(*args, **kwargs):
        result = sample(*args, **kwargs)
        if trainer.model.training and not trainer._recorder.groups:  # not recalled
            note(folder, f"sample {trainer._step}")
        return result

    trainer._generate_single_turn = counting  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()


def launch(case, policy: Path, folder: Path, resume: bool, kill_at: float | str | None = None) -> list[int]:
    """
    Start the processes of a run, by forks of this one, and return their ids. One of them kills itself when it has
    opened the share `kill_at` of the files that it opens in a whole run, or a file with that in its path.
    """
    world = case[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    victim = 0 if isinstance(kill_at, str) else random.randrange(world)  # the first process writes the manifest
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            os.setpgid(child, children[0])  # here too: the next child may be faster than this one
            continue
        code = 1
        try:
            os.setpgid(0, children[0] if children else 0)
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.enable()
            if world > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
                )  # fmt: skip
            whole = folder.parent.parent / "whole" / name(case) / f"opened{rank}.txt"
            number = kill_at if rank == victim else None
            if isinstance(number, float):
                number = 1 + int(number * int(whole.read_text()))
            opened = _watch_files(number)
            train(case, policy, folder, resume)
            (folder / f"opened{rank}.txt").write_text(str(opened[0]))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return children


def _watch_files(kill_at: int | str | float | None) -> list[int]:
    """Count the files that this process opens for writing, and kill it at the given one, by number or path."""
    opened = [0]

    def watch(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            opened[0] += 1
            if opened[0] == kill_at or (isinstance(kill_at, str) and kill_at in str(args[0])):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return opened


def wait(children: list[int], kill_after: float | None = None, codes: dict[int, int] | None = None) -> bool:
    """
    Wait for the processes, or kill them. When one dies, the others are killed. Whether all ended well; `codes` gets
    their statuses.
    """
    start = time.monotonic()
    codes = {} if codes is None else codes
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = status
        late = kill_after is not None and time.monotonic() - start > kill_after
        if late or any(codes.values()) or time.monotonic() - start > 120:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    codes[child] = os.waitpid(child, 0)[1]
        time.sleep(0.005)
    return not any(codes.values())


def result(folder: Path) -> dict:
    """What a run ended with: weights, and the log without times."""
    (weights,) = folder.glob("*model.safetensors")
    times = "time", "runtime", "per_second", "train_loss", "total_flos"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    log = [{key: v for key, v in row.items() if not any(time in key for time in times)} for row in history]
    return {"weights": load_file(weights), "log": log}


def count_calls(folder: Path) -> Counter:
    path = folder / "calls.txt"
    return Counter(path.read_text().split("\n")) if path.exists() else Counter()


def run(points: int, seed: int, work: Path) -> dict[str, Counter]:
    """
    Kill and resume, and compare with runs that were not killed.

    Args:
        points (`int`):
            Runs to kill.
        seed (`int`):
            Of the points.
        work (`Path`):
            Folder for all runs.

    Returns:
        By case: how many were killed, how many ended alike, how often a checkpoint was torn, and so on.
    """
    random.seed(seed)
    child = os.fork()
    if not child:
        make_policy(work / "policy")
        os._exit(0)
    os.waitpid(child, 0)
    wholes: dict[tuple, tuple[dict, float, Counter]] = {}
    for case in CASES:
        folder = work / "whole" / name(case)
        start = time.monotonic()
        assert wait(launch(case, work / "policy", folder, resume=False)), folder.with_suffix(".log").read_text()
        wholes[case] = result(folder), time.monotonic() - start, count_calls(folder)

    counts: dict[str, Counter] = {name(case): Counter() for case in CASES}
    progress = tqdm(total=points, desc="killed and resumed", disable=None)
    for point in range(3 * points):
        case = CASES[point % len(CASES)]
        count = counts[name(case)]
        whole, duration, calls = wholes[case]
        folder = work / "killed" / str(point)
        kills = 0
        for attempt in range(2 if point % 3 == 0 else 1):
            at_file: float | str | None = random.random() if (point // len(CASES) + attempt) % 2 else None
            at_file = "manifest.json" if point % 6 == 5 else at_file
            children = launch(case, work / "policy", folder, resume=attempt > 0, kill_at=at_file)
            kills += not wait(children, random.uniform(0.1, 1.0) * duration if at_file is None else None)
        if not kills:
            continue  # it had ended before
        log = folder.with_suffix(".log")
        last = last_whole_checkpoint(str(folder))
        torn = [  # not those that were about to be deleted
            path
            for path in folder.glob("checkpoint-*")
            if not (path / "manifest.json").exists() and (last is None or step(path) >= step(last))
        ]
        log.open("a").write("\n==== resumed\n")
        codes: dict[int, int] = {}
        assert wait(launch(case, work / "policy", folder, resume=True), codes=codes), f"{codes} {log.read_text()}"
        if torn and "is torn" not in log.read_text():
            raise AssertionError(f"a torn checkpoint was not told of: {log.read_text()}")
        mine = result(folder)
        same_weights = all(torch.equal(mine["weights"][key], w) for key, w in whole["weights"].items())
        count["killed"] += 1
        count["kills"] += kills
        count["same weights"] += same_weights
        count["same log"] += mine["log"] == whole["log"]
        count["torn checkpoints"] += len(torn)
        count["calls repeated"] += sum((count_calls(folder) - calls).values())
        if same_weights:
            shutil.rmtree(folder)
        else:
            print(f"{point} {case}: other weights, see {log}")
        progress.update()
        if sum(each["killed"] for each in counts.values()) == points:
            break
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(args.points, args.seed, Path(folder))
    columns = ["killed", "kills", "same weights", "same log", "torn checkpoints", "calls repeated"]
    print(f"{'case':16}" + "".join(f"{column:>18}" for column in columns))
    for case, count in counts.items():
        print(f"{case:16}" + "".join(f"{count[column]:18}" for column in columns))
    total = sum(counts.values(), Counter())
    print(f"{total['same weights']} of {total['killed']} killed runs ended with the same weights, bit for bit.")
    print(json.dumps(total))


if __name__ == "__main__":
    main()
