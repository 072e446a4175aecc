"""What is freed stays with the process: counted in pages that the system had to clear."""

import subprocess
import sys

import pytest

from lomdm_jax.distributed import freed

# The fewest pages that a call of a program with 48 MiB of temporaries takes from the system: which
# thread asks for them varies, and not all have as much room.
PAGES = """
import resource
from lomdm_jax.distributed.freed import keep_freed_memory

if {keep}:
    keep_freed_memory()
import jax, jax.numpy as jnp

a = jnp.ones((2048, 64))
program = jax.jit(lambda a: a @ (jnp.sin(a @ a.T) @ jnp.cos(a @ a.T)).T[:64])
taken = []
for call in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(a).block_until_ready()
    taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(taken))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another allocator")
def test_temporaries_of_a_step_are_not_taken_anew_from_the_system():
    pages = [
        int(subprocess.check_output([sys.executable, "-c", PAGES.format(keep=keep)]))
        for keep in (True, False)
    ]
    assert pages[0] < 1000 and pages[1] > 5000


@pytest.mark.parametrize("installed", ["a plugin", "libtpu", "chosen"])
def test_other_devices_are_left_alone(installed, monkeypatch):
    monkeypatch.setattr(freed.ctypes, "CDLL", None)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu" if installed == "chosen" else "")
    plugins = ["cuda"] if installed == "a plugin" else []
    monkeypatch.setattr(freed.importlib.metadata, "entry_points", lambda group: plugins)
    found = True if installed == "libtpu" else None
    monkeypatch.setattr(freed.importlib.util, "find_spec", lambda name: found)
    freed.keep_freed_memory()
