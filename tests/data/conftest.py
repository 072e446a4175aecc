"""One small prepared corpus for all data tests, so that each test is quick."""

from pathlib import Path

import pytest

from lomdm_jax.config import default_config
from lomdm_jax.data import shards, sources
from lomdm_jax.data.prepare import prepare


@pytest.fixture(scope="session")
def library():
    """Every document of the stdlib source; read once, for it takes seconds."""
    return sources.stdlib_docstrings()


@pytest.fixture(scope="session")
def documents(library):
    return library[:400]


@pytest.fixture(scope="session", autouse=True)
def tiny_source(documents):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "tiny", lambda: list(documents))
        yield


@pytest.fixture
def settings(tmp_path):
    """Settings of the tiny corpus in a directory of the test's own."""
    return tiny_settings(tmp_path)


@pytest.fixture(scope="session")
def prepared(tiny_source, tmp_path_factory):
    """Shared: read it, never change its files. It has several files to a split."""
    with pytest.MonkeyPatch.context() as patch:
        in_small_parts(patch)
        return prepare(tiny_settings(tmp_path_factory.mktemp("shared")))


def in_small_parts(patch):
    """Have even a tiny corpus encoded in several chunks and written to several files."""
    for name, value in {"CHUNK": 10_000, "SHARD": 6_000, "FEW": 2}.items():
        patch.setattr(shards, name, value)


@pytest.fixture
def small_parts(monkeypatch):
    in_small_parts(monkeypatch)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real vocabularies and texts, beside the project; not part of it."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data are not on this machine: no folder {folder}")
    return folder


def tiny_settings(directory):
    data = default_config().data
    data.update(source="tiny", vocab_size=512, length=16, valid_share=0.1, workers=1)
    data.directory = str(directory)
    return data
