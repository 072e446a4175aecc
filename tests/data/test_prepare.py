"""A prepared folder is whole or absent, found again, and checked when opened."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lomdm_jax.data import prepare as prepare_module
from lomdm_jax.data import shards
from lomdm_jax.data.packing import make_rules
from lomdm_jax.data.pipeline import valid_batches
from lomdm_jax.data.prepare import open_prepared, prepare
from lomdm_jax.data.sources import is_valid
from lomdm_jax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the shared folder, free to be damaged."""
    return Path(shutil.copytree(prepared.folder, tmp_path / "copy"))


def folders(settings):
    return sorted(path.name for path in Path(settings.directory).iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_blocks_are_the_documents_joined_with_eos(prepared, documents):
    valid = [text for text in documents if is_valid(text, 0.1)]
    stream = []
    for text in valid:
        stream += [*prepared.tokenizer.encode(text), prepared.tokenizer.eos_id]
    blocks = len(stream) // 16
    found = np.concatenate([batch["tokens"] for batch in valid_batches(prepared, 1)])
    assert found.reshape(-1).tolist() == stream[: blocks * 16]
    entry = prepared.split("valid")
    assert (entry["documents"], entry["tokens"]) == (len(valid), len(stream))
    assert (entry["blocks"], entry["dropped"]) == (blocks, len(stream) - blocks * 16)
    assert entry["characters"] == sum(map(len, valid)) and entry["skipped"] == 0
    assert entry["sha256"] == hashlib.sha256(found.astype("<u2").tobytes()).hexdigest()


def test_the_manifest_says_what_was_made(prepared):
    manifest = prepared.manifest
    assert manifest["format"] == 2 and manifest["dtype"] == "<u2"
    assert (manifest["vocab_size"], manifest["length"]) == (512, 16) == (512, prepared.length)
    assert manifest["tokenizer"] == prepared.tokenizer.fingerprint
    assert manifest["settings"]["source"] == "tiny"
    sizes = {p.name: p.stat().st_size for p in prepared.folder.iterdir()}
    del sizes["manifest.json"]
    assert manifest["files"] == sizes
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    assert len(shards) >= 4 and len(sizes) == 1 + len(shards)
    assert all(sizes[name] == size for name, _, size in shards)
    assert (
        sum(blocks for _, blocks, _ in prepared.split("train")["shards"])
        == (prepared.split("train")["blocks"])
    )


def test_a_passport_says_what_was_read(prepared):
    passport = prepared.passport("valid")
    entry = prepared.split("valid")
    assert passport["source"] == "tiny" and passport["split"] == "valid"
    for name in ("documents", "skipped", "tokens", "dropped", "blocks", "sha256"):
        assert passport[name] == entry[name]
    assert passport["tokenizer_sha256"] == prepared.tokenizer.fingerprint


@pytest.mark.parametrize(("rows", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_a_large_vocabulary_is_stored_in_four_bytes(rows, dtype):
    assert prepare_module.record_dtype(SimpleNamespace(rows=rows)) == dtype


def test_preparing_again_does_nothing(settings, capsys):
    first = prepare(settings)
    assert "prepare: valid: " in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = prepare(settings)
    assert capsys.readouterr().out == ""
    assert second.folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times


def test_the_same_settings_give_the_same_files(settings, prepared, small_parts):
    again = prepare(settings)
    assert again.folder.name == prepared.folder.name
    assert contents(again.folder) == contents(prepared.folder)


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


@pytest.mark.parametrize("workers", [2, 7])
def test_the_number_of_workers_does_not_matter(settings, prepared, small_parts, workers):
    settings.workers = workers
    assert contents(prepare(settings).folder) == contents(prepared.folder)


KILLED = """
import os, signal, sys
from lomdm_jax.config import default_config
from lomdm_jax.data import prepare, shards

class Dying(shards.ArrayRecordWriter):
    left = int(sys.argv[1])
    def write(self, record):
        Dying.left -= 1
        if not Dying.left:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(record)

if __name__ == "__main__":
    shards.ArrayRecordWriter, shards.CHUNK, shards.SHARD, shards.FEW = Dying, 10_000, 6_000, 2
    data = default_config().data
    for change in sys.argv[2:]:
        name, _, value = change.partition("=")
        data[name] = type(data[name])(value)
    prepare.prepare(data)
"""


def in_another_process(settings, blocks, program=KILLED):
    """Prepare in another process, which is killed when it writes this block."""
    changes = [f"{n}={value}" for n, value in settings.items() if not isinstance(value, bool)]
    command = [sys.executable, "-c", program, str(blocks), *changes]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def on_file(settings, documents, tmp_path):
    """The tiny corpus as a file, which another process can read."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    settings.source = str(path)
    return settings


def test_a_killed_run_goes_on_at_the_next_file(on_file, small_parts):
    """Killed in the first file, in a later one and in that of the validation split."""
    settings = on_file
    whole = Path(settings.directory) / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(settings, "directory", str(whole))
        expected = prepare(settings)
    train = expected.split("train")["blocks"]
    for blocks in (100, train // 2, train + 10):
        settings.directory = str(whole.with_name(f"killed-{blocks}"))
        assert in_another_process(settings, blocks).returncode == -signal.SIGKILL
        (partial,) = Path(settings.directory).iterdir()
        assert partial.name == f"{expected.folder.name}.partial"
        done = json.loads((partial / "train.progress.json").read_text()) if blocks > 100 else {}
        kept = {name: (partial / name).stat().st_mtime_ns for name, *_ in done.get("shards", [])}
        assert bool(kept) == (blocks > 100)
        again = prepare(settings)
        assert contents(again.folder) == contents(expected.folder)
        assert kept == {name: (again.folder / name).stat().st_mtime_ns for name in kept}
        assert folders(settings) == [expected.folder.name]


def test_a_run_killed_before_the_renaming_goes_on_there(settings, prepared, small_parts):
    """All is written then, and nothing is written again."""
    expected = prepare(settings)
    partial = expected.folder.with_name(f"{expected.folder.name}.partial")
    expected.folder.rename(partial)
    (partial / "train.progress.json").write_text("{}")
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.array_record")}
    again = prepare(settings)
    assert contents(again.folder) == contents(prepared.folder)
    assert times == {name: (again.folder / name).stat().st_mtime_ns for name in times}


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"


def test_a_full_disk_is_named_and_nothing_is_lost(on_file, tmp_path):
    settings = on_file
    limited = KILLED.replace("import os", FULL + "import os", 1)
    result = in_another_process(settings, 0, limited)
    assert "train-00000.array_record cannot be written: " in result.stderr
    assert "Free some space" in result.stderr and "complete files are kept" in result.stderr
    assert prepare(settings).split("train")["blocks"] > 1000


def test_a_worker_that_dies_is_reported(settings, prepared, small_parts, tmp_path, capfd):
    source = prepare_module.sources_of(settings)["train"]
    rules = make_rules(settings, prepared.tokenizer)
    task = shards.Task(tmp_path, "train", source, None, "none", rules, "<u2")  # no tokenizer there
    with pytest.raises(UserError, match=r"A worker that encodes tiny died.* lower data.workers"):
        shards.write_split(task, prepared.tokenizer, workers=2)


def test_a_document_that_cannot_be_encoded_is_named_or_skipped(settings, tmp_path):
    path = tmp_path / "mine.jsonl"
    texts = ["plain words here"] * 20 + ["Not plain"] + ["more plain words"] * 20
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings.source = settings.valid_source = str(path)
    settings.split, settings.valid_split = "[:30]", "[30:]"
    settings.tokenizer, settings.vocab_size = "text8", 0
    with pytest.raises(UserError, match=r"Document 20 \(the first is 0\) of .*mine.jsonl: .*'N'"):
        prepare(settings)
    settings.skip_bad = True
    made = prepare(settings)
    assert [made.split(s)["skipped"] for s in ("train", "valid")] == [1, 0]
    assert [made.split(s)["documents"] for s in ("train", "valid")] == [29, 11]
    assert made.passport("valid")["split"] == "[30:]"


def test_a_failed_run_clears_up(settings):
    settings.length = 10**6
    with pytest.raises(UserError, match=r"too few for one block of data.length 1000000"):
        prepare(settings)
    assert folders(settings) == []


def test_two_at_once_share_what_the_first_makes(settings, monkeypatch):
    """The second waits for the first, and finds its folder."""
    write, waiting = prepare_module._write, []

    def write_while_another_waits(folder, *asked):
        monkeypatch.setattr(prepare_module, "_write", write)
        waiting.append(pool.submit(prepare, settings))
        write(folder, *asked)
        assert not waiting[0].done()

    monkeypatch.setattr(prepare_module, "_write", write_while_another_waits)
    with ThreadPoolExecutor() as pool:
        made = prepare(settings)
    assert waiting[0].result().folder == made.folder
    assert folders(settings) == [made.folder.name]


def test_a_directory_that_is_a_prepared_folder_is_opened(settings, copy):
    settings.directory = str(copy)
    assert prepare(settings).folder == copy
    for name, value, held in (("length", 32, 16), ("vocab_size", 600, 512)):
        asked = settings.copy_and_resolve_references()
        asked[name] = value
        with pytest.raises(UserError, match=f"data.{name} is {value}, .* with {name} {held}"):
            prepare(asked)


@pytest.mark.parametrize(
    "name", ["train-00001.array_record", "valid-00000.array_record", "tokenizer.model"]
)
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
    with pytest.raises(UserError, match="not the one that the blocks were made with"):
        open_prepared(copy)


def test_bad_settings_are_refused(settings, prepared):
    with pytest.raises(UserError, match="no split 'test'; its splits: train, valid"):
        prepared.split("test")
    for name, value in {"length": 0, "detokenizer": "none at all", "source": ""}.items():
        asked = settings.copy_and_resolve_references()
        asked[name] = value
        with pytest.raises(UserError, match=f"data.{name} "):
            prepare(asked)


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
    settings.valid_source, settings.valid_split = "", settings.split
    assert prepare(settings).split("valid")["documents"] < len(flat)  # held out
