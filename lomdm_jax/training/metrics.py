"""Where numbers go: CSV, TensorBoard, and a line on the screen; and what a run costs."""

import contextlib
import csv
import datetime
import math
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from tensorboardX import SummaryWriter

from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError

TERMS = ("loss", "main", "order", "clock", "reconstruction")
# Columns that differ from run to run of the same computation.
MEASURED = (
    *("tokens_per_second", "mfu", "step_seconds_p50", "step_seconds_p90", "step_seconds_max"),
    *("input_seconds", "memory_bytes"),
)
NOTABLE_WAIT = 0.05  # of a step's time; above, the line says how long the host waits for data


class Cost(NamedTuple):
    """What a step asks of the devices, and what they could do; all devices together.

    flops: floating-point operations of the model in one step, recomputation not counted.
    peak: floating-point operations per second at best; None if that is not known.
    """

    flops: float
    peak: float | None


class MetricWriter:
    """Appends rows to `<name>.csv` and scalars to TensorBoard events, both in `folder`, on the
    first process; on the others it writes nothing.

    Args:
      folder: the run's folder.
      name: of the CSV file and prefix of the TensorBoard tags.
      step: the step a resumed run starts from; later rows of an earlier attempt are dropped.
    """

    def __init__(self, folder: pathlib.Path, name: str, step: int = 0):
        self.folder, self._path, self._name = folder, folder / f"{name}.csv", name
        self._events: SummaryWriter | None = None
        self._columns: list[str] | None = None
        if multihost.leads():
            self._drop_after(step)
            events = str(folder / "tensorboard" / name)
            self._events = SummaryWriter(events, purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values`, which must have the same names at every call; what is not a number
        is nan in the CSV file and left out of the events.

        Raises:
          UserError: the file cannot be written.
        """
        if self._events is None:
            return
        try:
            self._append({"step": step, **values})
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error}. Make room there if the disk is full, "
                "and run the same command again: it continues from the last checkpoint."
            ) from error
        for key, value in values.items():
            if math.isfinite(value):
                self._events.add_scalar(f"{self._name}/{key}", value, step)

    def close(self) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):  # a full disk has been told of already
                self._events.close()

    def _append(self, row: Mapping[str, float]) -> None:
        if self._columns is None:
            self._columns = self._begin(list(row))
        with open(self._path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _begin(self, names: list[str]) -> list[str]:
        """The columns of the file, made to hold these: an older version may have written fewer."""
        rows = []
        if self._path.exists():
            with open(self._path, newline="") as file:
                reader = csv.DictReader(file)
                old, rows = list(reader.fieldnames or ()), list(reader)
            names = [*old, *(name for name in names if name not in old)]
        with open(self._path, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        return names

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        with open(self._path, newline="") as file:
            header, *rows = list(csv.reader(file))
        with open(self._path, "w", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if int(row[0]) <= step)])


class Progress:
    """What the steps since the last line took, waited for and left out.

    Steps are dispatched before they are computed, so what one takes is the time from the moment at
    which the metrics of the step before arrived to that at which its own did; other work (see
    `apart`) is excluded. The first step of a run warms up: it counts only where it is alone.

    Args:
      step: updates made before.
      steps: the last step.
      cost: of a step.
      clock: seconds since any moment.
    """

    def __init__(
        self, step: int, steps: int, cost: Cost, clock: Callable[[], float] = time.perf_counter
    ):
        self._last, self._cost, self._clock = steps, cost, clock
        self._first, self._since = step + 1, clock()
        self._arrived: list[tuple[float, float, float]] = []  # seconds, tokens, bad
        self._waits: list[float] = []

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Around work that is no part of a step, such as an evaluation."""
        started = self._clock()
        yield
        self._since += self._clock() - started

    def fetch(self, batches: Any) -> Any:
        """The next of an iterator's batches, for which the host waits."""
        started = self._clock()
        batch = next(batches)
        self._waits.append(self._clock() - started)
        return batch

    def arrived(self, values: Mapping[str, float]) -> None:
        """The metrics of the next step are there."""
        now = self._clock()
        self._arrived.append((now - self._since, values["tokens"], values["bad_steps"]))
        self._since = now

    def take(self, step: int, values: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """A line on the steps since the last call, and their row: the metrics of `step`, of which
        `bad_steps` is the number since, and MEASURED: counted tokens per second; model FLOP/s over
        the peak, nan if that is unknown; seconds per step; seconds per step that the host waited
        for a batch, on average; see `memory_bytes`."""
        warm_up = step - len(self._arrived) < self._first < step  # the run's first, not alone
        seconds, tokens, _ = np.array(self._arrived[warm_up:]).T
        waits = self._waits[warm_up:] or [0.0]
        used = self._cost.flops / np.mean(seconds)
        measured = (
            *(np.sum(tokens) / np.sum(seconds), used / (self._cost.peak or math.nan)),
            *(*np.percentile(seconds, (50, 90)), np.max(seconds)),
            *(np.mean(waits), memory_bytes()),
        )
        row = {**values, "bad_steps": sum(bad for *_, bad in self._arrived)}
        row |= dict(zip(MEASURED, map(float, measured), strict=True))
        self._arrived, self._waits = [], []
        return self._line(step, row, float(np.mean(seconds))), row

    def _line(self, step: int, row: Mapping[str, float], per_step: float) -> str:
        width, wait = len(str(self._last)), min(row["input_seconds"] / per_step, 1)
        parts = [f"step {step:{width}d}/{self._last}"]
        parts += [f"{name} {row[name]:z.4f}" for name in TERMS]
        parts += [f"{row['tokens_per_second']:,.0f} tok/s"]
        parts += [f"mfu {row['mfu']:.0%}"] if math.isfinite(row["mfu"]) else []
        parts += [f"input wait {wait:.0%}"] if wait > NOTABLE_WAIT else []
        left = datetime.timedelta(seconds=round(per_step * (self._last - step)))
        return "  ".join([*parts, f"left {left}"])


def memory_bytes() -> int:
    """The most memory that was in use at once, so far: of the fullest device of this process, or,
    where devices do not tell (CPUs), of the process itself."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kibibytes
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=process)
