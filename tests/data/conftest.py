"""One small prepared corpus for all data tests, so that each test is quick."""

from types import SimpleNamespace

import pytest

from lomdm_jax.data import sources
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
    """Shared: read it, never change its files."""
    return prepare(tiny_settings(tmp_path_factory.mktemp("shared")))


def tiny_settings(directory):
    return SimpleNamespace(
        source="tiny",
        valid_source="",
        tokenizer="sentencepiece-bpe",
        vocab_size=512,
        length=16,
        valid_share=0.1,
        directory=str(directory),
    )
