"""Correctness, memory and speed on one CUDA device, in stages. docs/gpu.md has what was measured.

    python benchmarks/gpu.py                                  # all stages, at most 9 minutes
    python benchmarks/gpu.py --stages environment resume      # some, in this order
    python benchmarks/gpu.py --stages vllm --cases qwen2.5-7b-instruct/lora
    python benchmarks/gpu.py --rehearse                       # tiny models on a CPU: the same code, no numbers to keep

Each case runs in its own process with its own time limit, and its results are written as they come, to results.json
and results.md in `--out`: a case that fails or hangs loses neither its own earlier results nor those of the others.
Policies and reward models have the architecture of the real ones and random weights, so no model hub is needed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


ROOT = Path(__file__).parents[1]
# Most valuable first. Of each case: the seconds that it may take
CASES: dict[str, dict[str, int]] = {
    "environment": {"one step": 120},
    "memory": {
        "qwen2.5-7b-instruct/lora": 300,
        "qwen2.5-0.5b-instruct/lora": 240,
        "qwen2.5-7b-instruct/qlora-24gb": 300,
        "qwen2.5-1.5b-instruct/lora": 150,
    },
    "trainers": {"qwen2.5-1.5b": 240},
    "resume": {"lora": 150, "full": 150},
    "engines": {"pinned": 45, "reward model": 60, "quantization": 120, "merge": 120},
    "vllm": {"sync full": 200, "sync lora": 150, "qwen2.5-7b-instruct/lora": 300},
    "learning": {"SPPO": 150, "GRPO": 150},
}
LEAST = 15  # seconds: with less left, no case is started


@dataclass
class Outcome:
    stage: str
    case: str
    status: str = "not started: no time left"
    seconds: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)  # each: the name of its table, and its row

    @property
    def is_good(self) -> bool:
        return self.status == "ok" or self.status.startswith("not run")


def run(outcome: Outcome, limit: float, out: Path, work: str, args: argparse.Namespace) -> None:
    """Run one case in a process of its own, for at most `limit` seconds."""
    results, log = out / "results.jsonl", out / "log.txt"
    already = len(results.read_bytes())
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_stages.py"), outcome.stage, outcome.case]
    command += ["--results", str(results), "--work", work] + ["--rehearse"] * args.rehearse
    command += ["--eager"] * args.eager
    command += ["--checkpoints", args.checkpoints] * bool(args.checkpoints)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if outcome.stage == "vllm":  # on a machine that may have no network, and vLLM without its optional kernels
        variables = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_USE_DEEP_GEMM": "0",
        }
        variables |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
        environment = {**variables, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", **environment}
    if args.rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    recipe = ROOT / "recipes" / f"{outcome.case}.yaml"
    if recipe.is_file():  # as `trl-sppo train`, before CUDA starts
        environment |= yaml.safe_load(recipe.read_text()).get("env", {})
    start = time.monotonic()
    with open(log, "a") as file:
        file.write(f"\n==== {outcome.stage}: {outcome.case}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            code = process.wait(limit)
            outcome.status = "ok" if code == 0 else f"failed (exit status {code})"
        except subprocess.TimeoutExpired:
            outcome.status = f"stopped after its limit of {limit:.0f} s"
        finally:
            try:  # and what the case has started
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    outcome.seconds = time.monotonic() - start
    lines = results.read_bytes()[already:].decode().splitlines(keepends=True)
    outcome.results = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be torn
    for result in outcome.results:
        if "not_run" in result:
            outcome.status = f"not run: {result['not_run']}"
    outcome.results = [result for result in outcome.results if "table" in result]
    if not outcome.is_good:
        with open(log, "rb") as file:
            file.seek(begin)
            text = file.read().decode(errors="replace")
        print("\n".join(text.splitlines()[-15:]), flush=True)


def tables(outcomes: list[Outcome]) -> str:
    """All results as Markdown."""
    found: dict[str, list[dict[str, Any]]] = {}
    for outcome in outcomes:
        for result in outcome.results:
            found.setdefault(result["table"], []).append(result["row"])
    text = ""
    for name, rows in found.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text += f"\n## {name}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
        text += "".join(f"| {' | '.join(_cell(row.get(column)) for column in columns)} |\n" for row in rows)
    text += "\n## Cases\n\n| stage | case | status | seconds |\n|---|---|---|---|\n"
    return text + "".join(f"| {o.stage} | {o.case} | {o.status} | {o.seconds:.0f} |\n" for o in outcomes)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=CASES, default=list(CASES), help="Which, in this order.")
    parser.add_argument("--cases", nargs="+", help="Which of these stages. By default all.")
    parser.add_argument("--minutes", type=float, default=9, help="For all of them together.")
    parser.add_argument("--rehearse", action="store_true", help="Tiny models on a CPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="Folder for the results.")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile and CUDA graphs.")
    parser.add_argument("--checkpoints", help="Folder that `trl-sppo quickstart` has made: for the stage `learning`.")
    args = parser.parse_args()
    if unknown := set(args.cases or []) - {case for stage in args.stages for case in CASES[stage]}:
        known = ", ".join(case for stage in args.stages for case in CASES[stage])
        parser.error(f"--cases {' '.join(sorted(unknown))}: not in these stages. Choose from: {known}.")
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if not args.rehearse and subprocess.run([sys.executable, "-c", question]).returncode:
        parser.error("there is no CUDA device. --rehearse runs tiny models on a CPU.")

    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("log.txt", "results.jsonl"):
        (args.out / name).write_text("")
    outcomes = [
        Outcome(stage, case) for stage in args.stages for case in CASES[stage] if case in (args.cases or CASES[stage])
    ]
    with _folder(args.rehearse) as work:
        for outcome in outcomes:
            left = end - time.monotonic()
            limit = min(CASES[outcome.stage][outcome.case], left - 2)
            if left >= LEAST:
                name = f"{outcome.stage}: {outcome.case}"
                print(f"== {name} begins, with {limit:.0f} s of the {left:.0f} s left", flush=True)
                run(outcome, limit, args.out, work, args)
                print(f"== {name} ends after {outcome.seconds:.0f} s: {outcome.status}", flush=True)
            head = f"# {' '.join(['python', 'benchmarks/gpu.py', *sys.argv[1:]])}\n"
            (args.out / "results.md").write_text(head + tables(outcomes))
            (args.out / "results.json").write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1))
    print(tables(outcomes))
    bad = [outcome for outcome in outcomes if not outcome.is_good]
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} cases ended well. Results are in {args.out}.")
    return 1 if bad else 0


@contextmanager
def _folder(rehearse: bool) -> Iterator[str]:
    """
    A folder for checkpoints, of 32 GB if they are real: in memory, if that has room, which is faster than a disk.

    What a run that was killed has left there is used again.
    """
    if rehearse:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
        return
    work = Path(tempfile.gettempdir()) / "trl-sppo-gpu"
    shared = Path("/dev/shm") / work.name
    if shared.exists() or (shared.parent.is_dir() and shutil.disk_usage(shared.parent).free > 40e9):
        work = shared
    for half in work.glob("*.half"):
        shutil.rmtree(half)
    work.mkdir(exist_ok=True)
    yield str(work)
    shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
