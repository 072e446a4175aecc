"""A profiler's trace of a few steps."""

import pathlib

import jax

from lomdm_jax.distributed import multihost


class Trace:
    """Traces the steps that `train.profile` names, on the first process; also a context manager,
    which writes out what is there when the run ends among them.

    Args:
      steps: "FIRST:LAST", both traced, or "" for none.
      folder: where traces go, each in a sub-folder named after the time.

    Attributes:
      last: LAST, or 0.
    """

    def __init__(self, steps: str, folder: pathlib.Path):
        wanted = steps if multihost.leads() else ""
        self._first, self.last = map(int, wanted.split(":")) if wanted else (0, 0)
        self._folder, self._started = folder, 0

    def before(self, number: int) -> None:
        """Call it before step `number` is dispatched; a resumed run may start among the steps."""
        if not self._started and self._first <= number <= self.last:
            jax.profiler.start_trace(self._folder)
            self._started = number

    def after(self, number: int) -> None:
        """Call it at least after LAST, once its result is there."""
        if self._started and number == self.last:
            self._stop(f"steps {self._started} to {number}")

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            self._stop(f"steps {self._started} to where the run ended")

    def _stop(self, what: str) -> None:
        self._started = 0
        jax.profiler.stop_trace()
        print(
            f"profile  {what}, in {self._folder}: open it with xprof --logdir {self._folder} "
            "(pip install xprof), or its trace.json.gz at https://ui.perfetto.dev",
            flush=True,
        )
