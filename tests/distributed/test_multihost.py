"""How processes find each other; tests of real ones are in test_resilience.py."""

import signal

import pytest

from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError

SLURM = dict.fromkeys(("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID"), "0") | {
    "SLURM_STEP_NODELIST": "node[1-2]"
}


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        (SLURM | {"SLURM_NTASKS": "2"}, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # a batch script, not one of srun's tasks
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, True),
    ],
)
def test_the_environment_tells_of_others(monkeypatch, environment, joins):
    for name in (*SLURM, "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(
        multihost.jax.distributed, "initialize", lambda **given: calls.append(given)
    )
    multihost.initialise("auto")
    assert calls == [{}] * joins
    multihost.initialise("off")
    assert len(calls) == joins
    multihost.initialise("10.0.0.1:1234,4,3")
    explicit = {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}
    assert calls[-1] == explicit


def test_processes_that_are_not_found_are_a_users_error(monkeypatch):
    def fail(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody there\nand a long trace")

    monkeypatch.setattr(multihost.jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="did not find each other: DEADLINE_EXCEEDED: nobody there"):
        multihost.initialise("on")


def test_one_process_agrees_with_itself_and_takes_its_turn():
    multihost.agree({"a": 1})
    assert multihost.gather({"a": [1]}) == [{"a": [1]}] and multihost.same(3) == 3
    assert multihost.in_turn(lambda: 7) == 7 and multihost.leads()
    multihost.abandon(ValueError("it is alone"))  # so nothing happens


def test_a_signal_is_heard_and_the_handler_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with multihost.termination() as asked:
        assert not asked(1)
        signal.raise_signal(signal.SIGTERM)
        assert asked(2)
    assert signal.getsignal(signal.SIGTERM) == before
