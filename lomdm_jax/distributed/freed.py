"""What the host does with memory that a step has freed."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# Parameters of glibc's mallopt, and the largest size that it takes, in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Where JAX has CPUs only, the temporaries of a step stay with the process for the next one.

    XLA allocates them as one block. Of more than 32 MiB, glibc would give it back after each step
    and get it anew, cleared page by page: a third of the time of a small network's step. Heaps of
    threads other than the main one hold 64 MiB at most, so larger blocks may go on as before. (One
    heap for all threads mends that, and makes steps 1.7 times as long.) Does nothing with other C
    libraries.
    """
    if sys.platform != "linux" or not _has_cpus_only():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST)


def _has_cpus_only() -> bool:
    """Whether JAX was told so, or nothing is installed for other devices."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
