"""The training loop: it only schedules. What is done at each cadence is passed in."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from lomdm_jax.distributed.multihost import termination
from lomdm_jax.training.checkpoint import Checkpoints
from lomdm_jax.training.guard import Guard
from lomdm_jax.training.metrics import Cost, MetricWriter, Progress
from lomdm_jax.training.state import TrainState
from lomdm_jax.training.trace import Trace


class Batches(Protocol):
    """An endless iterator of batches whose position can be saved."""

    def __next__(self) -> dict[str, Any]: ...

    def get_state(self) -> dict[str, Any]: ...


class Terminated(Exception):
    """The process was asked to end (SIGTERM); the state of `step` is saved."""

    def __init__(self, step: int):
        super().__init__(f"terminated at step {step}")
        self.step = step


class Loop:
    """Steps from a state to the last step.

    Args:
      config: the whole config.
      step: (number, state, batch, key) -> (state, metrics), compiled; the first number is 1.
      place: puts a host batch on the devices.
      key: what the steps draw from; on every device.
      evaluate: state -> the state to go on with, and nelbo_order in nats per token.
      checkpoints: where states are saved.
      facts: saved with each checkpoint.
      writer: where metrics go; a profile goes into a folder beside.
      cost: of a step.
      clock: seconds since any moment.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        step: Callable[[int, TrainState, Any, jax.Array], tuple[TrainState, Any]],
        place: Callable[[Any], Any],
        key: jax.Array,
        evaluate: Callable[[TrainState], tuple[TrainState, float]],
        checkpoints: Checkpoints,
        facts: dict[str, Any],
        writer: MetricWriter,
        cost: Cost,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._config, self._step, self._place, self._key = config, step, place, key
        self._evaluate, self._checkpoints = evaluate, checkpoints
        self._facts, self._writer = facts, writer
        self._cost, self._clock = cost, clock

    def run(self, state: TrainState, batches: Batches) -> TrainState:
        """Train to `train.steps`; the state passed in is donated.

        Raises:
          UserError: at a bad step, or at too many of them; see `guard`.
          Terminated: on SIGTERM, once the state is saved.
        """
        config = self._config.train
        self._progress = Progress(int(state.step), config.steps, self._cost, self._clock)
        self._guard = Guard(config, self._checkpoints)
        folder = self._writer.folder / "profile"
        with termination() as asked, Trace(config.profile, folder) as trace:
            return self._run(state, batches, asked, trace)

    def _run(
        self, state: TrainState, batches: Batches, asked: Callable[[int], bool], trace: Trace
    ) -> TrainState:
        pending: tuple[int, Any] | None = None
        for number in range(int(state.step) + 1, self._config.train.steps + 1):
            batch = self._place(self._progress.fetch(batches))
            trace.before(number)
            with jax.transfer_guard("disallow"):
                state, metrics = self._step(number, state, batch, self._key)
            # The metrics of the step before are read while this one runs on the device.
            if pending:
                self._report(*pending)
            pending = (number, metrics)
            ends, saves = asked(number), self._due(number, "eval", "checkpoint")
            if ends or saves or number == trace.last:
                self._report(*pending)  # waits for the step; nothing bad may be saved
                pending = None
                with self._progress.apart():
                    trace.after(number)
                    state = self._save(number, state, batches) if ends or saves else state
            if ends:
                self._checkpoints.wait()
                raise Terminated(number)
        if pending:
            self._report(*pending)
        return state

    def _due(self, number: int, *what: str) -> bool:
        config = self._config
        every = {"eval": config.train.eval_every, "checkpoint": config.checkpoint.every}
        ends = number in (config.train.steps, config.train.random_steps)
        return ends or any(number % every[name] == 0 for name in what)

    def _save(self, number: int, state: TrainState, batches: Batches) -> TrainState:
        """Evaluate if it is due, and save; returns the state to go on with."""
        bound = None
        if self._due(number, "eval"):
            state, bound = self._evaluate(state)
        self._checkpoints.save(state, batches.get_state(), self._facts, bound)
        return state

    def _report(self, number: int, metrics: Any) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._progress.arrived(values)
        self._guard.check(number, values)
        if number % self._config.train.log_every == 0 or number == self._config.train.steps:
            line, row = self._progress.take(number, values)
            print(line, flush=True)
            self._writer.write(number, row)
