"""Two runs in one output directory: the second is refused, unless the first is dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from trl_sppo.commands.evaluate import EvalArguments, evaluate
from trl_sppo.commands.judging import parse
from trl_sppo.runs.alone import alone_in
from trl_sppo.train import build_trainer


HOLD = """
import sys, time
from trl_sppo.runs.alone import alone_in
from trl_sppo.commands.evaluate import EvalArguments, evaluate, parse
with alone_in(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process that holds the folder `out`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_run_is_refused_and_told_of_the_first(other_run, make_trainer, tmp_path, monkeypatch):
    expected = f"in use by process {other_run.pid} on {socket.gethostname()}, which began at 20"
    (tmp_path / "out" / "run_began.json").write_text("{}")
    for method in ("train", "rollout"):
        trainer = make_trainer(save_strategy="steps")
        with pytest.raises(ValueError, match=expected):
            getattr(trainer, method)()
    assert (tmp_path / "out" / "run_began.json").read_text() == "{}"  # nothing of the first one's was touched
    monkeypatch.setattr("trl_sppo.train.load_data", lambda *args: pytest.fail("too late"))
    monkeypatch.chdir(tmp_path)
    for name, score in (("a", 1.0), ("b", 0.0)):
        row = {"prompt": "p", "completions": ["c"], "lengths": [1], "scores": {"judge": [score]}}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["--model_name_or_path", "a.jsonl", "--opponent_name_or_path", "b.jsonl", "--output_dir"]
    with pytest.raises(ValueError, match="in use by process"):
        evaluate(parse(EvalArguments, "trl-sppo eval", [*argv, "out"]))
    assert evaluate(parse(EvalArguments, "trl-sppo eval", [*argv, "other"]))["judge"][0].mean == 1
    with pytest.raises(ValueError, match=expected):
        build_trainer(["--model_name_or_path", "m", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_runs_mark_does_not_hold(other_run, make_trainer, how):
    other_run.send_signal(how)
    other_run.wait()
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_lock_of_a_dead_process_that_its_children_hold_is_waited_for(other_run, tmp_path, monkeypatch):
    owner = tmp_path / "out" / "_run.json"
    facts = json.loads(owner.read_text())
    dead = {**facts, "process": 2**22 + 1}  # beyond the largest number of a process
    owner.write_text(json.dumps(dead))
    monkeypatch.setattr("trl_sppo.runs.alone.ORPHANS", 0.3)
    with pytest.raises(ValueError, match=f"process {2**22 + 1} on"), alone_in(str(tmp_path / "out")):
        pass
    elsewhere = json.dumps({**dead, "host": "elsewhere"})
    for text, message in ((elsewhere, "on elsewhere"), (elsewhere[:9], "in use by another process")):
        owner.write_text(text)
        with pytest.raises(ValueError, match=message), alone_in(str(tmp_path / "out")):
            pass
    owner.write_text(json.dumps(dead))
    monkeypatch.setattr("trl_sppo.runs.alone.ORPHANS", 30)
    threading.Timer(0.5, other_run.kill).start()
    with alone_in(str(tmp_path / "out")):
        assert json.loads(owner.read_text())["process"] == os.getpid()


def test_a_run_that_has_ended_leaves_the_folder_free(make_trainer, tmp_path):
    """Also for another process, while this one lives on, as a notebook does."""

    def fails(**kwargs):
        raise OSError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        make_trainer(reward_funcs=fails).train()
    make_trainer(max_steps=1).train()
    code = f"from trl_sppo.runs.alone import alone_in\nwith alone_in({str(tmp_path / 'out')!r}): print('free')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "free\n", result.stderr
    assert not (tmp_path / "out" / "_run.json").exists()


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*args):
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with alone_in(str(tmp_path / "out")):
        assert "cannot be locked (no locks available)" in caplog.text
