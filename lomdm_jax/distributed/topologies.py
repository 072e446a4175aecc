"""Devices that are not here, to compile for: the compilers of TPU and GPU programs need none."""

import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies as jax_topologies

from lomdm_jax.distributed.gpus import GPUS, target
from lomdm_jax.errors import UserError, one_line

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
    return list(jax_topologies.get_topology_desc(name, "cuda", **described).devices)


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
        return list(jax_topologies.get_topology_desc(name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise  # nothing is wrong with the name
        raise _no_slice(name, one_line(error)) from error


def _no_slice(name: str, reason: str) -> UserError:
    return UserError(
        f"{name!r} is nothing that can be compiled for ({reason}): use GENERATION:SHAPE, such as "
        f"{EXAMPLES}; TPU slices above one chip are usually made of 2x2 chips."
    )
