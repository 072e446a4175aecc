"""Real processes on this machine as one run: the same on any mesh, and after being killed.

python benchmarks/resilience.py meshes
python benchmarks/resilience.py chaos [--kills 20] [--seed 0]
python benchmarks/resilience.py damage

All train a tiny LoMDM on the text of LICENSE, in CPU processes that exchange over gloo, and exit
with 1 if a check fails; each writes its section of resilience.md.

meshes compares every mesh of two and four processes with one process.

chaos kills runs at random moments, starts them again, and compares the end with that of a run left
alone: three fifths of the kills on one mesh, where every bit must agree, the rest with another mesh
at each start. The moments are random by nature; the seed decides on the plan.

damage cuts in half, empties and deletes every file of a checkpoint in turn, and tries to go on.
"""

import argparse
import csv
import hashlib
import itertools
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from launch import local_processes  # noqa: E402
from lomdm_jax.distributed.mesh import AXES  # noqa: E402

Sizes = tuple[int, int, int, int]  # of a mesh, in the order of AXES
ONE: Sizes = (1, 1, 1, 1)
MESHES: list[Sizes] = [
    *[(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)],
    *[(4, 1, 1, 1), (2, 2, 1, 1), (1, 2, 2, 1), (1, 1, 4, 1), (1, 2, 1, 2), (1, 1, 1, 4)],
]
# Seconds in which processes must end when another is gone: at the latest by JAX's heartbeat, which
# takes 100. Before they have joined they wait for it for minutes, and are stopped as by a launcher.
PATIENCE, STARTING = 150.0, 10.0

# Trains as usual, and writes down a hash of every global batch as it lies on the devices.
RECORDING = """
import hashlib, pathlib, sys
import jax
from lomdm_jax.distributed import multihost
from lomdm_jax.main import main
from lomdm_jax.run import Run
place = Run.place_rows
def recorded(run, batch):
    placed = place(run, batch)
    whole = jax.device_get(run.jit(lambda tree: tree)(placed))
    if multihost.leads():
        data = b"".join(whole[name].tobytes() for name in sorted(whole))
        with open(run.workdir / "batches.txt", "a") as file:
            print(hashlib.sha256(data).hexdigest(), file=file)
    return placed
Run.place_rows = recorded
sys.exit(main(sys.argv[1:]))
"""


def arguments(folder: pathlib.Path, workdir: pathlib.Path, sizes: Sizes, *changes: str) -> list:
    """The command line of a tiny run; in folder is what runs share."""
    settings = [
        *(f"mesh.{axis}={n}" for axis, n in zip(AXES, sizes, strict=True)),
        *("data.source=LICENSE", "data.tokenizer=bytes", "data.vocab_size=0", "data.length=16"),
        *(f"data.directory={folder / 'data'}", "data.valid_share=0.1", "data.workers=1"),
        *("model.width=32", "model.heads=4", "model.layers=1", "model.cond_dim=8"),
        # A large eps keeps Adam from turning rounding into steps of full size.
        *("model.dropout=0.1", "optimizer.eps=0.01", "optimizer.warmup_steps=5"),
        *("train.batch_size=8", "train.log_every=1", "eval.batch_size=8", "eval.sequences=16"),
        *("eval.draws=1", "sample.count=4", *changes),
    ]
    command = ["--config=configs/quickstart.py", f"--workdir={workdir}"]
    return command + [f"--config.{setting}" for setting in settings]


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Quick to compile, once for all runs: starting is most of what they do."""
    flags = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return dict(os.environ) | flags


def start(folder: pathlib.Path, command: list[str], sizes: Sizes, log: Any, **options: Any) -> list:
    """The processes of a run, one device each; what they print goes to `log`."""
    os.chdir(ROOT)
    return local_processes.start(
        int(np.prod(sizes)),
        command,
        devices=1,
        environment=environment(folder),
        stdout=log,
        stderr=subprocess.STDOUT,
        **options,
    )


def complete(folder: pathlib.Path, command: list[str], sizes: Sizes, **options: Any) -> None:
    """Run it to its end."""
    with open(folder / "log.txt", "w+") as log:
        children = start(folder, command, sizes, log, **options)
        statuses = [child.wait() for child in children]
        if any(statuses):
            log.seek(0)
            raise RuntimeError(f"{sizes} ended with {statuses}:\n{log.read()[-3000:]}")


def rows(path: pathlib.Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def computed(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows without what is measured of the machine."""
    from lomdm_jax.training.metrics import MEASURED

    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows(path)]


def final_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """The last checkpoint's arrays by name, and the position in the data."""
    import jax
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    folder = workdir / "checkpoints" / str(step)
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder / "state").item_metadata.tree
        how = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=device), tree)
        tree = reader.restore(folder / "state", restore_args=how)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    data = hashlib.sha256((folder / "data" / "metadata").read_bytes()).digest()
    return arrays | {"data": np.frombuffer(data, np.uint8)}


# --- The same on any mesh ---


class Compared(NamedTuple):
    """A run against that of one process: largest differences, relative of losses and absolute of
    parameters and the rest of the state; whether the batches are the same; seconds."""

    sizes: Sizes
    losses: float
    state: float
    same_batches: bool
    seconds: float


def meshes(folder: pathlib.Path, wanted: Sequence[Sizes], steps: int = 12) -> list[Compared]:
    """Train on one process and on each mesh that is wanted."""
    found: dict[Sizes, tuple] = {}
    for sizes in (ONE, *wanted):
        workdir = folder / "x".join(map(str, sizes))
        changes = (f"train.steps={steps}", f"train.eval_every={steps}", "checkpoint.every=1000")
        started = time.monotonic()
        program = [sys.executable, "-c", RECORDING]
        complete(folder, arguments(folder, workdir, sizes, *changes), sizes, program=program)
        losses = np.array([float(row["loss"]) for row in rows(workdir / "train.csv")])
        batches = (workdir / "batches.txt").read_text().split()
        seconds = time.monotonic() - started
        found[sizes] = losses, final_state(workdir), batches, seconds
        print(f"{sizes}: {len(losses)} steps, {seconds:.0f} s", flush=True)
    return [_compared(sizes, found[sizes], found[ONE]) for sizes in wanted]


def _compared(sizes: Sizes, ours: tuple, theirs: tuple) -> Compared:
    losses = float(np.max(np.abs(ours[0] / theirs[0] - 1)))
    return Compared(sizes, losses, distance(ours[1], theirs[1]), ours[2] == theirs[2], ours[3])


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest absolute difference between two states."""
    return max(float(np.max(np.abs(ours[k].astype(float) - theirs[k]))) for k in theirs)


def meshes_section(found: list[Compared]) -> list[str]:
    lines = [f"| processes | {' x '.join(AXES)} | losses | state | same batches | seconds |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in found:
        shape, same = " x ".join(map(str, row.sizes)), "yes" if row.same_batches else "NO"
        lines.append(
            f"| {np.prod(row.sizes)} | {shape} | {row.losses:.1e} | {row.state:.1e} | {same} "
            f"| {row.seconds:.0f} |"
        )
    return lines


# --- Killed at random ---


class Kill(NamedTuple):
    """signal: SIGKILL or SIGTERM; target: one or all; moment: start, step or write."""

    signal: signal.Signals
    target: str
    moment: str


class Killed(NamedTuple):
    """What came of a kill: the step it was at, that it went on from, seconds until the processes
    had ended (from STARTING on they were stopped), and what went wrong ("" for nothing)."""

    kill: Kill
    at: int
    resumed: int
    seconds: float
    fault: str


def plan(kills: int, chance: random.Random) -> list[Kill]:
    """All combinations, as often as they fit, in random order."""
    pairs = itertools.product((signal.SIGKILL, signal.SIGTERM), ("one", "all"), ("step", "write"))
    every = [Kill(*pair) for pair in pairs] + [Kill(signal.SIGKILL, "all", "start")]
    every += [Kill(signal.SIGKILL, "one", "start")]
    chosen = [kill for _ in range(-(-kills // len(every))) for kill in every][:kills]
    chance.shuffle(chosen)
    return chosen


class Chaos:
    """A run that is killed and started again until it is done.

    sizes: the mesh of each start, called with its number.
    every: steps from checkpoint to checkpoint.
    changes: of the config, besides those of `arguments`.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        workdir: pathlib.Path,
        sizes: Callable[[int], Sizes],
        every: int,
        changes: Sequence[str],
        chance: random.Random,
    ):
        self._folder, self._workdir, self._sizes, self._every = folder, workdir, sizes, every
        self._changes, self._chance = changes, chance
        self._log = folder / f"{workdir.name}.txt"

    def run(self, kills: list[Kill]) -> list[Killed]:
        """What came of each kill; the run is complete afterwards."""
        found: list[Killed] = []
        for number, kill in enumerate(kills):
            expected = self._resumed_after()
            children = self._start(number)
            self._wait_for(kill.moment, children)
            known, at = self._steps(), self._step() if self._said("compiled") else expected
            seconds, fault = self._end(children, kill)
            said = self._said(r"terminated at step (\d+)")
            at, resumed = int(said[-1]) if said else at, self._resumed_after()
            fault = fault or self._judge(kill, children, known, at, resumed, bool(said))
            fault = fault or self._misled(expected)
            found.append(Killed(kill, at, resumed, seconds, fault))
            print(f"{number + 1}/{len(kills)} {describe(found[-1])}", flush=True)
        expected = self._resumed_after()
        statuses = [child.wait() for child in self._start(len(kills))]
        if any(statuses) or self._misled(expected):
            raise RuntimeError(f"ended with {statuses}:\n{self._log.read_text()[-3000:]}")
        return found

    def _said(self, pattern: str) -> list[str]:
        return re.findall(pattern, self._log.read_text())

    def _misled(self, expected: int) -> str:
        """Whether this start went on from another step than the newest checkpoint's."""
        went = self._said(r"continuing from step (\d+)")
        began = int(went[0]) if went else 0
        late = went or self._said("compiled")  # else it did not come so far
        return f"went on from {began}, not {expected}" if late and began != expected else ""

    def _start(self, number: int) -> list[subprocess.Popen]:
        sizes = self._sizes(number)
        command = arguments(self._folder, self._workdir, sizes, *self._changes)
        with open(self._log, "w") as log:
            return start(self._folder, command, sizes, log)

    def _steps(self) -> list[int]:
        """Complete checkpoints."""
        folder = self._workdir / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    def _resumed_after(self) -> int:
        """Where the next start goes on: the newest checkpoint that is complete."""
        return max(self._steps(), default=0)

    def _step(self) -> int:
        path = self._workdir / "train.csv"
        lines = path.read_text().splitlines() if path.exists() else []
        number = lines[-1].partition(",")[0] if lines else ""
        return int(number) if number.isdigit() else 0

    def _wait_for(self, moment: str, children: list[subprocess.Popen]) -> None:
        chance, first = self._chance, self._resumed_after()
        if moment == "start":
            time.sleep(chance.uniform(0, 5))
            return
        goal = first + chance.randint(3, 15)
        while self._running(children) and not self._said("compiled"):
            time.sleep(0.05)
        while self._running(children) and not (self._step() >= goal):
            time.sleep(0.002)
        while moment == "write" and self._running(children) and not self._writing():
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.03))

    def _writing(self) -> bool:
        return any((self._workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))

    def _running(self, children: list[subprocess.Popen]) -> bool:
        return all(child.poll() is None for child in children)

    def _end(self, children: list[subprocess.Popen], kill: Kill) -> tuple[float, str]:
        """Kill; seconds until all have ended, and what is wrong with that."""
        if not self._running(children):
            return 0.0, f"ended early with {[child.poll() for child in children]}"
        started = time.monotonic()
        for child in children if kill.target == "all" else [self._chance.choice(children)]:
            child.send_signal(kill.signal)
        while any(child.poll() is None for child in children):
            if time.monotonic() - started > (STARTING if kill.moment == "start" else PATIENCE):
                local_processes.stop(children, 1.0)
                waited = time.monotonic() - started
                return waited, "" if kill.moment == "start" else "the others did not end"
            time.sleep(0.01)
        return time.monotonic() - started, ""

    def _judge(
        self,
        kill: Kill,
        children: list[subprocess.Popen],
        known: list[int],
        at: int,
        resumed: int,
        terminated: bool,
    ) -> str:
        statuses = [child.returncode for child in children]
        if kill.signal == signal.SIGTERM and kill.moment != "start":
            if not terminated or set(statuses) != {143}:
                return f"SIGTERM ended it with {statuses}"
            return "" if resumed == at else f"step {at} was saved, {resumed} is there"
        if resumed < max(known, default=0):
            return f"checkpoint {max(known)} was complete and is not there"
        if at - resumed >= 2 * self._every:  # one checkpoint may have been in writing
            return f"{at - resumed} steps are lost"
        return ""


def describe(killed: Killed) -> str:
    kill = killed.kill
    text = f"{kill.signal.name} to {kill.target} at {kill.moment}: step {killed.at}, goes on from "
    text += f"{killed.resumed}, ended in {killed.seconds:.1f} s"
    return f"{text}: {killed.fault}" if killed.fault else text


def left_behind(workdir: pathlib.Path, reference: pathlib.Path) -> list[str]:
    """Names that a run left alone has not, or has besides."""

    def names(folder: pathlib.Path) -> set[str]:
        found = {path.name for path in folder.iterdir()}
        return found | {f"checkpoints/{path.name}" for path in (folder / "checkpoints").iterdir()}

    return sorted(names(workdir) ^ names(reference))


class Outcome(NamedTuple):
    """kills: what came of each. faults: what the end has of wrong. state, losses: the largest
    differences from the run left alone, absolute and relative."""

    kills: list[Killed]
    faults: list[str]
    state: float
    losses: float


def chaos(
    folder: pathlib.Path, kills: list[Kill], steps: int, every: int, *, same: bool, seed: int
) -> Outcome:
    """A run of two copies left alone, and one that is killed; same: always on that mesh."""
    chance, base = random.Random(seed), (2, 1, 1, 1)
    changes = (f"train.steps={steps}", f"train.eval_every={steps}", f"checkpoint.every={every}")
    alone, killed = folder / "alone", folder / ("killed" if same else "moved")
    if not alone.exists():
        complete(folder, arguments(folder, alone, base, *changes), base)
    others = [ONE, *MESHES[:4]]
    pick = (lambda number: base) if same else (lambda number: others[number % len(others)])
    found = Chaos(folder, killed, pick, every, changes, chance).run(kills)
    faults = [f"left behind or missing: {name}" for name in left_behind(killed, alone)]
    ours, theirs = (computed(path / "train.csv") for path in (killed, alone))
    if [row["step"] for row in ours] != [str(number) for number in range(1, steps + 1)]:
        faults.append("train.csv does not have every step once")
    states = [final_state(path) for path in (killed, alone)]
    losses = max(
        abs(float(a["loss"]) / float(b["loss"]) - 1) for a, b in zip(ours, theirs, strict=True)
    )
    apart = distance(*states)
    if same:
        equal = all(np.array_equal(states[0][name], states[1][name]) for name in states[1])
        tables = computed(killed / "eval.csv") == computed(alone / "eval.csv") and ours == theirs
        faults += [] if equal and tables else ["the end differs from that of the run left alone"]
    elif losses > 1e-3 or apart > 1e-2:
        faults.append(f"differs by {losses:.1e} in losses, {apart:.1e} in the state")
    return Outcome(found, faults, apart, losses)


def chaos_section(outcomes: dict[str, Outcome]) -> list[str]:
    lines = []
    for name, outcome in outcomes.items():
        lost = [kill.at - kill.resumed for kill in outcome.kills]
        lines += [f"### {name}", ""]
        lines += [f"{len(outcome.kills)} kills; most steps lost by one: {max(lost)}. Largest "]
        lines[-1] += f"difference from the run left alone: {outcome.state:.1e} in the state, "
        lines[-1] += f"{outcome.losses:.1e} in losses (relative). "
        lines[-1] += "; ".join(outcome.faults) or "Nothing left behind, every step logged once."
        lines += ["", "| signal | to | at | step | goes on from | ended in, s | fault |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for each in outcome.kills:
            kill = each.kill
            cells = [kill.signal.name, kill.target, kill.moment, each.at, each.resumed]
            cells += [f"{each.seconds:.1f}", each.fault]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return lines


# --- Damaged files ---

DAMAGES: dict[str, Callable[[pathlib.Path], Any]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
}


def damage(
    folder: pathlib.Path, damages: Sequence[str] = tuple(DAMAGES)
) -> dict[tuple[str, str], str]:
    """By file of the newest checkpoint and damage: "named", where a run would say that it is
    damaged and go on from the one before; "unseen", where it is no longer taken for a checkpoint,
    with the same effect; "harmless", where all of the state is there nevertheless; otherwise what
    is wrong."""
    workdir = folder / "damage"
    changes = ("train.steps=4", "train.eval_every=4", "checkpoint.every=2")
    complete(folder, arguments(folder, workdir, ONE, *changes), ONE)
    attempt, newest = reader(folder, workdir, changes), workdir / "checkpoints" / "4"
    whole, found = attempt(), {}
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for name in damages:
            DAMAGES[name](path)
            found[str(path.relative_to(newest)), name] = judged(attempt, whole)
            path.write_bytes(content)
    return found


def reader(
    folder: pathlib.Path, workdir: pathlib.Path, changes: Sequence[str]
) -> Callable[[], Any]:
    """A function that restores the newest checkpoint as a run does: its step, state and data."""
    import jax

    from lomdm_jax.main import parse
    from lomdm_jax.run import start as start_run
    from lomdm_jax.training import checkpoint, initial
    from lomdm_jax.training.optimizer import make_optimizer

    run = start_run(parse(arguments(folder, workdir, ONE, *changes)).config, workdir)
    target = initial.target(run, make_optimizer(run.config.optimizer))

    def attempt() -> Any:
        checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", 2, create=False)
        step = checkpoints.latest()
        checkpoint.check_facts(
            checkpoints.facts(step), checkpoint.facts(run.config, run.prepared), resume=True
        )
        return step, jax.device_get(tuple(checkpoints.restore(step, target)))

    return attempt


def judged(attempt: Callable[[], Any], whole: Any) -> str:
    import jax

    from lomdm_jax.training.checkpoint import Damaged

    try:
        step, restored = attempt()
    except Damaged:
        return "named"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:100]
    if step != whole[0]:
        return "unseen"
    same = jax.tree.map(lambda a, b: bool(np.all(a == b)), restored, whole[1])
    return "harmless" if all(jax.tree.leaves(same)) else "GARBAGE"


def damage_section(found: dict[tuple[str, str], str]) -> list[str]:
    lines = [f"| file | {' | '.join(DAMAGES)} |", f"|{' --- |' * (len(DAMAGES) + 1)}"]
    for path in dict.fromkeys(path for path, _ in found):
        lines.append(f"| {' | '.join([path, *(found[path, name] for name in DAMAGES)])} |")
    return lines


def write(name: str, lines: list[str]) -> None:
    """Replace one section of resilience.md."""
    import jax
    import orbax.checkpoint as ocp

    path = ROOT / "benchmarks" / "resilience.md"
    head, *sections = (
        path.read_text().split("\n## ") if path.exists() else ["# Killed, moved, damaged\n"]
    )
    title = f"`python benchmarks/resilience.py {name}`"
    kept = [
        section for section in sections if not section.startswith(title.split(" --")[0].rstrip("`"))
    ]
    versions = f"jax {jax.__version__}, orbax-checkpoint {ocp.__version__}"
    kept.append("\n".join([title, "", versions, "", *lines, ""]))
    path.write_text("\n## ".join([head, *sorted(kept)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("meshes", "chaos", "damage"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="resilience-"))
    try:
        commands = {"meshes": _meshes, "chaos": _chaos, "damage": _damage}
        return commands[options.what](folder, options)
    finally:
        shutil.rmtree(folder)


def _meshes(folder: pathlib.Path, options: argparse.Namespace) -> int:
    found = meshes(folder, MESHES)
    lines = meshes_section(found)
    print("\n".join(lines))
    write("meshes", lines)
    return int(any(row.losses > 1e-4 or not row.same_batches for row in found))


def _chaos(folder: pathlib.Path, options: argparse.Namespace) -> int:
    kills = plan(options.kills, random.Random(options.seed))
    cut, steps = round(0.6 * len(kills)), 40 * options.kills // 2 + 100
    outcomes = {
        "on the same mesh": chaos(folder, kills[:cut], steps, 20, same=True, seed=options.seed),
        "on another mesh each time": chaos(
            folder, kills[cut:], steps, 20, same=False, seed=options.seed + 1
        ),
    }
    lines = chaos_section(outcomes)
    print("\n".join(lines))
    write(f"chaos --kills {options.kills} --seed {options.seed}", lines)
    return int(any(o.faults or any(kill.fault for kill in o.kills) for o in outcomes.values()))


def _damage(folder: pathlib.Path, options: argparse.Namespace) -> int:
    found = damage(folder)
    lines = damage_section(found)
    print("\n".join(lines))
    write("damage", lines)
    return int(bool(set(found.values()) - {"named", "unseen", "harmless"}))


if __name__ == "__main__":
    sys.exit(main())
