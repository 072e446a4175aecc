"""Documents: where they come from and which side each falls on."""

import gzip
import hashlib
import json
import lzma

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
    with pytest.raises(UserError, match=r"data.source is 'wiki'; give a known source \(stdlib"):
        sources.read_documents("wiki")


TEXTS = ["first\nline", "second é"]
JSON_LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS)
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


@pytest.mark.parametrize("compression", OPENERS)
@pytest.mark.parametrize(
    ("kind", "content"), [(".txt", "\n\n".join([*TEXTS, ""])), (".jsonl", JSON_LINES)]
)
def test_files_of_every_form_hold_their_documents(tmp_path, kind, content, compression):
    path = tmp_path / f"my.novels{kind}{compression}"
    with OPENERS[compression](path, "wt", encoding="utf-8") as file:
        file.write(content)
    assert sources.read_documents(str(path)) == TEXTS
    assert sources.source_name(str(path)) == "my"


def test_bad_files_are_refused_by_name(tmp_path):
    def refuses(name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            sources.read_documents(str(tmp_path / name))

    refuses("a.csv", b"x", r"a.csv'; give a known source .* \.txt or \.jsonl")
    refuses("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r'Line 2 of .*a.jsonl must be .*"text"')
    refuses("b.jsonl", b"plain\n", r"Line 1 of .*b.jsonl must be .* 'plain")
    refuses("a.txt", b"\xff\xfe", r"a.txt cannot be read: .* UTF-8")
    refuses("b.txt", b"\n \n", r"b.txt holds no documents")
    refuses("a.txt.xz", lzma.compress(b"words " * 9999)[:-20], r"a.txt.xz cannot be read: .* whole")
    refuses("a.txt.gz", b"no archive", r"a.txt.gz cannot be read: ")


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
