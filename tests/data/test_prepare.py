"""A prepared folder is whole or absent, found again, and checked when opened."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lomdm_jax.data import prepare as prepare_module
from lomdm_jax.data.pipeline import valid_batches
from lomdm_jax.data.prepare import open_prepared, prepare
from lomdm_jax.data.sources import split_documents
from lomdm_jax.errors import UserError


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the shared folder, free to be damaged."""
    return Path(shutil.copytree(prepared.folder, tmp_path / "copy"))


def folders(settings):
    return sorted(path.name for path in Path(settings.directory).iterdir())


def test_blocks_are_the_documents_joined_with_eos(prepared, documents):
    _, valid = split_documents(documents, 0.1)
    stream = []
    for text in valid:
        stream += [*prepared.tokenizer.encode(text), prepared.tokenizer.eos_id]
    blocks = len(stream) // 16
    found = np.concatenate([batch["tokens"] for batch in valid_batches(prepared, 1)])
    assert found.reshape(-1).tolist() == stream[: blocks * 16]
    entry = prepared.manifest["splits"]["valid"]
    assert (entry["documents"], entry["tokens"]) == (len(valid), len(stream))
    assert entry["blocks"] == blocks
    assert entry["sha256"] == hashlib.sha256(found.astype("<u2").tobytes()).hexdigest()


def test_the_manifest_says_what_was_made(prepared):
    manifest = prepared.manifest
    assert manifest["format"] == 1 and manifest["dtype"] == "<u2"
    assert (manifest["vocab_size"], manifest["length"]) == (512, 16) == (512, prepared.length)
    assert manifest["tokenizer"] == prepared.tokenizer.fingerprint
    assert manifest["settings"]["source"] == "tiny"
    sizes = {p.name: p.stat().st_size for p in prepared.folder.iterdir()}
    del sizes["manifest.json"]
    assert manifest["files"] == sizes and len(sizes) == 3


def test_a_large_vocabulary_is_stored_in_four_bytes():
    assert prepare_module._record_dtype(65_535) == "<u2"
    assert prepare_module._record_dtype(65_536) == "<u4"


def test_preparing_again_does_nothing(settings, capsys):
    first = prepare(settings)
    assert "training and" in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = prepare(settings)
    assert capsys.readouterr().out == ""
    assert second.folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times


def test_the_same_settings_give_the_same_files(settings, prepared):
    again = prepare(settings)
    assert again.manifest == prepared.manifest
    assert again.folder.name == prepared.folder.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("length", 8),
        ("vocab_size", 500),
        ("valid_share", 0.2),
        ("tokenizer", "sentencepiece-unigram"),
    ],
)
def test_other_settings_go_to_another_folder(settings, name, value):
    first = prepare(settings)
    setattr(settings, name, value)
    second = prepare(settings)
    assert folders(settings) == sorted({first.folder.name, second.folder.name})
    assert len(folders(settings)) == 2


def test_the_stdlib_corpus_depends_on_the_python_version(settings, monkeypatch):
    settings.source = "stdlib"
    here = prepare_module._settings(settings)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    elsewhere = prepare_module._settings(settings)
    assert prepare_module._fingerprint(here) != prepare_module._fingerprint(elsewhere)


@pytest.mark.parametrize("records_before_the_end", [0, 700])
def test_an_interrupted_run_leaves_nothing_to_be_taken_as_whole(
    settings, prepared, monkeypatch, records_before_the_end
):
    class Dying(prepare_module.ArrayRecordWriter):
        left = records_before_the_end

        def write(self, record):
            if not Dying.left:
                raise KeyboardInterrupt
            Dying.left -= 1
            super().write(record)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "ArrayRecordWriter", Dying)
        patch.setattr(prepare_module.shutil, "rmtree", lambda *_, **__: None)  # as a kill would
        with pytest.raises(KeyboardInterrupt):
            prepare(settings)
    (left,) = folders(settings)
    assert left.startswith(f"{prepared.folder.name}.partial-")
    assert prepare(settings).manifest == prepared.manifest
    assert folders(settings) == [prepared.folder.name, left]


def test_a_failed_run_clears_up(settings):
    settings.length = 10**6
    with pytest.raises(UserError, match=r"too few for one block of data.length 1000000"):
        prepare(settings)
    assert folders(settings) == []


def test_two_at_once_share_the_first_folder_made(settings, monkeypatch):
    write = prepare_module._write

    def write_while_another_finishes(folder, *asked):
        write(folder, *asked)
        monkeypatch.setattr(prepare_module, "_write", write)
        prepare(settings)

    monkeypatch.setattr(prepare_module, "_write", write_while_another_finishes)
    made = prepare(settings)
    assert folders(settings) == [made.folder.name]


def test_a_directory_that_is_a_prepared_folder_is_opened(settings, copy):
    settings.directory = str(copy)
    assert prepare(settings).folder == copy
    for name, value, held in (("length", 32, 16), ("vocab_size", 600, 512)):
        asked = type(settings)(**{**vars(settings), name: value})
        with pytest.raises(UserError, match=f"data.{name} is {value}, .* with {name} {held}"):
            prepare(asked)


@pytest.mark.parametrize("name", ["train.array_record", "valid.array_record", "tokenizer.model"])
def test_a_missing_cut_or_emptied_file_is_named(copy, name):
    whole = (copy / name).read_bytes()
    for content in (whole[:-1], b""):
        (copy / name).write_bytes(content)
        said = f"{name} has {len(content)} bytes where {len(whole)} are expected. Delete"
        with pytest.raises(UserError, match=said):
            open_prepared(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing; .* {len(whole)} bytes. Delete"):
        open_prepared(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 0}', None])
def test_a_bad_manifest_is_named(copy, content):
    path = copy / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is .* Delete the folder"):
        open_prepared(copy)


def test_another_tokenizer_of_the_same_size_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not the tokenizer the blocks were made with"):
        open_prepared(copy)


def test_bad_settings_are_refused(settings, prepared):
    settings.length = 0
    with pytest.raises(UserError, match=r"data.length is 0"):
        prepare(settings)
    with pytest.raises(UserError, match="no split 'test'; its splits: train, valid"):
        prepared.split_path("test")


def test_a_file_counts_by_its_content_and_validates_on_another(settings, documents, tmp_path):
    def write(name, texts):
        path = tmp_path / name
        path.write_text("\n\n".join(texts))
        return str(path)

    flat = [" ".join(text.split()) for text in documents]
    settings.source = write("mine.txt", flat[20:])
    settings.valid_source = write("held.txt", flat[:20])
    first = prepare(settings)
    assert first.folder.name.startswith("mine-")
    assert first.manifest["splits"]["valid"]["documents"] == 20
    assert first.manifest["splits"]["train"]["documents"] == len(flat) - 20
    (tmp_path / "moved").mkdir()
    settings.source = write("moved/mine.txt", flat[20:])
    assert prepare(settings).folder == first.folder
    settings.source = write("mine.txt", flat[19:])
    assert prepare(settings).folder != first.folder
    settings.valid_source = settings.source
    with pytest.raises(UserError, match=r"data.valid_source .* holds the very text"):
        prepare(settings)
