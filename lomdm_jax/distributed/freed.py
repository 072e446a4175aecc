"""What the host does with memory that a step has freed."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# Parameters of glibc's mallopt, and the largest size that it takes, in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Where JAX has CPUs only, the temporaries of a step stay with the process for the next one.

    XLA allocates them as one block. Of more than 32 MiB, glibc would give it back after each step
    and get it anew, cleared page by page: a third of the time of a small network's step. Threads
    share one heap for it, as others hold 64 MiB at most; so it must be said before JAX starts any.
    Does nothing with other C libraries.
    """
    if sys.platform != "linux" or not _has_cpus_only():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in (
            (M_ARENA_MAX, 1),
            (M_MMAP_THRESHOLD, LARGEST),
            (M_TRIM_THRESHOLD, LARGEST),
        ):
            libc.mallopt(parameter, value)


def _has_cpus_only() -> bool:
    """Whether JAX was told so, or nothing is installed for other devices."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
