"""SIGTERM, Ctrl-C and a time budget end a run after the micro-step, with a checkpoint to go on from exactly."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from datasets import Dataset
from helpers import RUN_PROMPTS, TRL_SPPO, assert_same
from transformers import TrainerCallback

from trl_sppo import SPPOTrainer
from trl_sppo.runs import interruption
from trl_sppo.runs.checkpoints import last_whole_checkpoint


class SignalAt(TrainerCallback):
    """Sends signals to this process after given micro-steps."""

    def __init__(self, trainer, *micro_steps, number=signal.SIGTERM):
        self.trainer, self.micro_steps, self.number = trainer, micro_steps, number

    def on_substep_end(self, args, state, control, **kwargs):
        if self.trainer._step in self.micro_steps:
            os.kill(os.getpid(), self.number)

    on_step_end = on_substep_end


def interrupt(trainer, callback, expected) -> None:
    trainer.callback_handler.callbacks.insert(0, callback)  # before ours, which looks for signals
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    with pytest.raises(type(expected)) as error:
        trainer.train()
    assert getattr(error.value, "code", None) == getattr(expected, "code", None)
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before


WHOLE: dict[int, SPPOTrainer] = {}  # by save_steps


@pytest.mark.parametrize("micro_step", [1, 2, 3, 4, 5, 7, 8, 12])
@pytest.mark.parametrize("save_steps", [1, 100])
def test_a_signal_at_any_micro_step(start, tmp_path, capsys, micro_step, save_steps):
    """Two in an optimizer step, four in an iteration, twelve in an epoch. Weights and log are those of a whole run."""
    if save_steps not in WHOLE:
        WHOLE[save_steps] = start("whole", save_steps=save_steps)
        WHOLE[save_steps].train()
    whole = WHOLE[save_steps]
    interrupted = start("run", save_steps=save_steps)
    interrupt(interrupted, SignalAt(interrupted, micro_step), SystemExit(143))
    step = micro_step // 2
    assert interrupted.state.global_step == step and interrupted._step in (micro_step, 2 * step)
    checkpoint = tmp_path / "run" / f"checkpoint-{step}"
    assert last_whole_checkpoint(str(tmp_path / "run")) == checkpoint
    assert f"trl-sppo: ended at step {step}. The last checkpoint is {checkpoint}; the same" in capsys.readouterr().out

    resumed = start("run", save_steps=save_steps)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)
    # Nothing is sampled or scored twice, also where the micro-step began with a rollout
    calls = interrupted.calls + resumed.calls
    assert calls == {"generate": 5, "score": 5}


def test_a_signal_at_a_step_with_an_evaluation(start, tmp_path):
    """The evaluation comes first; the log has it once."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "save_steps": 100}
    kwargs = {"eval_dataset": Dataset.from_dict({"prompt": RUN_PROMPTS[:2]})}
    whole = start("whole", **options, trainer_kwargs=kwargs)
    whole.train()
    interrupted = start("run", **options, trainer_kwargs=kwargs)
    interrupt(interrupted, SignalAt(interrupted, 8), SystemExit(143))
    resumed = start("run", **options, trainer_kwargs=kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


@pytest.mark.parametrize("micro_step", [9, 12])
def test_a_signal_with_evaluations_at_the_end_of_an_epoch(start, tmp_path, micro_step):
    options = {"eval_strategy": "epoch", "per_device_eval_batch_size": 4, "save_steps": 100}
    kwargs = {"eval_dataset": Dataset.from_dict({"prompt": RUN_PROMPTS[:2]})}
    whole = start("whole", **options, trainer_kwargs=kwargs)
    whole.train()
    interrupted = start("run", **options, trainer_kwargs=kwargs)
    interrupt(interrupted, SignalAt(interrupted, micro_step), SystemExit(143))
    resumed = start("run", **options, trainer_kwargs=kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def test_a_best_model_is_not_loaded_and_the_checkpoint_stays(start, tmp_path):
    """At its end, a run that keeps one checkpoint deletes the last one if that is not the best."""
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "save_steps": 1,
        "save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "reward",
    }  # fmt: skip
    trainer = start("run", **options, trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": RUN_PROMPTS[:2]})})
    trainer._determine_best_metric = lambda metrics, trial: setattr(trainer.state, "best_global_step", 1) or False
    interrupt(trainer, SignalAt(trainer, 7), SystemExit(143))
    assert last_whole_checkpoint(str(tmp_path / "run")).name == "checkpoint-3"
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")


def test_with_save_strategy_best(start, tmp_path):
    """transformers drops the wish to save where an evaluation is no new best."""
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "save_strategy": "best",
        "metric_for_best_model": "reward",
    }  # fmt: skip
    trainer = start("run", **options, trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": RUN_PROMPTS[:2]})})
    trainer._determine_best_metric = lambda metrics, trial: trainer.state.global_step == 1
    interrupt(trainer, SignalAt(trainer, 6), SystemExit(143))
    assert last_whole_checkpoint(str(tmp_path / "run")).name == "checkpoint-3"


def test_a_signal_in_an_evaluation_starts_no_rollout(start, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "save_steps": 100}
    kwargs = {"eval_dataset": Dataset.from_dict({"prompt": RUN_PROMPTS[:2]})}
    whole = start("whole", **options, trainer_kwargs=kwargs)
    whole.train()
    trainer = start("run", **options, trainer_kwargs=kwargs)

    class InEvaluation(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    interrupt(trainer, InEvaluation(), SystemExit(143))
    assert last_whole_checkpoint(str(tmp_path / "run")).name == "checkpoint-2"
    assert trainer.calls == {"generate": 5, "score": 5}  # of one rollout, and of two evaluations of two batches
    resumed = start("run", **options, trainer_kwargs=kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def test_a_signal_when_all_is_done(start, tmp_path):
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    interrupt(start("run", max_steps=2), AtTheEnd(), SystemExit(143))
    assert last_whole_checkpoint(str(tmp_path / "run")).name == "checkpoint-2"


def test_interrupted_and_continued_in_one_process(start, tmp_path):
    options = {"save_steps": 1, "save_total_limit": 1}
    whole = start("whole", **options)
    whole.train()
    trainer = start("run", **options)
    callback = SignalAt(trainer, 7)
    interrupt(trainer, callback, SystemExit(143))
    trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, whole)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-9"]


def test_ctrl_c_is_a_keyboard_interrupt(start, tmp_path, capfd):
    trainer = start("run", save_steps=100)
    interrupt(trainer, SignalAt(trainer, 3, number=signal.SIGINT), KeyboardInterrupt())
    assert last_whole_checkpoint(str(tmp_path / "run")).name == "checkpoint-1"
    assert "trl-sppo: SIGINT: finishing the current step, then writing a checkpoint." in capfd.readouterr().err


def test_the_same_signal_again(start, tmp_path, monkeypatch):
    """A launcher may send it twice; later, it is a user who does not want to wait."""

    class Twice(SignalAt):
        def on_substep_end(self, args, state, control, **kwargs):
            if self.trainer._step in self.micro_steps:
                signal.raise_signal(self.number)
                time.sleep(0.02)
                signal.raise_signal(self.number)
                time.sleep(0.02)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        trainer = start("one", save_steps=100)
        interrupt(trainer, Twice(trainer, 3, number=signal.SIGINT), KeyboardInterrupt())
        assert last_whole_checkpoint(str(tmp_path / "one"))
        monkeypatch.setattr(interruption, "SAME_SIGNAL", 0.0)
        trainer = start("two", save_steps=100)
        interrupt(trainer, Twice(trainer, 3, number=signal.SIGINT), KeyboardInterrupt())
        assert last_whole_checkpoint(str(tmp_path / "two")) is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_signals_are_left_alone(start):
    trainer = start("run", max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


# ---- Time budget


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `tick` moves, from which the process began at 0."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(interruption.time, "time", lambda: Clock.now)
    monkeypatch.setattr(interruption.psutil.Process, "create_time", lambda self: 0.0)
    return Clock


def test_a_time_budget_ends_the_run_before_the_micro_step_that_would_not_fit(start, tmp_path, clock):
    """
    A micro-step takes 10 s, and 100 s if it begins with a rollout: 100, 110, 120, 130 | 230, 240, 250, 260 | ...
    Of 6 minutes 342 s are for training. At 260 s, after two iterations, another rollout would fit no more (360 > 342).
    """
    whole = start("whole")
    whole.train()

    def build(**options):
        trainer = start("run", save_steps=100, **options)
        step = trainer.training_step

        def timed(*args, **kwargs):
            clock.now += 100 if trainer.needs_rollout() else 10
            return step(*args, **kwargs)

        trainer.training_step = timed
        return trainer

    trainer = build(time_budget=6)
    with pytest.raises(SystemExit) as error:
        trainer.train()
    assert error.value.code == 124 and clock.now == 260 and trainer.state.global_step == 4
    clock.now = 0.0
    resumed = build(time_budget=60)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def test_a_time_budget_must_be_positive(start):
    with pytest.raises(ValueError, match=r"time_budget must be positive, got 0.0"):
        start("run", time_budget=0)


# ---- The command


SLOW = """
import os, time
from helpers import count_abc
def slow(completions, **kwargs):
    open("scoring", "a").write("x")
    time.sleep(0.2)
    return count_abc(completions)
"""


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_the_command_passes_signals_on_and_ends_with_their_code(workdir, tmp_path, number, processes):
    """To the command alone, as a scheduler or `kill` does; and the same command goes on."""
    (tmp_path / "rewards_of_test.py").write_text(SLOW)
    options = {
        "per_device_train_batch_size": 8 // processes, "reward_funcs": "rewards_of_test.slow", "use_cpu": True,
        "num_processes": processes, "save_strategy": "steps", "save_steps": 100, "max_steps": 8, "seed": 1,
        "learning_rate": 1e-2,
    }  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{tmp_path}"}
    launch = [warm.python(), *TRL_SPPO[1:], "--resume_from_checkpoint", "true"]
    if processes > 1:
        launch += ["--main_process_port", "0"]
    command = [*launch, *workdir(**options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as run:
        deadline = time.monotonic() + 100
        while not Path("scoring").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        run.send_signal(number)
        stdout, stderr = run.communicate(timeout=100)
    assert run.returncode == 128 + number, stderr
    assert "Traceback" not in stderr
    assert "finishing the current step, then writing a checkpoint" in stderr
    assert stdout.count("The last checkpoint is out/checkpoint-") == 1 and "Saved the policy" not in stdout
    assert not Path("out/model.safetensors").exists()
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=100)
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 8


@pytest.mark.parametrize(
    ("processes", "asked"), [(1, [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8]), (2, [0, 1, 2, 2, 4, 4, 5, 6, 6, 8])]
)
def test_when_processes_agree(start, monkeypatch, processes, asked):
    """Two micro-steps in an optimizer step, four in an iteration: before and after each optimizer step, and after a
    rollout. One process looks after each micro-step."""
    trainer = start("run", max_steps=4)
    steps = []
    monkeypatch.setattr(trainer, "agree", lambda code: steps.append(trainer._step) or code)
    callback = trainer._interruption
    monkeypatch.setattr(
        callback, "trainer", Proxy(trainer, accelerator=SimpleNamespace(num_processes=processes)), raising=True
    )
    trainer.train()
    assert steps == asked


class Proxy:
    """An object with other values of some attributes."""

    def __init__(self, inner, **values):
        self.__dict__.update(values, inner=inner)

    def __getattr__(self, name):
        return getattr(self.inner, name)
