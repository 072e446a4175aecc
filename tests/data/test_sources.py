"""Documents: where they come from and which side each falls on."""

import hashlib

import pytest

from lomdm_jax.data import sources
from lomdm_jax.errors import UserError


def test_stdlib_docstrings_are_many_long_enough_and_distinct(library):
    assert len(library) > 4000
    assert min(map(len, library)) > 40
    assert len(set(library)) == len(library)
    assert any(text.startswith("JSON (JavaScript Object Notation)") for text in library)
    assert library == sources.read_documents("stdlib")


def test_only_the_library_itself_is_walked(tmp_path, monkeypatch):
    def write(path, text):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'def f():\n    """{text}"""\n')

    write(tmp_path / "kept.py", "kept " * 20)
    write(tmp_path / "test" / "a.py", "skipped " * 20)
    write(tmp_path / "site-packages" / "b.py", "skipped " * 20)
    write(tmp_path / "twin.py", "kept " * 20)
    write(tmp_path / "short.py", "x" * 40)
    write(tmp_path / "surrogate.py", "\\ud800" + "x" * 60)
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sources, "_FEWEST_DOCSTRINGS", 1)
    assert sources.stdlib_docstrings() == ["kept " * 20]


def test_a_library_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"found only 0 docstrings under .* no .py sources"):
        sources.stdlib_docstrings()


def test_an_unknown_source_lists_the_known_ones():
    with pytest.raises(UserError, match=r"data.source is 'wiki'; known sources: stdlib"):
        sources.read_documents("wiki")


def test_split_is_disjoint_complete_and_about_the_asked_share(library):
    train, valid = sources.split_documents(library, 0.05)
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(library)
    assert 0.03 < len(valid) / len(library) < 0.07


def test_the_side_is_read_off_the_sha256_of_the_text(library):
    def is_valid(text):
        return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256 < 0.05

    _, valid = sources.split_documents(library, 0.05)
    assert valid == list(filter(is_valid, library))


def test_a_document_keeps_its_side_whatever_the_others(library):
    _, valid = sources.split_documents(library, 0.05)
    fewer = library[::-3]
    _, valid_of_fewer = sources.split_documents(fewer, 0.05)
    assert valid_of_fewer == [text for text in fewer if text in set(valid)]
    _, more = sources.split_documents(library, 0.2)
    assert set(valid) < set(more)  # a larger share only adds


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match=r"data.valid_share is"):
        sources.split_documents(["a", "b"], share)
