"""Settings that must be made before JAX starts, and that subprocesses of tests inherit."""

import importlib.metadata
import os
import shutil
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight simulated devices, so that meshes can be tested on a CPU. Most of a test's time is the
# compiler's: it need not optimise, and what one test compiled another may use.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know it
    # Takes half the time: otherwise every fusion is compiled in an MLIR context of its own.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have that of the process that started them
    _cache = tempfile.TemporaryDirectory(prefix="lomdm_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["HF_HOME"] = _cache.name  # nothing of the user's is read or written
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is asked of a network


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window. Playwright keeps an event loop running, beside which neither
    another of its own nor orbax would start: so it ends with the module."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"needs Chromium: {error}".splitlines()[0])
        yield chromium
        chromium.close()
