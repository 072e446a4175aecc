"""Exports that come back as runs: the same bytes again, all jobs, and every damage by its name."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from lomdm_jax.main import main
from lomdm_jax.trained import load
from lomdm_jax.training.checkpoint import Checkpoints, by_name
from tests.interop.test_exporting import (
    byte_level,
    config_of,
    content,
    evaluation_of,
    exported,
    make_run,
    refused,
    tokenizer_of,
)

KERNEL = "backbone.blocks.0.attn_qkv.weight"


def command(source, workdir, *changes):
    options = [f"--config.{change}" for change in (f"import.source={source}", *changes)]
    return ["--job", "import", "--workdir", str(workdir), *options]


def imported(source, workdir, *changes):
    assert main(command(source, workdir, *changes)) == 0
    return workdir


# The way back


@pytest.mark.parametrize(
    ("order", "tokenizer", "evaluated"),
    [
        ("lomdm", "hf", True),
        ("mdm", "bytes", False),
        ("block:4", "text8", True),
        ("lomdm-ranked", "sentencepiece-bpe", False),
        ("genmd4", "characters", False),
    ],
)
def test_an_export_of_an_import_of_an_export_is_the_same_bytes(
    order, tokenizer, evaluated, tmp_path
):
    """Every file; also after the run's config said another checkpoint and an infinity."""
    config = config_of(order, tokenizer)
    config.checkpoint.restore, config.sample.dependence = "best", float("inf")
    config.data.source = str(tmp_path / "gone.txt")
    evaluation = evaluation_of() if evaluated else None
    run = make_run(tmp_path / "run", config, tokenizer_of(tokenizer), evaluation=evaluation)
    first = content(exported(run, "--config.checkpoint.restore=latest"))
    again = imported(run / "export", tmp_path / "again")
    assert content(exported(again)) == first
    assert ("evaluation.json" in first) == evaluated


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = config_of("lomdm", "hf")
    folder = tmp_path_factory.mktemp("runs") / "run"
    return make_run(folder, config, byte_level(), steps=(7,), evaluation=evaluation_of())


@pytest.fixture(scope="module")
def export(run):
    return exported(run)


@pytest.fixture(scope="module")
def again(export, tmp_path_factory):
    return imported(export, tmp_path_factory.mktemp("runs") / "again")


def test_a_run_that_was_imported_is_the_run(run, again):
    """Config, tokenizer, evaluation, step, facts and average; parameters are the average."""
    config = json.loads((run / "config.json").read_text())
    assert json.loads((again / "config.json").read_text()) == config
    assert content(again / "tokenizer") == content(run / "tokenizer")
    assert (again / "evaluation.json").read_bytes() == (run / "evaluation.json").read_bytes()
    ours, theirs = (Checkpoints(f / "checkpoints", 1, create=False) for f in (run, again))
    assert theirs.steps() == [7] and theirs.find("best") == 7
    assert theirs.facts(7) == ours.facts(7) | {"imported": "export"}
    params = [by_name(load(folder).params) for folder in (run, again)]
    for name, a in params[0].items():
        np.testing.assert_array_equal(params[1][name], a)
    assert sorted(path.name for path in again.parent.iterdir()) == ["again"], "nothing beside"


@pytest.mark.parametrize("job", ["sample", "score"])
def test_an_imported_run_works(again, job, capsys):
    options = ["--config.sample.count=2", "--config.score.text=order", "--config.score.orders=2"]
    assert main(["--workdir", str(again), "--job", job, *options]) == 0
    assert "EMA at step 7" in capsys.readouterr().out


def test_an_imported_run_is_evaluated_and_not_trained_on(again, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Text {i} to be scored." for i in range(40)))
    shutil.copytree(again, tmp_path / "run")
    byte_level().save(tmp_path)
    data = [f"data.source={tmp_path / 'text.txt'}", f"data.directory={tmp_path / 'data'}"]
    data += [f"data.tokenizer=hf:{tmp_path}", "eval.sequences=8", "eval.batch_size=8"]
    options = ["--workdir", str(tmp_path / "run"), *(f"--config.{each}" for each in data)]
    assert main([*options, "--job", "evaluate", "--config.eval.draws=1"]) == 0
    capsys.readouterr()
    message = refused([*options, "--job", "train", "--config.train.batch_size=8"], capsys)
    assert "imported from export" in message and "config.train.start_from" in message


# Damage


@pytest.fixture
def damaged(export, tmp_path, capsys):
    """A copy of the export, and what is said when it is imported: nothing is then left of a run."""
    copy = tmp_path / "export"
    shutil.copytree(export, copy)

    def message():
        found = refused(command(copy, tmp_path / "new"), capsys)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]
        return found

    return copy, message


def rewrite(folder, change):
    """The weights after a change of the tensors by name."""
    file = folder / "model.safetensors"
    found = safetensors.numpy.load_file(file)
    change(found)
    safetensors.numpy.save_file(found, file, metadata={"format": "pt"})


def rename(found):
    found["backbone.blocks.0.attn_qkv.kernel"] = found.pop(KERNEL)


def test_a_changed_tensor_is_named(damaged):
    folder, message = damaged
    file, original = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    changes = {
        "has no tensor " + KERNEL: lambda found: found.pop(KERNEL),
        "but backbone.blocks.0.attn_qkv.kernel, which it has not": rename,
        "has a tensor extra (2,)": lambda found: found.update(extra=np.zeros(2, np.float32)),
        f"{KERNEL} has the shape (16, 48)": lambda found: found.update({KERNEL: found[KERNEL].T}),
        f"{KERNEL} is of type float16": lambda found: found.update(
            {KERNEL: found[KERNEL].astype(np.float16)}
        ),
    }
    for words, change in changes.items():
        file.write_bytes(original)
        rewrite(folder, lambda found, change=change: change(found))
        assert words in message()


@pytest.mark.parametrize("kept", [0, 7, 100, -3])
def test_a_file_that_was_cut_short_is_named(damaged, kept):
    folder, message = damaged
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors cannot be read" in message()


def test_a_missing_file_is_named(damaged):
    folder, message = damaged
    for name in ("model.safetensors", "config.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert f"{name} cannot be read" in message()
        (folder / name).write_bytes(content)
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer" in message()


def test_a_changed_config_is_named(damaged):
    folder, message = damaged
    file = folder / "config.json"
    known = json.loads(file.read_text())

    def say(change):
        other = json.loads(json.dumps(known))
        change(other)
        file.write_text(json.dumps(other))
        return message()

    assert "has width = 32, but the run in its part lomdm_jax has 16" in say(
        lambda c: c.update(width=32)
    )
    assert "model_type = 'bert'" in say(lambda c: c.update(model_type="bert"))
    for key in ("lomdm_jax", "order"):
        assert "config.json" in say(lambda c, key=key: c.pop(key))
    assert "no longer what --job export wrote" in say(lambda c: c["lomdm_jax"].pop("facts"))
    assert "model.widht" in say(lambda c: c["lomdm_jax"]["config"]["model"].update(widht=3))
    assert "config.model.heads" in say(lambda c: c["lomdm_jax"]["config"]["model"].update(heads=0))
    file.write_text("{")
    assert "config.json cannot be read" in message()
    file.write_text("[]")
    assert "holds no JSON object" in message()


def test_another_tokenizer_is_refused(damaged):
    folder, message = damaged
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(
        text.replace('"byte_fallback":false', '"byte_fallback":true')
    )
    assert "is not the one that the model was trained with" in message()


def test_weights_that_were_trained_on_in_pytorch_come_back(damaged, tmp_path):
    """save_pretrained rewrites config.json and leaves ours in it."""
    folder, _ = damaged
    rewrite(folder, lambda found: found.update({KERNEL: found[KERNEL] + 1}))
    known = json.loads((folder / "config.json").read_text())
    known |= {"transformers_version": "5", "architectures": ["Mine"]}
    del known["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(known))
    run = imported(folder, tmp_path / "new")
    kernel = by_name(load(run).params)["backbone/blocks/0/attn_qkv/kernel"]
    expected = safetensors.numpy.load_file(folder / "model.safetensors")[KERNEL].T
    np.testing.assert_array_equal(kernel, expected)


# What is asked for


def test_what_cannot_be_imported_is_said(export, run, tmp_path, capsys):
    assert "config.import.source is empty" in refused(
        ["--job", "import", "--workdir", str(tmp_path / "new")], capsys
    )
    assert "no such file" in refused(command(tmp_path / "none", tmp_path / "new"), capsys)
    assert "--workdir is missing" in refused(
        ["--job", "import", f"--config.import.source={export}"], capsys
    )
    message = refused(command(export, run), capsys)
    assert "--workdir" in message and "not empty" in message
    for change, words in {
        "import.weights=best": "must be one of ema, raw",
        "import.order=lomdm": 'must be "mdm", "block:SIZE"',
        "import.length=-1": "must not be negative",
    }.items():
        message = refused(command(export, tmp_path / "new", change), capsys)
        assert f"config.{change.split('=')[0]} is" in message and words in message
