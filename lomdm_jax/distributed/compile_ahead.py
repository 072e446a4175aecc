"""Whether a training step fits on a machine, and how fast it could be there, before paying for it.

The compilers of TPU and GPU programs need neither: `topology` names a slice or a machine, a step
compiled for a mesh of its devices is the one that would run there (but for what is tuned on the GPU
itself), and `make_report` reads off it what it takes. So it does from programs for what is present.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lomdm_jax.config import validate
from lomdm_jax.distributed import costs, partition
from lomdm_jax.distributed.chips import GIB, Chip, chip_of
from lomdm_jax.distributed.gpus import GPUS, target
from lomdm_jax.errors import UserError
from lomdm_jax.models.transformer import REMAT

EXAMPLES = "v4:2x2x1, v5e:2x2, v5e:16x16, v5p:4x4x4, v6e:4x8, tpu7x:2x2x1, h200:1, a100:8"


def quiet_environment() -> None:
    """Tell libtpu, which reads this as it is loaded, that there is no TPU here to ask about.

    JAX itself should run on the CPU then: JAX_PLATFORMS=cpu, set before it starts.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it waits for a metadata server
    # Or only one process at a time may load it, as if all were to use the same TPU.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Or it warns that it knows neither. Programs are made for the topology, whatever these say.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def topology(name: str) -> list[jax.Device]:
    """The devices of a TPU slice or of a machine with GPUs that need not be present, as "v5e:16x16"
    or "h200:8", to compile for. JAX itself should run on the CPU.

    Raises:
      UserError: their compiler is not installed, or it knows no such slice; there is no such GPU.
    """
    kind, _, count = name.partition(":")
    return _gpus(name, kind, count) if kind in GPUS else _tpus(name)


def _gpus(name: str, kind: str, count: str) -> list[jax.Device]:
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if not any("cuda" in plugin.name for plugin in plugins):
        raise UserError(
            f"Compiling for {name!r} needs the compiler of GPU programs, which is not installed: "
            "pip install 'jax[cuda12]'. It runs on any x86-64 Linux machine."
        )
    if not re.fullmatch(r"[1-9]\d*", count):
        raise UserError(f"{name!r} has no number of GPUs: use {kind}:8 for eight in one machine.")
    described = {"target_config": target(GPUS[kind]), "topology": f"1x1x{count}"}
    return list(topologies.get_topology_desc(name, "cuda", **described).devices)


def _tpus(name: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"Compiling for {name!r} needs the compiler of TPU programs, which is not installed: "
            "pip install 'jax[tpu]'. It runs on any x86-64 Linux machine."
        )
    quiet_environment()
    # A size of 0 ends the process in libtpu 0.0.50.
    if not re.fullmatch(r"\w+:[1-9]\d*(x[1-9]\d*)+", name):
        raise _no_slice(name, "it has another form")
    options: dict[str, Any] = {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device per chip, as v4 machines have it
    if re.fullmatch(r"\w+:1(x1)+", name):
        options["chips_per_host_bounds"] = [1, 1, 1]  # or hosts of 2x2 chips are assumed
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise  # nothing is wrong with the name
        raise _no_slice(name, _first_line(error)) from error


def _no_slice(name: str, reason: str) -> UserError:
    return UserError(
        f"{name!r} is nothing that can be compiled for ({reason}): use GENERATION:SHAPE, such as "
        f"{EXAMPLES}; TPU slices above one chip are usually made of 2x2 chips."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


# --- The report ---


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
    compiled = compile_to_fit(lowered, config, mesh, state, split)
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
    params, ema, optimizer = state_held(state, shardings)
    return Memory(
        params,
        ema,
        optimizer,
        rest=stats.argument_size_in_bytes - params - ema - optimizer,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def state_held(state: Any, shardings: Any) -> tuple[int, int, int]:
    """Bytes of the parameters, the EMA and the optimizer state that one device holds.

    state, shardings: see `make_report`.
    """
    return (
        _held(state.params, shardings.params),
        _held(state.ema, shardings.ema),
        _held(state.opt_state, shardings.opt_state),
    )


def _held(tree: Any, shardings: Any) -> int:
    def size(a: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(a.shape)) * a.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))


# --- How it is told ---


def text(report: Report, config: ConfigDict) -> str:
    """The report as a table; if the memory is exceeded, what to change in `config`."""
    shape = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    title = f"{report.devices} x {report.chip.name if report.chip else report.kind} ({shape})"
    rows = [*_memory_rows(report), *_work_rows(report), *_time_rows(report)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    if report.fits is False:
        lines.append(_advice(config, report.devices, report.memory.state, "It does not fit."))
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


# --- When it does not fit ---


def compile_to_fit(
    lowered: jax.stages.Lowered, config: ConfigDict, mesh: Mesh, state: Any, shardings: Any
) -> jax.stages.Compiled:
    """lowered.compile(), with a lack of memory told in terms of the config. Others than TPU
    compilers do not look at how much there is: there `Report.fits` tells.

    state, shardings: as for `make_report`.

    Raises:
      UserError: it does not fit.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        held = sum(state_held(state, shardings))
        explained = does_not_fit(error, config, mesh.size, held)
        if explained is None:
            raise
        raise explained from error


_AMOUNTS = (  # used and available, as the compilers say it
    r"\(([\d.]+[KMGT]?)\) exceeds available \w+ \(([\d.]+[KMGT]?)\)",
    r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?)",
)


def does_not_fit(
    error: Exception, config: ConfigDict, devices: int, state: int
) -> UserError | None:
    """A compiler's error as one that says what to change; None if it is not of a lack of memory.

    state: bytes of parameters, EMA and optimizer state that one device holds.
    """
    said = lack_of_memory(error)
    if said is None:
        return None
    return UserError(_advice(config, devices, state, f"The training step does not fit: {said}."))


def lack_of_memory(error: Exception) -> str | None:
    """How much of how much a program would take, from the compiler's error, or its first line; None
    if it is not of a lack of memory."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    amounts = next(filter(None, (re.search(each, message) for each in _AMOUNTS)), None)
    return f"{amounts[1]} of {amounts[2]}" if amounts else _first_line(error)


def _advice(config: ConfigDict, devices: int, state: int, problem: str) -> str:
    remedies = "\n  ".join(_remedies(config, devices, state))
    return f"{problem} In order of what they cost, these help:\n  {remedies}"


def _remedies(config: ConfigDict, devices: int, state: int) -> list[str]:
    """Changes of the config that save memory and are not made yet, cheapest first."""
    parts = _more_micro_batches(config, devices // config.mesh.tensor)
    found = []
    if parts:
        others = f" (or {', '.join(map(str, parts[1:4]))})" if parts[1:] else ""
        found.append(f"--config.train.micro_batches={parts[0]}{others}: fewer sequences at a time")
    levels = tuple(REMAT)
    for level in levels[levels.index(config.model.remat) + 1 :]:
        found.append(f"--config.model.remat={level}: fewer activations kept, more recomputed")
    if remedy := _more_fsdp(config, devices // config.mesh.tensor, state):
        found.append(remedy)
    if config.model.dtype == "float32":
        found.append("--config.model.dtype=bfloat16: activations of half the size")
    return [*found, f"more devices than {devices}"]


def _more_micro_batches(config: ConfigDict, splits: int) -> list[int]:
    """Larger values of train.micro_batches that the batch and `splits` parts of a mesh allow."""
    total, now = config.train.batch_size, config.train.micro_batches
    return [
        parts
        for parts in range(now + 1, total // splits + 1)
        if total % (parts * splits) == 0 and _valid(config, parts)
    ]


def _valid(config: ConfigDict, micro_batches: int) -> bool:
    changed = config.copy_and_resolve_references()
    changed.train.micro_batches = micro_batches
    try:
        validate(changed)
    except UserError:
        return False
    return True


# Beyond this the exchanges of parameters cost more than the memory that is left to save.
MOST_FSDP = 16


def _more_fsdp(config: ConfigDict, splits: int, state: int) -> str | None:
    """The advice to share the state over more devices, None if it is over as many as is good."""
    now = config.mesh.fsdp
    shares = [n for n in range(now + 1, min(splits, MOST_FSDP) + 1) if splits % n == 0]
    if not shares:
        return None
    saved = state * (1 - now / shares[-1]) / GIB
    return (
        f"--config.mesh.fsdp={shares[-1]} --config.mesh.data=-1: parameters, EMA and optimizer "
        f"state shared, {saved:.2f} GiB less on each device"
    )
