"""Several processes as one run: how they find each other, agree, end together, and take turns."""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost as barriers

from lomdm_jax.errors import UserError, one_line

_DAY = 24 * 3600 * 1000  # milliseconds; preparing a corpus may take hours
# Variables of JAX's own detection (jax.distributed.initialize) that tell of several processes.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # Google Kubernetes Engine


def initialise(how: str) -> None:
    """Join the other processes of this run, if there are any; call it before anything uses JAX.

    how: "auto", if the environment tells of several (Slurm, GKE, Open MPI); "on", whatever it
      tells: JAX asks the metadata server of a Cloud TPU slice; "off"; or
      "ADDRESS:PORT,PROCESSES,INDEX", where process 0 listens at that address.

    Raises:
      UserError: `how` is none of these, or the others cannot be found.
    """
    if jax.distributed.is_initialized() or how == "off" or (how == "auto" and not _told()):
        return
    try:
        jax.distributed.initialize(**({} if how in ("auto", "on") else _explicit(how)))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--distributed is {how!r}, but the processes did not find each other: "
            f"{one_line(error)}. Give "
            "ADDRESS:PORT,PROCESSES,INDEX, with the address of process 0, or off for one process."
        ) from error


def _told() -> bool:
    """Whether the environment tells of several processes."""
    environment = os.environ
    slurm = all(name in environment for name in _SLURM) and int(environment["SLURM_NTASKS"]) > 1
    hosts = any("," in environment.get(name, "") for name in _HOSTS)
    return slurm or hosts or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def _explicit(how: str) -> dict[str, Any]:
    address, *numbers = how.split(",")
    host, _, port = address.rpartition(":")
    sound = host and port.isdigit() and len(numbers) == 2 and all(map(str.isdigit, numbers))
    if not sound or not int(numbers[1]) < int(numbers[0]):
        raise UserError(
            f"--distributed is {how!r}: use auto, on, off, or ADDRESS:PORT,PROCESSES,INDEX with an "
            "index below the number of processes, such as 10.0.0.1:1234,2,0."
        )
    count, index = map(int, numbers)
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def check_joined() -> None:
    """Raise UserError where JAX sees other processes that were never joined, or joined none."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"There are {jax.process_count()} processes here, which have not joined: start all of "
            "them with --distributed=on."
        )


def leads() -> bool:
    """Whether this is the process that writes what is written once: process 0."""
    return jax.process_index() == 0


def in_turn(work: Callable[[], Any]) -> Any:
    """What `work` returns: process 0 does it first, then the others, who may find it done."""
    if leads():
        done = work()
    wait_for_all("in_turn")
    return done if leads() else work()


def wait_for_all(why: str) -> None:
    """Return once all processes are here, however long that takes; why: the same on all."""
    barriers.get_barrier_sync_fn()(key=why, timeout_ms=_DAY)


def gather(value: Any) -> list[Any]:
    """The values of all processes, JSON-able, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray([len(data)]), tiled=True)
    padded = np.pad(data, (0, int(max(sizes)) - len(data)))
    rows = multihost_utils.process_allgather(padded[None], tiled=True)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def same(value: Any) -> Any:
    """The value of process 0, on every process."""
    return gather(value)[0]


def agree(facts: dict[str, Any]) -> None:
    """Make sure that all processes hold the same facts, JSON-able values by name.

    Raises:
      UserError: on every process, if they do not; names the first difference, with both values.
    """
    first, *others = gather(facts)
    for index, other in enumerate(others, start=1):
        for key in first:
            if first[key] != other.get(key):
                raise UserError(
                    f"The processes disagree on {key}: process 0 has {first[key]!r}, process "
                    f"{index} has {other.get(key)!r}. Give all of them the same command, data and "
                    "--workdir."
                )


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """A function of the step just dispatched: whether the run was asked (SIGTERM) to end after it.

    With several processes one of them may be asked, and all learn of it and agree on a step;
    they must call the function at every step, from the same one on.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # others may not handle signals
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def abandon(error: BaseException) -> None:
    """End this process at once because of an error, if there are others; returns if it is alone.

    The others wait for this one in some collective, and it must not wait for them in turn: once it
    is gone they notice.
    """
    if jax.process_count() == 1:
        return
    index, kind = jax.process_index(), type(error).__name__
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        print(
            f"error in process {index}: {kind}: {one_line(error)}\nPerhaps another process was "
            "lost. Start all of them again: the same command continues from the last checkpoint.",
            file=sys.stderr,
        )
        if not isinstance(error, jax.errors.JaxRuntimeError):
            traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)
