"""A training step that does not fit in memory: by how much, and what in the config to change."""

import re
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lomdm_jax.config import validate
from lomdm_jax.distributed import partition
from lomdm_jax.distributed.chips import GIB
from lomdm_jax.errors import UserError, one_line
from lomdm_jax.models.transformer import REMAT


def compile_to_fit(
    lowered: jax.stages.Lowered, config: ConfigDict, mesh: Mesh, state: Any, shardings: Any
) -> jax.stages.Compiled:
    """lowered.compile(), with a lack of memory told in terms of the config. Others than TPU
    compilers do not look at how much there is: there `Report.fits` tells.

    state: the TrainState, arrays or shapes. shardings: of it, see `partition.shardings`.

    Raises:
      UserError: it does not fit.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        held = partition.held(state, shardings)
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
    return UserError(advice(config, devices, state, f"The training step does not fit: {said}."))


def lack_of_memory(error: Exception) -> str | None:
    """How much of how much a program would take, from the compiler's error, or its first line; None
    if it is not of a lack of memory."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    amounts = next(filter(None, (re.search(each, message) for each in _AMOUNTS)), None)
    return f"{amounts[1]} of {amounts[2]}" if amounts else one_line(error)


def advice(config: ConfigDict, devices: int, state: int, problem: str) -> str:
    """The problem, and what in `config` to change. state: see `does_not_fit`."""
    remedies = "\n  ".join(_remedies(config, devices, state))
    return f"{problem} In order of what they cost, these help:\n  {remedies}"


def _remedies(config: ConfigDict, devices: int, state: int) -> list[str]:
    """Changes of the config that save memory and are not made yet, cheapest first."""
    splits = devices // (config.mesh.tensor * config.mesh.sequence)
    parts = _more_micro_batches(config, splits)
    found = []
    if parts:
        others = f" (or {', '.join(map(str, parts[1:4]))})" if parts[1:] else ""
        found.append(f"--config.train.micro_batches={parts[0]}{others}: fewer sequences at a time")
    elif remedy := _more_sequence(config, splits):
        found.append(remedy)
    levels = tuple(REMAT)
    for level in levels[levels.index(config.model.remat) + 1 :]:
        found.append(f"--config.model.remat={level}: fewer activations kept, more recomputed")
    if remedy := _more_fsdp(config, splits, state):
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


def _more_sequence(config: ConfigDict, splits: int) -> str | None:
    """The advice to share each sequence, where a device has one at a time; None if nothing does."""
    mesh, left = config.mesh, config.model.heads // config.mesh.tensor
    factors = range(2, splits // mesh.fsdp + 1)
    for factor in (n for n in factors if splits // mesh.fsdp % n == 0):
        size, parts = mesh.sequence * factor, config.train.micro_batches * factor
        if left % size == 0 and config.data.length % size == 0 and _valid(config, parts):
            return (
                f"--config.mesh.sequence={size} --config.mesh.data=-1 "
                f"--config.train.micro_batches={parts}: {factor} times the devices for a sequence"
            )
    return None


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
