"""Whether a training step fits on a machine, and how fast it could be there, before paying for it.

A step compiled for a mesh of devices that are not here (`topologies`) is the one that would run
there (but for what is tuned on the GPU itself), and `make_report` reads off it what it takes. So it
does from programs for what is present.
"""

import math
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lomdm_jax.distributed import costs, partition, remedies
from lomdm_jax.distributed.chips import GIB, Chip, chip_of
from lomdm_jax.distributed.mesh import described


class Memory(NamedTuple):
    """Bytes of one device while it makes a step.

    params, ema, optimizer: of the state. rest: the batch and what else is given, padding included.
    outputs: results that do not take the place of an argument. temporaries: activations, gradients
    and whatever else comes and goes. code: the program.
    """

    params: int
    ema: int
    optimizer: int
    rest: int
    outputs: int
    temporaries: int
    code: int

    @property
    def state(self) -> int:
        """Bytes of parameters, EMA and optimizer state."""
        return self.params + self.ema + self.optimizer

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return sum(self)


class Seconds(NamedTuple):
    """What a step takes at the chip's best, if it did nothing else: its matrix products, its reads
    and writes of memory, its exchanges with other devices."""

    compute: float
    memory: float
    links: float


class Report(NamedTuple):
    """What a training step takes. Figures are per step: FLOPs over all devices, bytes per device.

    mesh: devices by axis. kind: of the devices, as JAX says it. chip: None for one that is not
    known. tokens: in the global batch. flops: of matrix products, what is recomputed included.
    model_flops: without that. compiler_flops, compiler_bytes: what the compiler says of one device;
    it counts the body of a loop once. bytes_accessed: see `costs`. lowering, compiling: seconds.
    """

    mesh: dict[str, int]
    kind: str
    chip: Chip | None
    memory: Memory
    tokens: int
    flops: int
    model_flops: int
    compiler_flops: float | None
    bytes_accessed: int
    compiler_bytes: float | None
    collectives: list[costs.Collective]
    lowering: float
    compiling: float

    @property
    def devices(self) -> int:
        """How many share the work."""
        return math.prod(self.mesh.values())

    @property
    def seconds(self) -> Seconds | None:
        """The roofline; None for an unknown chip."""
        if self.chip is None:
            return None
        moved = sum(collective.moved for collective in self.collectives)
        return Seconds(
            self.flops / self.devices / self.chip.flops,
            self.bytes_accessed / self.chip.bandwidth,
            moved / self.chip.links,
        )

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """Least and most: all three at once, or one after the other. No kernel reaches the chip's
        best, so that a step may well take longer."""
        return (max(self.seconds), sum(self.seconds)) if self.seconds else None

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Over all devices, for the most and the least `step_seconds`."""
        times = self.step_seconds
        return (self.tokens / times[1], self.tokens / times[0]) if times else None

    @property
    def mfu(self) -> tuple[float, float] | None:
        """Share of the chip's FLOP/s that go into the model, for the most and the least time."""
        if self.chip is None or self.step_seconds is None:
            return None
        least, most = self.step_seconds
        best = self.model_flops / self.devices / self.chip.flops
        return best / most, best / least

    @property
    def fits(self) -> bool | None:
        """Whether `memory` is what a device has; None for an unknown chip."""
        return self.memory.total <= self.chip.memory if self.chip else None


def make_report(
    compiled: jax.stages.Compiled,
    *,
    mesh: Mesh,
    state: Any,
    shardings: Any,
    tokens: int,
    flops: int,
    model_flops: int,
    lowering: float,
    compiling: float,
) -> Report:
    """What the compiled training step takes.

    Args:
      compiled: for the devices of `mesh`, present or not.
      state: its TrainState, arrays or shapes.
      shardings: of the state, see `partition.shardings`.
      tokens: in the global batch.
      flops: `costs.matmul_flops` of the step.
      model_flops: the same without what is recomputed.
      lowering, compiling: seconds that it took.
    """
    program = costs.parse(compiled.as_text() or "")
    analysis = compiled.cost_analysis() or {}
    device = mesh.devices.flat[0]
    return Report(
        mesh=dict(mesh.shape),
        kind=device.device_kind,
        chip=chip_of(device),
        memory=_memory(compiled, state, shardings),
        tokens=tokens,
        flops=flops,
        model_flops=model_flops,
        compiler_flops=analysis.get("flops"),
        bytes_accessed=costs.bytes_accessed(program),
        compiler_bytes=analysis.get("bytes accessed"),
        collectives=costs.collectives(program),
        lowering=lowering,
        compiling=compiling,
    )


def compiled_report(step: jax.stages.Traced, state: Any, config: ConfigDict, mesh: Mesh) -> Report:
    """What the training step takes, by compiling it.

    Args:
      step: traced, for `mesh`.
      state: the TrainState that it takes.
      config: said to be changed where it does not fit.

    Raises:
      UserError: it does not fit.
    """
    split = partition.shardings(mesh, state)
    started = time.perf_counter()
    lowered = step.lower()
    lowering = time.perf_counter() - started
    compiled = remedies.compile_to_fit(lowered, config, mesh, state, split)
    return make_report(
        compiled,
        mesh=mesh,
        state=state,
        shardings=split,
        tokens=config.train.batch_size * config.data.length,
        flops=costs.matmul_flops(step),
        model_flops=costs.matmul_flops(step, recomputed=False),
        lowering=lowering,
        compiling=time.perf_counter() - started - lowering,
    )


def _memory(compiled: jax.stages.Compiled, state: Any, shardings: Any) -> Memory:
    stats: Any = compiled.memory_analysis()
    params = partition.held(state.params, shardings.params)
    ema = partition.held(state.ema, shardings.ema)
    optimizer = partition.held(state.opt_state, shardings.opt_state)
    return Memory(
        params,
        ema,
        optimizer,
        rest=stats.argument_size_in_bytes - params - ema - optimizer,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


# --- How it is told ---


def text(report: Report, config: ConfigDict) -> str:
    """The report as a table; if the memory is exceeded, what to change in `config`."""
    kind = report.chip.name if report.chip else report.kind
    title = f"{report.devices} x {kind} ({described(report.mesh)})"
    rows = [*_memory_rows(report), *_work_rows(report), *_time_rows(report)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    if report.fits is False:
        held = report.memory.state
        lines.append(remedies.advice(config, report.devices, held, "It does not fit."))
    return "\n".join([title, *lines])


Row = tuple[str, str, str]


def _memory_rows(report: Report) -> list[Row]:
    memory, chip = report.memory, report.chip
    names = dict(ema="EMA", params="parameters", optimizer="optimizer state", rest="batch and rest")
    unit, said = (GIB, "GiB") if memory.total >= GIB else (GIB / 1024, "MiB")
    rows: list[Row] = [("memory of a device", said, "")]
    for name, size in memory._asdict().items():
        rows.append((f"  {names.get(name, name)}", f"{size / unit:.2f}", ""))
    share = f"of {chip.memory / unit:,.2f} ({memory.total / chip.memory:.1%})" if chip else ""
    return [*rows, ("  total", f"{memory.total / unit:.2f}", share or "of unknown")]


def _work_rows(report: Report) -> list[Row]:
    by_compiler = "{} of a device by the compiler, loop bodies once".format
    again = report.flops / report.model_flops - 1 if report.model_flops else 0.0
    rows: list[Row] = [
        ("work of a step", "", f"{report.tokens:,} tokens"),
        ("  TFLOP", f"{report.flops / 1e12:.4g}", f"{again:.0%} of the model's recomputed"),
        ("  MFLOP per token", f"{report.flops / report.tokens / 1e6:.4g}", ""),
        ("", _number(report.compiler_flops, 1e12), by_compiler("TFLOP")),
        ("  GB of memory, each device", f"{report.bytes_accessed / 1e9:.4g}", ""),
        ("", _number(report.compiler_bytes, 1e9), by_compiler("GB")),
    ]
    for kind, times, size, moved in report.collectives:
        sent = f"in {times}, of {size / 1e9:.4g} GB"
        rows.append((f"  GB sent, {kind}", f"{moved / 1e9:.4g}", sent))
    return rows


def _number(value: float | None, unit: float) -> str:
    return "unknown" if value is None else f"{value / unit:.4g}"


def _time_rows(report: Report) -> list[Row]:
    rows: list[Row] = [("at the chip's best", "", "")]
    seconds = report.seconds or (None, None, None)
    for name, value in zip(("products", "memory", "links"), seconds, strict=True):
        rows.append((f"  ms, {name}", _number(value, 1e-3), ""))
    rows += [
        ("  ms, a step", _range(report.step_seconds, 1e-3), "all at once to one after the other"),
        ("  tokens per second", _range(report.tokens_per_second, 1), ""),
        ("  MFU, %", _range(report.mfu, 0.01), "without what is recomputed"),
        ("compilation, s", f"{report.compiling:.1f}", f"after {report.lowering:.1f} of lowering"),
    ]
    return rows


def _range(ends: tuple[float, float] | None, unit: float) -> str:
    return "unknown" if ends is None else f"{ends[0] / unit:,.4g} to {ends[1] / unit:,.4g}"


def to_dict(report: Report) -> dict[str, Any]:
    """The report, and what follows from it, as plain values for JSON; None for the unknown."""
    derived = ("devices", "seconds", "step_seconds", "tokens_per_second", "mfu", "fits")
    values = report._asdict() | {name: getattr(report, name) for name in derived}
    values["memory"] = report.memory._asdict() | {"total": report.memory.total}
    values["chip"] = report.chip._asdict() if report.chip else None
    values["collectives"] = [collective._asdict() for collective in report.collectives]
    values["seconds"] = report.seconds._asdict() if report.seconds else None
    return values
