"""Ctrl-C at any time: status 130, one line, and no traceback. A killed launcher leaves no process behind."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers import TRL_SPPO


REWARDS = """
import time
from pathlib import Path

def slow(completions, **kwargs):
    Path("scoring").touch()
    time.sleep(1)
    return [float(len(completion[0]["content"])) for completion in completions]
"""


@pytest.mark.parametrize(
    ("command", "moment"), [("rollout", "importing"), ("rollout", "scoring"), ("train", "importing")]
)
def test_ctrl_c_in_a_terminal(workdir, command, moment):
    """A terminal signals all processes, and the launcher passes it on."""
    Path("my_rewards.py").write_text(REWARDS)
    argv = [*TRL_SPPO[:-1], command, *workdir(reward_funcs="my_rewards.slow", save_strategy="steps", max_steps=50)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, start_new_session=True, **pipes) as run:
        deadline = time.monotonic() + 100
        while run.poll() is None and not _has_come(moment, run.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(run.pid, signal.SIGINT)
        error = run.communicate(timeout=100)[1]
    assert run.returncode == 130, error
    assert "Traceback" not in error and "KeyboardInterrupt" not in error
    lines = [line for line in error.splitlines() if line.startswith("trl-sppo:")]
    ended = "sampling ended. The same command continues." if moment == "scoring" else "interrupted."
    assert lines == [f"trl-sppo: {ended}"]
    if moment == "scoring":
        assert list(Path("out/rollouts").glob("*.parquet"))


def test_processes_end_with_a_launcher_that_is_killed(workdir):
    Path("my_rewards.py").write_text(REWARDS)
    argv = [*TRL_SPPO[:-1], "train", *workdir(reward_funcs="my_rewards.slow", save_strategy="steps", max_steps=1000)]
    with subprocess.Popen(argv, start_new_session=True) as run:
        deadline = time.monotonic() + 100
        while not _has_come("scoring", run.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        (process,) = psutil.Process(run.pid).children()
        run.kill()
    process.wait(60)
    assert list(Path("out").glob("checkpoint-*"))


def _has_come(moment: str, pid: int) -> bool:
    if moment == "scoring":
        return Path("scoring").exists()
    return any("trl_sppo" in " ".join(child.cmdline()) for child in psutil.Process(pid).children())
