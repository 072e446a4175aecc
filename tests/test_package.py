"""The package: what its wheel holds, and a copy installed from that, used from elsewhere."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lomdm_jax

pytest.importorskip("setuptools", minversion="77.0.3", reason="builds with setuptools 77.0.3")
ROOT = Path(__file__).parent.parent
TREE = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "lomdm_jax").rglob("*")
    if path.is_file() and path.parent.name != "__pycache__"
}


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the clone, in which a build leaves folders, and without a network."""
    clone, folder = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("wheel")
    for name in ("lomdm_jax", "configs", "tests", "benchmarks", "launch", "requirements"):
        ignored = shutil.ignore_patterns("__pycache__", "*.png")
        shutil.copytree(ROOT / name, clone / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, clone)
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(folder), str(clone))
    (found,) = folder.glob("lomdm_jax-*-none-any.whl")
    return found


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(file.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        entries = [n for n in file.namelist() if n.endswith(("entry_points.txt", "LICENSE"))]
    assert names == TREE and len(entries) == 2
    assert {Path(name).suffix for name in names} >= {".py", ".html"}


def test_the_metadata_are_those_of_the_files(metadata):
    """Every requirement of the files, whatever is said beside it."""
    assert metadata["Version"] == lomdm_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    files = {"": "requirements.txt", "dev": "tests/requirements.txt"}
    files |= {extra: f"requirements/{extra}.txt" for extra in ("tpu", "cuda", "torch")}
    assert {*metadata.get_all("Provides-Extra")} == {*files} - {""}
    for extra, file in files.items():
        lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
        assert sorted(required(metadata, extra)) == sorted(map(canonical, filter(None, lines)))


def required(metadata, extra):
    """The requirements of an extra, "" for none, as the file has them."""
    for line in metadata.get_all("Requires-Dist"):
        requirement, _, marker = line.partition(";")
        of_extra = f'extra == "{extra}"' if extra else "extra =="
        if (of_extra in marker) == bool(extra):
            marker = marker.replace(f'and extra == "{extra}"', "").replace(of_extra, "")
            yield canonical(f"{requirement};{marker}" if marker.strip() else requirement)


def canonical(requirement):
    from packaging.requirements import Requirement

    return str(Requirement(requirement))


INSTALLED = """
import importlib.metadata, pathlib, sys
import lomdm_jax
folder = pathlib.Path(sys.argv[1])
assert pathlib.Path(lomdm_jax.__file__).is_relative_to(folder), lomdm_jax.__file__
assert "jax" not in sys.modules
assert importlib.metadata.version("lomdm_jax") == lomdm_jax.__version__
(command,) = importlib.metadata.distribution("lomdm_jax").entry_points
assert command.name == "lomdm_jax" and command.load()(["--help"]) == 0
import numpy as np
from lomdm_jax.evaluation.order_report import SampleTrace, write_order_report
trace = SampleTrace(["a", "b"], np.array([2, 1]))
page, _ = write_order_report(".", [trace], np.array([[1, 0]]), title="title", notes={})
assert "<html" in page.read_text()
try:
    import fastapi
except ImportError:
    sys.exit()
from lomdm_jax.config import default_config
from lomdm_jax.serving.app import make_app
from lomdm_jax.serving.device import Device
device = Device(1)
assert make_app(None, default_config().serve, device).routes
device.close()
"""


def test_an_installed_copy_works_from_elsewhere(wheel, tmp_path):
    """It finds its pages, and its command says how it is used."""
    pip("install", "--no-index", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", INSTALLED, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "--workdir" in done.stdout
