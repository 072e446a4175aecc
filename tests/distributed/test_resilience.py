"""Several real processes: as one run, killed, at odds with each other, and with damaged files."""

import shutil
import signal
import subprocess

import pytest

from benchmarks import resilience
from benchmarks.resilience import Kill, arguments, chaos, complete, environment, start
from launch import local_processes

FSDP = (1, 2, 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def ended(folder, commands, sizes=FSDP):
    """Statuses and what was printed, of processes that may have different command lines."""
    log = folder / "ended.txt"
    address = f"127.0.0.1:{local_processes.free_port()}"
    with open(log, "w") as file:
        children = [
            subprocess.Popen(
                [*local_processes.PROGRAM, *command, f"--distributed={address},2,{index}"],
                env=environment(folder),
                cwd=resilience.ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for index, command in enumerate(commands)
        ]
        statuses = [child.wait(timeout=120) for child in children]
    return statuses, log.read_text()


def test_two_processes_are_as_one(folder):
    (found,) = resilience.meshes(folder, [FSDP], steps=6)
    assert found.same_batches
    assert found.losses < 1e-5 and found.state < 1e-5


def test_chaos(folder):
    """The short version of `python benchmarks/resilience.py chaos`."""
    kills = [
        Kill(signal.SIGKILL, "one", "step"),
        Kill(signal.SIGTERM, "one", "step"),
        Kill(signal.SIGKILL, "all", "write"),
    ]
    outcome = chaos(folder, kills, steps=80, every=10, same=True, seed=0)
    assert not outcome.faults
    assert not any(killed.fault for killed in outcome.kills), outcome.kills
    assert all(killed.at - killed.resumed <= 20 for killed in outcome.kills)
    assert outcome.state == outcome.losses == 0


def test_processes_at_odds_are_told_so(folder):
    rates = [f"optimizer.learning_rate={rate}" for rate in (0.001, 0.002)]
    commands = [arguments(folder, folder / "odds", FSDP, rate) for rate in rates]
    statuses, printed = ended(folder, commands)
    assert statuses == [2, 2], printed
    assert "The processes disagree on optimizer.learning_rate: process 0 has 0.001" in printed
    assert not list((folder / "odds" / "checkpoints").iterdir())


def test_no_emptied_file_of_a_checkpoint_is_trained_on(folder):
    """A part of `python benchmarks/resilience.py damage`."""
    found = resilience.damage(folder, ["emptied"])
    told = {file for (file, _), what in found.items() if what in ("named", "unseen")}
    assert {"data/metadata", "facts/metadata", "state/manifest.ocdbt"} <= told
    assert set(found.values()) <= {"named", "unseen", "harmless"}, found


def test_damage_that_one_process_meets_is_known_to_all(folder):
    """The shard of process 1 is cut in half: both go back to the checkpoint before."""
    workdir, steps = folder / "damaged", ("train.steps=6", "checkpoint.every=3")
    complete(folder, arguments(folder, workdir, FSDP, *steps), FSDP)
    shard = workdir / "checkpoints" / "6" / "state" / "ocdbt.process_1" / "d"
    largest = max(shard.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with open(folder / "again.txt", "w") as log:
        children = start(folder, arguments(folder, workdir, FSDP, *steps), FSDP, log)
        statuses = [child.wait(timeout=120) for child in children]
    printed = (folder / "again.txt").read_text()
    assert statuses == [0, 0], printed
    assert "the checkpoint of step 6 is damaged (process 1: " in printed
    assert "continuing from step 3" in printed
    assert (workdir / "damaged_checkpoints" / "6").is_dir()
    shutil.rmtree(workdir)
