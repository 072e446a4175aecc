"""The loop: what it says about speed, what it does about bad steps, and when it saves.

Most of it on a simulated device: a clock that only moves when something waits.
"""

import contextlib
import csv
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lomdm_jax.config import default_config, validate
from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError
from lomdm_jax.training import guard, loop
from lomdm_jax.training.loop import Loop, Terminated
from lomdm_jax.training.metrics import MEASURED, TERMS, Cost, MetricWriter, memory_bytes

TOKENS = 100
UNKNOWN = Cost(1.0, None)


class World:
    """A device that computes one step after the other, a host that waits, and the time.

    takes, fetches: seconds of step or batch number `n`, 1 and 0 unless given.
    bad: numbers of steps whose loss is not finite.
    """

    def __init__(self, takes=None, fetches=None, bad=()):
        self.now, self.free, self.fetched = 0.0, 0.0, 0
        self.takes, self.fetches, self.bad = takes or {}, fetches or {}, bad
        self.saved, self.folder, self.state = [], "checkpoints", None

    def __next__(self):
        self.fetched += 1
        self.now += self.fetches.get(self.fetched, self.fetches.get("all", 0.0))
        return {}

    def get_state(self):
        return {}

    def step(self, number, state, batch, key):
        self.free = max(self.now, self.free) + self.takes.get(number, 1.0)
        bad = number in self.bad
        values = dict.fromkeys((*TERMS, "grad_norm"), math.nan if bad else 1.0 / number)
        values |= {"tokens": TOKENS, "bad_steps": bad, "loss_mean": 1.0, "loss_deviation": 0.5}
        metrics = {name: Arriving(self, self.free, value) for name, value in values.items()}
        return types.SimpleNamespace(step=number), metrics

    def evaluate(self, state):
        self.now += 1000
        return state, 1.0

    def save(self, state, *_):
        self.now += 100
        self.saved.append(state.step)

    def latest(self):
        return max(self.saved, default=None)

    def wait(self):
        pass


class Arriving:
    """A number that is there at a time; who reads it waits until then."""

    def __init__(self, world, ready, value):
        self.world, self.ready, self.value = world, ready, value

    def __array__(self, *_, **__):
        self.world.now = max(self.world.now, self.ready)
        return np.asarray(self.value)


def run(folder, world, *, cost=UNKNOWN, first=0, checkpoint_every=10**6, **train):
    """The rows of a run of `world` in `folder`."""
    config = default_config()
    config.train.update({"steps": 20, "log_every": 10, "eval_every": 10**6, **train})
    config.checkpoint.every = checkpoint_every
    validate(config)
    folder.mkdir(exist_ok=True)
    writer = MetricWriter(folder, "train", first)
    made = Loop(
        config,
        step=world.step,
        place=lambda batch: batch,
        key=jax.random.key(0),
        evaluate=world.evaluate,
        checkpoints=world,
        facts={},
        writer=writer,
        cost=cost,
        clock=lambda: world.now,
    )
    with contextlib.closing(writer):
        made.run(world.state or types.SimpleNamespace(step=first), world)
    return rows(folder)


def rows(folder):
    with (folder / "train.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_a_step_takes_from_one_arrival_to_the_next_and_the_first_warms_up(tmp_path):
    """Steps are dispatched ahead, of which nothing is to be seen."""
    takes = {1: 60.0, 3: 2.0, 4: 3.0, 15: 9.0}
    first, second = run(tmp_path, World(takes))
    seconds = [1.0, 2.0, 3.0, *[1.0] * 6]
    assert first["step_seconds_p50"] == 1 and first["step_seconds_max"] == 3
    assert first["step_seconds_p90"] == pytest.approx(np.percentile(seconds, 90))
    assert first["tokens_per_second"] == pytest.approx(9 * TOKENS / sum(seconds))
    assert second["step_seconds_max"] == 9 and second["step_seconds_p90"] == pytest.approx(1.8)
    assert second["tokens_per_second"] == pytest.approx(10 * TOKENS / 18)


def test_a_first_step_alone_is_told_as_it_was(tmp_path):
    first, second = run(tmp_path, World({1: 60.0}), steps=2, log_every=1)
    assert first["step_seconds_p50"] == 60 and second["step_seconds_p50"] == 1
    (only,) = run(tmp_path / "resumed", World({8: 60.0}), first=7, steps=10)
    assert only["step"] == 10 and only["step_seconds_max"] == 1


def test_evaluations_and_checkpoints_take_no_step_time(tmp_path):
    found = run(tmp_path, World(), eval_every=6, checkpoint_every=4)
    assert [row["step_seconds_max"] for row in found] == [1, 1]
    assert [row["tokens_per_second"] for row in found] == [TOKENS, TOKENS]


@pytest.mark.parametrize(
    ("wait", "step_seconds", "said"),
    [(0.04, 1, None), (0.5, 1, "input wait 50%"), (3, 3, "input wait 100%")],
)
def test_waiting_for_batches_is_told_where_it_matters(tmp_path, capsys, wait, step_seconds, said):
    """Up to a step's time it is hidden behind the step before; the first batch is always late."""
    found = run(tmp_path, World(fetches={"all": wait, 1: 70.0}), steps=30)
    for row, line in zip(found, lines(capsys), strict=True):
        assert row["input_seconds"] == pytest.approx(wait)
        assert row["step_seconds_p50"] == pytest.approx(step_seconds)
        assert said in line if said else "wait" not in line
        assert len(line) < 150


def test_utilisation_is_of_all_devices_peak_or_unknown(tmp_path, capsys):
    known = run(tmp_path / "a", World({2: 4.0}), cost=Cost(flops=3e12, peak=8e12), steps=2)
    assert known[0]["mfu"] == pytest.approx(3e12 / (4 * 8e12))
    assert "  mfu 9%  " in lines(capsys)[0]
    unknown = run(tmp_path / "b", World(), cost=Cost(flops=3e12, peak=None), steps=2)
    assert math.isnan(unknown[0]["mfu"]) and "mfu" not in lines(capsys)[0]
    assert unknown[0].keys() == known[0].keys() >= set(MEASURED)


def test_memory_is_the_fullest_devices_or_the_processs(monkeypatch):
    before = memory_bytes()
    assert np.ones(2**26, np.uint8).sum() == 2**26
    assert 2**25 < memory_bytes() < 2**40 and memory_bytes() >= before
    sizes = [{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}, None]
    devices = [types.SimpleNamespace(memory_stats=lambda size=size: size) for size in sizes]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_bytes() == 7


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(multihost, "leads", lambda: False)
    writer = MetricWriter(tmp_path, "train")
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_bad_step_stops_the_run_and_is_not_saved(tmp_path):
    world = World(bad=[8])
    with pytest.raises(UserError) as error:
        run(tmp_path, world, checkpoint_every=4)
    assert world.saved == [4]
    words = ["at step 8", "not finite", "loss nan", "grad_norm nan", "step 4 is saved in"]
    words += ["config.optimizer.learning_rate", "config.train.on_bad_step"]
    assert all(word in str(error.value) for word in words), error.value


def test_bad_steps_are_skipped_told_and_counted(tmp_path, capsys):
    found = run(tmp_path, World(bad=[3, 4, 12]), on_bad_step="skip")
    assert [row["bad_steps"] for row in found] == [2, 1]
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == [f"step {n} is skipped" for n in (3, 4, 12)]
    assert "the loss or its gradient is not finite (loss nan, main nan" in told[0]


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path, capsys):
    nine = [n for n in range(1, 20) if n != 10]
    run(tmp_path / "nine", World(bad=nine), on_bad_step="skip")
    with pytest.raises(UserError) as error:
        run(tmp_path / "ten", World(bad=range(3, 30)), steps=40, on_bad_step="skip")
    words = ["stopped at step 12", "10 steps in a row", "not finite", "no checkpoint was saved"]
    assert all(word in str(error.value) for word in words), error.value
    assert "on_bad_step" not in str(error.value)


def test_a_spike_is_named_with_what_it_was_compared_with(tmp_path):
    config = default_config().train
    config.spike = 3.0
    values = dict.fromkeys((*TERMS, "grad_norm"), 9.5)
    values |= {"bad_steps": 1.0, "loss_mean": 2.25, "loss_deviation": 0.5}
    with pytest.raises(UserError) as error:
        guard.Guard(config, World()).check(7, values)
    words = ["step 7", "config.train.spike = 3", "2.25", "0.5", "loss 9.5"]
    assert all(word in str(error.value) for word in words), error.value


def test_every_step_asks_whether_to_end(tmp_path, monkeypatch):
    asked = []

    @contextlib.contextmanager
    def termination():
        yield lambda step: (asked.append(step), step == 13)[1]

    monkeypatch.setattr(loop, "termination", termination)
    world = World()
    with pytest.raises(Terminated, match="step 13"):
        run(tmp_path, world)
    assert asked == list(range(1, 14)) and world.saved == [13]


@pytest.fixture
def computing():
    """A world whose steps run on the real device."""
    work = jax.jit(lambda x: jnp.sum(x @ x))
    world, pretend = World(), World.step

    def step(number, state, batch, key):
        state, metrics = pretend(world, number, state, batch, key)
        return state, metrics | {"sum": work(values)}

    values = jnp.ones((8, 8))
    world.step = step
    work(values).block_until_ready()
    return world


def traces(folder):
    return list(folder.glob("profile/plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("steps", ["2:3", "3:3", "3:99", "5:5"])
def test_a_profile_is_written_though_the_run_ends_early(tmp_path, capsys, computing, steps):
    run(tmp_path, computing, steps=5, profile=steps)
    assert len(traces(tmp_path)) == 1
    (said,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("profile  ")]
    assert str(tmp_path / "profile") in said and "xprof --logdir" in said
    jax.profiler.start_trace(tmp_path)  # only possible if none runs
    jax.profiler.stop_trace()


def test_a_profile_is_written_though_the_run_fails(tmp_path, capsys, computing):
    computing.bad = [4]
    with pytest.raises(UserError, match="step 4"):
        run(tmp_path, computing, profile="2:9")
    assert len(traces(tmp_path)) == 1


def test_a_resumed_run_profiles_what_is_left(tmp_path, capsys, computing):
    run(tmp_path / "late", computing, first=6, steps=9, profile="2:5")
    assert not traces(tmp_path / "late")
    run(tmp_path / "among", computing, first=3, steps=9, profile="2:5")
    assert "profile  steps 4 to 5, in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("profile", "5", ["'5'", "FIRST:LAST"]),
        ("profile", "0:5", ["'0:5'", "from 1 to 20"]),
        ("profile", "7:5", ["'7:5'", "not above LAST"]),
        ("profile", "21:25", ["'21:25'", "from 1 to 20"]),
        ("profile", "1:2:3", ["'1:2:3'"]),
        ("on_bad_step", "ignore", ["'ignore'", "stop, skip"]),
        ("spike", -1.0, ["-1.0", "negative"]),
    ],
)
def test_bad_settings_are_refused(tmp_path, key, value, words):
    with pytest.raises(UserError) as error:
        run(tmp_path, World(), **{key: value})
    assert all(word in str(error.value) for word in [f"config.train.{key}", *words]), error.value


def test_a_file_of_an_older_version_gets_the_new_columns(tmp_path):
    (tmp_path / "eval.csv").write_text("step,loss\n10,2.5\n20,2.0\n")
    writer = MetricWriter(tmp_path, "eval", step=10)
    writer.write(20, {"error": 0.1, "loss": 1.5})
    writer.close()
    assert (tmp_path / "eval.csv").read_text().split() == [
        "step,loss,error",
        "10,2.5,",
        "20,1.5,0.1",
    ]
