"""Orderly ends of a run: on SIGTERM, on Ctrl-C, and before a time limit."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import psutil
from transformers import TrainerCallback

from ..quiet import SAME_SIGNAL


SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_TIME_BUDGET = 124  # as `timeout` of the GNU coreutils
EXIT_TOKEN_BUDGET = 3  # unlike after the time budget, the same command does not continue without a larger one
RESERVE = 0.05  # share of the time budget that is kept for the checkpoint


class Interruption(TrainerCallback):
    """
    Ends training with a checkpoint after the micro-step in which SIGTERM or SIGINT arrives, or before the time budget
    (minutes from the start of the process) is over, or after the iteration that uses up the judges' token budget.
    Several processes end after a rollout or an optimizer step.
    """

    def __init__(self, trainer: Any, time_budget: float | None):
        self.trainer = trainer
        self.exit_code: int | None = None  # of the run, once it is to end
        self._signal: int | None = None
        seconds = math.inf if time_budget is None else 60 * time_budget * (1 - RESERVE)
        self._deadline = psutil.Process().create_time() + seconds
        self._micro_step_began = 0.0
        # Longest time between two checks of the clock, with evaluations and checkpoints: with and without a rollout
        self._longest = {True: 0.0, False: 0.0}
        self._rollout = True  # whether the current micro-step begins with one
        self._epoch_has_ended = False
        self.beginning: dict[str, Any] | None = None  # the state when the current optimizer step began

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which signals only request the end. Python delivers them to the main thread alone."""
        self.exit_code = self._signal = self.beginning = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        first = 0.0

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal first
            if self._signal is None:
                self._signal, first = number, time.monotonic()
                name = signal.Signals(number).name
                words = f"{name}: finishing the current step, then writing a checkpoint. Repeat to end at once."
                os.write(2, f"\ntrl-sppo: {words}\n".encode())  # logging may have been interrupted
            elif time.monotonic() - first > SAME_SIGNAL:
                signal.signal(number, handlers[number])
                signal.raise_signal(number)  # in this thread: another might take its time

        for number in handlers:
            signal.signal(number, handle)
        try:
            yield
            if self._signal is not None and self.exit_code is None:  # it came when all was done
                self.exit_code = 128 + self._signal
        finally:
            for number, handler in handlers.items():
                if handler is not None:  # one that is not Python's
                    signal.signal(number, handler)

    def end(self) -> NoReturn:
        """End the run, as the signal would have."""
        if self.trainer.accelerator.num_processes > 1:  # Python's own end would abort while gloo is connected
            self.trainer.accelerator.end_training()
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(self.exit_code)

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin_micro_step()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch_has_ended = False

    def on_step_begin(self, args, state, control, **kwargs):
        self.beginning = self.trainer.get_state()

    def on_substep_end(self, args, state, control, **kwargs):
        # Several processes agree by a message: inside an optimizer step only once, if it began with a rollout
        if (self._rollout or self.trainer.accelerator.num_processes == 1) and self.is_over():
            # The current optimizer step has not changed a weight yet. A resumed run begins with it
            self.trainer.set_state(self.beginning)
            control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        self.beginning = None
        self._epoch_has_ended = state.epoch % 1 == 0
        if self.is_over():
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        # transformers calls it whenever it leaves an epoch, also in its middle
        if self.exit_code is None:
            return
        if not self._epoch_has_ended:
            control.should_log = control.should_evaluate = False
        # With what comes at the end of an epoch
        control.should_save = self._epoch_has_ended or not self.trainer.is_saved

    def check_time(self) -> None:
        """End the process if its time is up."""
        if self.trainer.agree(int(time.time() > self._deadline)):
            print("trl-sppo: the time budget is used up. The same command continues.")
            raise SystemExit(EXIT_TIME_BUDGET)

    def _begin_micro_step(self) -> None:
        self._micro_step_began, self._rollout = time.time(), self.trainer.needs_rollout()

    def is_over(self) -> bool:
        """Whether the run is to end now, the same in all processes."""
        now = time.time()
        self._longest[self._rollout] = max(self._longest[self._rollout], now - self._micro_step_began)
        self._begin_micro_step()
        is_late = now + self._longest[self._rollout] > self._deadline
        code = 128 + self._signal if self._signal is not None else EXIT_TIME_BUDGET * is_late
        # What has been judged is trained on. A run that is complete ends by itself
        is_complete = self.trainer.state.global_step >= self.trainer.state.max_steps
        if self._rollout and self.trainer.is_over_budget and not is_complete:
            code = code or EXIT_TOKEN_BUDGET
        self.exit_code = self.trainer.agree(code) or self.exit_code
        return self.exit_code is not None
