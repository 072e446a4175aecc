"""Where numbers go: CSV, TensorBoard, and a line on the screen."""

import csv
import datetime
import pathlib
import time
from collections.abc import Mapping

from tensorboardX import SummaryWriter

TERMS = ("loss", "main", "order", "clock", "reconstruction")


class MetricWriter:
    """Appends rows to `<name>.csv` and scalars to TensorBoard events, both in `folder`.

    Args:
      folder: the run's folder.
      name: of the CSV file and prefix of the TensorBoard tags.
      step: the step a resumed run starts from; later rows of an earlier attempt are dropped.
    """

    def __init__(self, folder: pathlib.Path, name: str, step: int = 0):
        self._path, self._name = folder / f"{name}.csv", name
        self._drop_after(step)
        self._events = SummaryWriter(str(folder / "tensorboard" / name), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values`, which must have the same names at every call."""
        row = {"step": step, **values}
        new = not self._path.exists()
        with open(self._path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        for key, value in values.items():
            self._events.add_scalar(f"{self._name}/{key}", value, step)

    def close(self) -> None:
        self._events.close()

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        with open(self._path, newline="") as file:
            header, *rows = list(csv.reader(file))
        with open(self._path, "w", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if int(row[0]) <= step)])


class Progress:
    """Speed and time left, measured over the steps since the last line."""

    def __init__(self, step: int, steps: int):
        self._step, self._steps, self._time = step, steps, time.perf_counter()

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not spent on steps."""
        self._time += seconds

    def line(self, step: int, values: Mapping[str, float]) -> tuple[str, float]:
        """A progress line, and the speed in counted tokens per second."""
        now = time.perf_counter()
        per_step = (now - self._time) / max(step - self._step, 1)
        self._step, self._time = step, now
        speed = values["tokens"] / per_step
        terms = "  ".join(f"{name} {values[name]:z.4f}" for name in TERMS)
        left = datetime.timedelta(seconds=round(per_step * (self._steps - step)))
        width = len(str(self._steps))
        return (
            f"step {step:{width}d}/{self._steps}  {terms}  {speed:,.0f} tok/s  left {left}",
            speed,
        )
