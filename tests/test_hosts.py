"""Two machines: network namespaces with an address, a name and a private folder each, and one shared folder."""

import fcntl
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from helpers import TINY, make_tokenizer
from pyarrow.parquet import read_table
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM


pytestmark = [pytest.mark.hosts, pytest.mark.first]

TIMEOUT = 12  # ddp_timeout, in seconds
RECIPE = {
    "model_name_or_path": "policy", "dtype": "float32", "dataset_name": "data", "reward_funcs": ["helpers.count_abc"],
    "num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_iterations": 2,
    "max_completion_length": 6, "learning_rate": 1e-3, "optim": "sgd", "bf16": False, "use_cpu": True,
    "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_steps": 1,
    "eval_strategy": "steps", "eval_steps": 8, "max_steps": 24, "ddp_timeout": TIMEOUT,
}  # fmt: skip
HOSTS = {
    "num_machines": 2, "num_processes": 2, "main_process_ip": "10.77.0.1", "main_process_port": 29577,
    "env": {"GLOO_SOCKET_IFNAME": "wire"}, "per_device_train_batch_size": 2,
}  # fmt: skip


class Link:
    """A network link between two namespaces through this process, which can delay packets or lose all."""

    def __init__(self, names: list[str]):
        self.delay, self.is_cut = 0.0, False
        self.ends = [self._end(name, f"10.77.0.{i + 1}") for i, name in enumerate(names)]
        for source, target in (self.ends, self.ends[::-1]):
            packets: queue.Queue = queue.Queue()
            threading.Thread(target=self._receive, args=(source, packets), daemon=True).start()
            threading.Thread(target=self._send, args=(target, packets), daemon=True).start()

    def _end(self, name: str, address: str) -> int:
        end = os.open("/dev/net/tun", os.O_RDWR)
        tun, without_header, set_name = 0x0001, 0x1000, 0x400454CA
        fcntl.ioctl(end, set_name, struct.pack("16sH", f"tun-{name}"[:15].encode(), tun | without_header))
        inside = ["ip", "netns", "exec", name, "ip"]
        for command in (
            ["ip", "link", "set", f"tun-{name}"[:15], "netns", name, "name", "wire"],
            [*inside, "addr", "add", f"{address}/24", "dev", "wire"],
            [*inside, "link", "set", "wire", "up"],
            [*inside, "link", "set", "lo", "up"],
        ):
            subprocess.run(command, check=True)
        return end

    def _receive(self, source: int, packets: queue.Queue) -> None:
        with suppress(OSError):  # closed
            while True:
                packets.put((time.monotonic() + self.delay, os.read(source, 65536)))

    def _send(self, target: int, packets: queue.Queue) -> None:
        with suppress(OSError):
            while True:
                due, packet = packets.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not self.is_cut:
                    os.write(target, packet)


class Machines:
    def __init__(self, folder: Path):
        self.shared, self.private = folder / "shared", folder / "private"
        self.private.mkdir(exist_ok=True)
        self.names = [f"{each}{os.getpid()}" for each in ("a", "b")]
        for name in self.names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        self.link = Link(self.names)
        self.running: list[subprocess.Popen] = []

    def start(self, *arguments: str, what: tuple[str, str] = ("train", "hosts.yaml")) -> list[subprocess.Popen]:
        """A command on both machines, each with its own name and its own contents of the private folder."""
        self.running = []
        for rank, name in enumerate(self.names):
            command = [sys.executable, "-m", "trl_sppo", what[0], "--config", what[1]]
            command += ["--machine_rank", str(rank), *arguments]
            script = f"mount --make-rprivate / && mount -t tmpfs tmpfs {self.private} && hostname host-{'ab'[rank]}"
            script += f" && touch {self.private}/of-{'ab'[rank]} && exec " + " ".join(command)
            inside = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "bash", "-c", script]
            private = dict.fromkeys(("TMPDIR", "HF_HOME", "XDG_CACHE_HOME"), str(self.private))
            env = {**os.environ, **private, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
            self.running.append(subprocess.Popen(inside, cwd=self.shared, env=env, **pipes))
        return self.running

    def outputs(self, timeout: float) -> list[str]:
        return [each.communicate(timeout=timeout)[0] for each in self.running]

    def kill(self, process: subprocess.Popen) -> None:
        with suppress(psutil.NoSuchProcess):
            tree = psutil.Process(process.pid)
            for each in [*tree.children(recursive=True), tree]:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL)

    def close(self) -> None:
        for process in self.running:
            self.kill(process)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=True)
        for end in self.link.ends:
            os.close(end)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A shared folder with a policy, prompts, rollouts, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("machines") / "shared"
    (folder / "data").mkdir(parents=True)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**TINY)).save_pretrained(folder / "policy")
    make_tokenizer().save_pretrained(folder / "policy")
    lines = [json.dumps({"prompt": a + b}) for a in "abcdef" for b in ("x", "yz")]
    for split in ("train", "test"):
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines[: 4 if split == "test" else None]))
    (folder / "one.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "hosts.yaml").write_text(yaml.safe_dump({**RECIPE, **HOSTS, "rollouts": "sampled/rollouts"}))
    (folder / "sample.yaml").write_text(yaml.safe_dump({**RECIPE, **HOSTS, "max_steps": 8}))
    for command in (
        ["rollout", "--config", "one.yaml", "--output_dir", "sampled"],
        ["train", "--config", "one.yaml", "--rollouts", "sampled/rollouts", "--output_dir", "one"],
    ):
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run([sys.executable, "-m", "trl_sppo", *command], cwd=folder, env=env, check=True, timeout=120)
    return folder


@pytest.fixture
def machines(shared):
    machines = Machines(shared.parent)
    yield machines
    machines.close()
    machines.private.rmdir()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 90
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.1)


def assert_like_one_process(shared: Path, folder: str) -> None:
    expected, actual = (load_file(shared / name / "model.safetensors") for name in ("one", folder))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-6)
    logs = [json.loads((shared / name / "trainer_state.json").read_text())["log_history"] for name in ("one", folder)]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert len(losses[0]) == RECIPE["max_steps"] and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert sum("eval_win_rate_vs_previous/count_abc" in row for row in logs[1]) == 3


def test_a_link_that_is_slow_and_then_cut(shared, machines):
    """Both end within the time-out, say which process is where, and the same command continues."""
    machines.link.delay = 0.01
    machines.start("--output_dir", "cut")
    wait_for(shared / "cut" / "checkpoint-3" / "manifest.json")
    machines.link.is_cut = True
    began = time.monotonic()
    outputs = machines.outputs(timeout=3 * TIMEOUT)
    assert time.monotonic() - began < 2 * TIMEOUT
    for rank, output in enumerate(outputs):
        assert machines.running[rank].returncode == 1, output
        here, there = ("host-a", "host-b") if rank == 0 else ("host-b", "host-a")
        assert f" in process {rank} on {here}; other machines: {there} (processes {1 - rank})" in output
        assert "no message from another process came within ddp_timeout" in output
        assert "the same command with --resume_from_checkpoint true continues" in output
    machines.link.is_cut, machines.link.delay = False, 0.0
    machines.start("--output_dir", "cut", "--resume_from_checkpoint", "true")
    for process, output in zip(machines.running, machines.outputs(timeout=90), strict=True):
        assert process.returncode == 0, output
    assert_like_one_process(shared, "cut")


def test_a_machine_that_is_killed(shared, machines):
    processes = machines.start("--output_dir", "killed")
    wait_for(shared / "killed" / "checkpoint-3" / "manifest.json")
    machines.kill(processes[1])
    output = machines.outputs(timeout=3 * TIMEOUT)[0]
    assert processes[0].returncode == 1, output
    assert "another process of this run has ended" in output and "other machines: host-b (processes 1)" in output
    machines.start("--output_dir", "killed", "--resume_from_checkpoint", "true")
    for process, output in zip(machines.running, machines.outputs(timeout=90), strict=True):
        assert process.returncode == 0, output
    assert_like_one_process(shared, "killed")


def test_rollouts_of_two_machines(shared, machines):
    machines.start("--output_dir", "rollouts-of-two", what=("rollout", "sample.yaml"))
    for process, output in zip(machines.running, machines.outputs(timeout=90), strict=True):
        assert process.returncode == 0, output
    files = sorted((shared / "rollouts-of-two" / "rollouts").glob("*.parquet"))
    rows = [row for file in files for row in read_table(file).to_pylist()]
    assert len(rows) == 4 and all(len(row["completions"]) == len(row["logps"]) == 4 for row in rows)
    assert all(None not in row["logps"] for row in rows)


def test_a_name_that_does_not_resolve(shared, machines):
    """gloo would listen on the loopback address, and both machines would wait for each other."""
    recipe = {**RECIPE, **HOSTS, "env": {}}
    (shared / "hosts.yaml").rename(shared / "with-interface.yaml")
    (shared / "hosts.yaml").write_text(yaml.safe_dump(recipe))
    try:
        machines.start("--output_dir", "nowhere")
        for process, output in zip(machines.running, machines.outputs(timeout=60), strict=True):
            assert process.returncode == 2, output
            assert "GLOO_SOCKET_IFNAME" in output and "does not resolve" in output
    finally:
        (shared / "with-interface.yaml").rename(shared / "hosts.yaml")
