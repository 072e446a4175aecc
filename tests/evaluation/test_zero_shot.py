"""The zero-shot job on small sets in the form of the hub, with some that cannot be had."""

import csv
import json
import math
import pathlib

import jax
import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

from lomdm_jax.config import default_config, validate  # noqa: E402
from lomdm_jax.data.presets import PRESETS  # noqa: E402
from lomdm_jax.data.tokenizers import make_tokenizer  # noqa: E402
from lomdm_jax.distributed import mesh as meshes  # noqa: E402
from lomdm_jax.errors import UserError  # noqa: E402
from lomdm_jax.evaluation.zero_shot import FIGURES, PREFIX, protocol  # noqa: E402
from lomdm_jax.generator import init_params, make_generator  # noqa: E402
from lomdm_jax.jobs.zero_shot import zero_shot  # noqa: E402
from lomdm_jax.trained import Trained  # noqa: E402

LENGTH = 16
TEXT = "The cat sat on the mat . "
SETS = [name for name in PRESETS if name.startswith(PREFIX)]


def as_hub(folder, column, **splits):
    """A data set of parquet files in the form that the hub has them, by split."""
    folder.mkdir()
    for split, texts in splits.items():
        table = pa.table({"id": list(range(len(texts))), column: texts})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return f"hf:{folder}"


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Each preset reads a local set: as many sentences as the number of its name."""
    for number, name in enumerate(SETS, start=1):
        data = PRESETS[name]["data"]
        split, texts = data["valid_split"], [TEXT.strip()] * (4 + number)
        source = as_hub(tmp_path / name, data["column"], **{split: texts, "other": ["no"] * 9})
        monkeypatch.setitem(data, "valid_source", source)


@pytest.fixture
def model(tmp_path):
    """A model of bytes that has seen nothing."""
    config = default_config()
    config.model.update(width=8, layers=1, heads=2, cond_dim=4)
    config.order.name = "mdm"
    config.data.update(
        tokenizer="bytes", vocab_size=0, length=LENGTH, directory=str(tmp_path / "d")
    )
    config.eval.update(batch_size=8, draws=2)
    tokenizer = make_tokenizer("bytes", 0, lambda: ())
    params = jax.jit(lambda: init_params(config, tokenizer.rows, jax.random.key(0)))()
    generator = make_generator(config, tokenizer.rows, tokenizer.mask_id)
    (tmp_path / "run").mkdir()
    mesh = meshes.make_mesh(data=1)
    return Trained(config, tmp_path / "run", tokenizer, generator, mesh, params)


def run(model):
    with jax.set_mesh(model.mesh):
        return zero_shot(model)


def test_all_sets_are_scored_and_stand_beside_the_papers(sets, model, capsys):
    rows = run(model)
    assert [row.name for row in rows] == SETS == [f"{PREFIX}{name}" for name in FIGURES]
    facts = json.loads((model.workdir / "zero_shot.json").read_text())["sets"]
    with open(model.workdir / "zero_shot.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for number, (row, fact, line) in enumerate(zip(rows, facts, table, strict=True), start=1):
        assert fact["documents"] == 4 + number and fact["tokens"] == LENGTH * fact["blocks"]
        # A fresh model knows nothing: all ids are alike to it.
        assert fact["nelbo_perplexity"] == pytest.approx(model.tokenizer.vocab_size, rel=0.01)
        assert fact["nats"] == pytest.approx(fact["tokens"] * math.log(fact["nelbo_perplexity"]))
        assert fact["sha256"] == row.passport["sha256"] == line["sha256"]
        assert fact["MDLM"] == FIGURES[row.name.removeprefix(PREFIX)]["MDLM"]
        assert fact["protocol"].startswith("no: tokenizer bytes, not gpt2; length 16, not 1024")
    (news,) = (fact for fact in facts if fact["set"] == "zero-shot-ag-news")
    assert news["blocks"] == news["documents"] * len(TEXT.strip()) // (LENGTH - 2)
    assert facts[0]["BD3-LM"] == 96.81 and facts[2]["BD3-LM"] is None and table[2]["BD3-LM"] == ""
    text = (model.workdir / "zero_shot.md").read_text()
    assert text.count("\n") == 2 + len(SETS) and "| 95.26 | 96.81 | 80.40 |" in text
    assert text in capsys.readouterr().out


def test_a_set_that_cannot_be_had_does_not_lose_the_others(sets, model, monkeypatch, tmp_path):
    data = PRESETS["zero-shot-ptb"]["data"]
    monkeypatch.setitem(data, "valid_source", f"hf:{tmp_path / 'gone'}")
    model.config.zero_shot.sets = "zero-shot-ptb, zero-shot-ag-news"
    with pytest.raises(UserError, match="1 of 2 sets could not be had: zero-shot-ptb"):
        run(model)
    ptb, news = json.loads((model.workdir / "zero_shot.json").read_text())["sets"]
    assert "gone" in ptb["failure"] and ptb["MDLM"] == 95.26
    assert news["blocks"] > 0 and "failure" not in news
    text = (model.workdir / "zero_shot.md").read_text()
    assert "| zero-shot-ptb |" in text and "failed: " in text
    monkeypatch.setitem(
        data, "valid_source", as_hub(tmp_path / "back", "sentence", validation=[TEXT] * 9)
    )
    assert [row.failure for row in run(model)] == ["", ""]


def test_what_else_is_asked_is_scored_on_its_validation_text(sets, model, monkeypatch, tmp_path):
    source = as_hub(tmp_path / "wiki", "text", train=["not this"], validation=[TEXT] * 9)
    monkeypatch.setitem(PRESETS["wikitext2"]["data"], "source", source)
    model.config.zero_shot.sets = "wikitext2"
    (row,) = run(model)
    assert row.passport["documents"] == 9 and row.passport["split"] == "validation"
    assert "no paper" in (model.workdir / "zero_shot.md").read_text()
    model.config.zero_shot.sets = "fineweb-edu"
    with pytest.raises(UserError, match="'fineweb-edu', which holds out text of its own"):
        run(model)


def test_a_trained_tokenizer_is_taken_from_the_run(sets, model):
    lines = pathlib.Path(__file__).read_text().splitlines()
    tokenizer = make_tokenizer("sentencepiece-bpe", 400, lambda: lines)
    (model.workdir / "tokenizer").mkdir()
    tokenizer.save(model.workdir / "tokenizer")
    model.config.data.update(tokenizer="sentencepiece-bpe", vocab_size=400)
    model.config.zero_shot.sets = "zero-shot-ag-news"
    config, params = model.config, init_params(model.config, tokenizer.rows, jax.random.key(0))
    generator = make_generator(config, tokenizer.rows, tokenizer.mask_id)
    trained = model._replace(tokenizer=tokenizer, generator=generator, params=params)
    (row,) = run(trained)
    assert row.evaluation.nelbo.perplexity == pytest.approx(400, rel=0.01)
    (model.workdir / "tokenizer" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="made from the training text"):
        run(trained)


def test_the_draws_error_and_a_first_token_that_is_given(sets, model):
    model.config.zero_shot.sets = "zero-shot-ag-news"
    model.config.eval.draw_error = 10.0
    model.config.objective.ignore_first = True
    (row,) = run(model)
    (fact,) = json.loads((model.workdir / "zero_shot.json").read_text())["sets"]
    assert fact["tokens"] == (LENGTH - 1) * fact["blocks"] and fact["draws"] == 4
    assert fact["nelbo_draw_error"] == row.evaluation.nelbo.draw_error >= 0


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, "yes, counted as MDLM: all"),
        ({"objective.ignore_first": True}, "yes, counted as BD3-LM: the first token is given"),
        ({"data.tokenizer": "bytes"}, "no: tokenizer bytes, not gpt2"),
        ({"data.tokenizer": "hf:openai-community/gpt2"}, "yes, counted as MDLM: all"),
        ({"data.length": 128}, "no: length 128, not 1024"),
        ({"data.source": "stdlib"}, "no: trained on stdlib, not OpenWebText"),
        ({"data.mixture": "x=1"}, "no: trained on x=1, not OpenWebText"),
        ({"eval.sequences": 9}, "no: the first 9 blocks, not all"),
    ],
)
def test_where_the_protocol_differs_is_said(changes, found):
    config = default_config()
    for section, values in PRESETS["openwebtext"].items():
        config[section].update(values)
    config.update_from_flattened_dict(changes)
    assert protocol(config) == found


def test_sets_are_checked_before_anything_starts():
    config = default_config()
    assert config.zero_shot.sets.split(",") == SETS and np.size(SETS) == 7
    config.zero_shot.sets = "zero-shot-ptb,zero-shot-nowhere"
    with pytest.raises(UserError, match=r"zero_shot\.sets.*'zero-shot-nowhere' is no preset"):
        validate(config)


def test_a_folder_of_prepared_data_is_not_taken_for_the_set(sets, model, tmp_path):
    """data.directory may name one: then the sets lie beside it."""
    model.config.zero_shot.sets = "zero-shot-ag-news"
    (row,) = run(model)
    (folder,) = (tmp_path / "d").iterdir()
    model.config.data.directory = str(folder)
    model.config.zero_shot.sets = "zero-shot-ptb"
    (other,) = run(model)
    assert other.passport["sha256"] != row.passport["sha256"]
    assert len(list((tmp_path / "d").iterdir())) == 2
