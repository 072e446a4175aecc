"""The training loop: it only schedules. What is done at each cadence is passed in."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from lomdm_jax.errors import UserError
from lomdm_jax.training.checkpoint import Checkpoints
from lomdm_jax.training.metrics import TERMS, MetricWriter, Progress
from lomdm_jax.training.state import TrainState


class Batches(Protocol):
    """An endless iterator of batches whose position can be saved."""

    def __next__(self) -> dict[str, Any]: ...

    def get_state(self) -> dict[str, Any]: ...


class Terminated(Exception):
    """The process was asked to end (SIGTERM); the state of `step` is saved."""

    def __init__(self, step: int):
        super().__init__(f"terminated at step {step}")
        self.step = step


@contextlib.contextmanager
def _termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # others may not handle signals
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


class Loop:
    """Steps from a state to the last step.

    Args:
      config: the whole config.
      step: (number, state, batch, key) -> (state, metrics), compiled; the first number is 1.
      place: puts a host batch on the devices.
      replicate: puts a copy of an array on every device.
      evaluate: state -> the state to go on with, and nelbo_order in nats per token.
      checkpoints: where states are saved.
      facts: saved with each checkpoint.
      writer: where metrics go.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        step: Callable[[int, TrainState, Any, jax.Array], tuple[TrainState, Any]],
        place: Callable[[Any], Any],
        replicate: Callable[[Any], Any],
        evaluate: Callable[[TrainState], tuple[TrainState, float]],
        checkpoints: Checkpoints,
        facts: dict[str, Any],
        writer: MetricWriter,
    ):
        self._config, self._step = config, step
        self._place, self._replicate = place, replicate
        self._evaluate, self._checkpoints = evaluate, checkpoints
        self._facts, self._writer = facts, writer

    def run(self, state: TrainState, batches: Batches) -> TrainState:
        """Train to `train.steps`; the state passed in is donated.

        Raises:
          UserError: if a loss or a gradient is not finite.
          Terminated: on SIGTERM, once the state is saved.
        """
        with _termination() as asked:
            return self._run(state, batches, asked)

    def _run(self, state: TrainState, batches: Batches, asked: threading.Event) -> TrainState:
        first, last = int(state.step), self._config.train.steps
        key = self._replicate(jax.random.key(self._config.train.seed))
        self._progress = Progress(first, last)
        pending: tuple[int, Any] | None = None
        for number in range(first + 1, last + 1):
            batch = self._place(next(batches))
            with jax.transfer_guard("disallow"):
                state, metrics = self._step(number, state, batch, key)
            # The metrics of the step before are read while this one runs on the device.
            if pending:
                self._report(*pending)
            pending = (number, metrics)
            ends = asked.is_set()
            if ends or self._due(number, "eval") or self._due(number, "checkpoint"):
                self._report(*pending)  # nothing that is not finite may be saved
                pending = None
                state = self._pause(number, state, batches)
            if ends:
                self._checkpoints.wait()
                raise Terminated(number)
        if pending:
            self._report(*pending)
        return state

    def _due(self, number: int, what: str) -> bool:
        config = self._config
        every = config.train.eval_every if what == "eval" else config.checkpoint.every
        return number % every == 0 or number in (config.train.steps, config.train.random_steps)

    def _pause(self, number: int, state: TrainState, batches: Batches) -> TrainState:
        """Evaluate if it is due, and save; returns the state to go on with."""
        started, bound = time.perf_counter(), None
        if self._due(number, "eval"):
            state, bound = self._evaluate(state)
        self._checkpoints.save(state, batches.get_state(), self._facts, bound)
        self._progress.exclude(time.perf_counter() - started)
        return state

    def _report(self, number: int, metrics: Any) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._check_finite(number, values)
        if number % self._config.train.log_every == 0 or number == self._config.train.steps:
            line, speed = self._progress.line(number, values)
            print(line, flush=True)
            self._writer.write(number, values | {"tokens_per_second": speed})

    def _check_finite(self, number: int, values: dict[str, float]) -> None:
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            return
        terms = ", ".join(f"{name} {values[name]:g}" for name in (*TERMS, "grad_norm"))
        self._checkpoints.wait()
        good = self._checkpoints.latest()
        remedy = "no checkpoint was saved yet" if good is None else f"step {good} is saved"
        raise UserError(
            f"Training stopped at step {number}: the loss or its gradient is not finite ({terms}). "
            f"The last good checkpoint: {remedy} in {self._checkpoints.folder}. Lower "
            "config.optimizer.learning_rate or raise config.optimizer.warmup_steps, and run the "
            "same command again: it continues from there."
        )
