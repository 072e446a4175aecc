"""Real models behind the server: what is streamed is what the sampler draws."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from lomdm_jax.config import default_config
from lomdm_jax.data.symbols import ByteTokenizer
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.errors import UserError
from lomdm_jax.generation import generate
from lomdm_jax.generator import init_params, make_generator
from lomdm_jax.jobs.serve import serve as serve_job
from lomdm_jax.trained import Trained
from tests.networks import noisy

pytest.importorskip("fastapi", reason="the page needs FastAPI: pip install fastapi uvicorn")

LENGTH = 12


def config_of(order, **changes):
    config = default_config()
    config.order.name = order
    config.objective.name = "order"
    config.data.length = LENGTH
    config.data.tokenizer, config.data.vocab_size = "bytes", 0
    sizes = {"width": 16, "layers": 1, "heads": 2, "cond_dim": 8, "dropout": 0.0}
    config.model.update(sizes)
    config.train.batch_size, config.train.random_steps = 16, 0
    for key, value in changes.items():
        section, name = key.split("_", 1)
        config[section][name] = value
    return config


def trained(folder, config):
    """A model that has learned nothing yet."""
    tokenizer, mesh = ByteTokenizer(), meshes.make_mesh(**config.mesh)
    generator = make_generator(config, tokenizer.rows, tokenizer.mask_id)
    shapes = jax.eval_shape(lambda: init_params(config, tokenizer.rows, jax.random.key(0)))
    params = jax.device_put(noisy(shapes, 0.3), meshes.replicated(mesh))
    return Trained(config, pathlib.Path(folder), tokenizer, generator, mesh, params)


@pytest.fixture(scope="module")
def models():
    """One on one device, one on eight."""
    from lomdm_jax.serving.models import Models

    ranked = {"model_layout": "ranked", "sample_top_k": 7, "mesh_data": -1}
    runs = {"learned": config_of("lomdm", mesh_data=1), "ranked": config_of("ar", **ranked)}
    found = {name: trained(f"runs/{name}", config) for name, config in runs.items()}
    return Models([*found.values()]), found


def asked(**values):
    from lomdm_jax.serving.protocol import Request

    return Request.model_validate(values)


CASES = {
    "race": {"prompt": "ab[[2]]c", "seed": 3, "count": 2},
    "several": {"sampler": "confidence", "reveal": 3, "temperature": 0.5, "suffix": "z"},
    "steps": {"sampler": "ancestral", "steps": 5, "top_k": 9},
    "again": {"sampler": "ancestral", "steps": 30, "grid": "linear", "remask": 0.9, "count": 3},
    "ranked": {"run": "ranked", "prompt": "ab[[2]]c", "reveal": 2, "given": "text"},
}


@pytest.mark.parametrize("name", CASES)
def test_the_changes_add_up_to_the_trace(models, name):
    backend, by_name = models
    request = asked(**({"seed": 11} | CASES[name]))
    first, *reveals, end = backend.stream(request)
    trace = json.loads(json.dumps(end["trace"], allow_nan=False))
    assert len(reveals) > 2, "tokens come one after another"
    shown = [[*first["given"]] for _ in range(request.count)]
    last = {}
    for event in reveals:
        for row, position, piece, *numbers in event["changes"]:
            shown[row][position] = piece
            last[row, position] = numbers
    for row, sample in enumerate(trace["samples"]):
        assert shown[row] == sample["pieces"] and sample["length"] == LENGTH
        for position, revealed in enumerate(sample["revealed"]):
            numbers = [revealed, sample["share"][position], sample["log_p"][position]]
            assert last.get((row, position), numbers) == numbers
            assert ((row, position) in last) == (first["given"][position] is None)
    if name in ("race", "ranked"):
        is_what_the_sampler_draws(by_name[trace["run"]], trace)


def is_what_the_sampler_draws(model, trace):
    """Whatever other rows the devices are filled up with."""
    settings = default_config().sample
    settings.update({k: v for k, v in trace["settings"].items() if v is not None})
    settings.batch_size = settings.count = 8  # a multiple of the devices; draws are by row
    found = generate(model, settings)
    for row, sample in enumerate(trace["samples"]):
        assert sample["text"] == found.texts[row]
        assert sample["tokens"] == found.samples.tokens_BT[row].tolist()
        assert sample["revealed"] == found.samples.revealed_BT[row].tolist()
        np.testing.assert_allclose(sample["share"], found.samples.share_BT[row], rtol=1e-4)
        np.testing.assert_allclose(sample["log_p"], found.samples.log_p_BT[row], rtol=1e-3)
        assert sample["calls"] == found.samples.calls_B[row]


def test_tokens_that_are_masked_again_are_taken_back(models):
    _, *reveals, _ = models[0].stream(asked(**CASES["again"], seed=11))
    changes = [change for event in reveals for change in event["changes"]]
    taken = [change for change in changes if change[2] is None]
    assert taken and all(change[3] == 0 for change in taken)


def test_a_prompt_without_a_blank_is_given_back(models):
    first, *reveals, end = models[0].stream(asked(prompt="twelve bytes", temperature=0.7))
    assert None not in first["given"] and not any(event["changes"] for event in reveals)
    assert end["trace"]["samples"][0]["text"] == "twelve bytes" and end["trace"]["tokens"] == 0


def test_a_sampler_is_compiled_once(models):
    def events(**values):
        return models[0].stream(asked(**values))

    first, *_, last = events(temperature=0.6)
    assert first["compiling"] and last["event"] == "end"
    for change in ({"seed": 5}, {"prompt": "a", "suffix": "b"}):
        first, *_, last = events(temperature=0.6, **change)
        assert not first["compiling"] and last["event"] == "end"
    assert next(events(temperature=0.8))["compiling"] and next(events(count=3))["compiling"]


def test_only_so_many_samplers_are_kept(models, monkeypatch):
    from lomdm_jax.serving import models as module

    monkeypatch.setattr(module, "KEPT", 2)
    backend = module.Models([models[1]["learned"]])
    monkeypatch.setattr(module, "compiled", lambda model, settings, rows: settings.top_k)

    def program(top_k):
        settings = default_config().sample
        settings.top_k = top_k
        return backend._program(("learned", 1, str(top_k)), models[1]["learned"], settings)

    assert [program(k) for k in (1, 2, 1, 3)] == [1, 2, 1, 3]
    assert [key[2] for key in backend._programs] == ["1", "3"], "the least recent one went"


def test_a_run_offers_what_it_can_do(models):
    learned, ranked = models[0].runs()
    assert learned["name"] == "learned" and not any(learned["samplers"].values())
    assert ranked["layout"] == "order" and ranked["length"] == LENGTH
    assert ranked["samplers"]["race"] is None
    assert "ranked layout" in ranked["samplers"]["ancestral"]
    assert ranked["defaults"]["top_k"] == 7 and ranked["defaults"]["dependence"] is None
    json.dumps([learned, ranked], allow_nan=False)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"run": "../learned"}, ["'../learned'", "'learned', 'ranked'"]),
        ({"prompt": "x" * 13}, ["13 tokens", "do not fit in 12"]),
        ({"prompt": "a[[12]]"}, ["13 tokens, blanks included"]),
        ({"prompt": "[[99999999999999]]"}, ["blank of 99999999999999", "a sample has 12"]),
        ({"suffix": "[[13]]"}, ["blank of 13"]),
        ({"prompt": f"[[{'9' * 5000}]]"}, ["blank of 9999"]),
        ({"prompt": "\ud800"}, ["ud800", "half of a character"]),
        ({"length": 13}, ["length is 13", "12 at most"]),
        ({"block": 5}, ["sample.block", "divide 12"]),
        ({"sampler": "fastest"}, ["sample.sampler", "'fastest'", "race"]),
        ({"grid": "round"}, ["sample.grid", "'round'", "cosine"]),
        ({"threshold": 0.5}, ["sample.threshold", "'race' has none"]),
        ({"run": "ranked", "sampler": "margin"}, ["sample.sampler", "ranked layout"]),
        ({"stop_at_eos": True, "suffix": "a"}, ["sample.stop_at_eos", "one of both"]),
    ],
)
def test_what_a_run_cannot_do_is_refused_before_it_begins(models, request_, words):
    with pytest.raises(UserError) as error:
        models[0].stream(asked(**request_))
    assert all(word in str(error.value) for word in words), error.value


def test_what_follows_the_end_of_text_does_not_count(models):
    """The end is a token that the model is known to draw in the middle."""
    from lomdm_jax.serving.models import Models

    *_, whole = models[0].stream(asked(temperature=0.7, seed=1))
    tokens = whole["trace"]["samples"][0]["tokens"]
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = tokens[4]
    backend = Models([models[1]["learned"]._replace(tokenizer=tokenizer)])
    *reveals, end = backend.stream(asked(temperature=0.7, seed=1, stop_at_eos=True))
    (sample,) = end["trace"]["samples"]
    length = tokens.index(tokenizer.eos_id) + 1
    assert sample["length"] == length <= 5
    assert sample["tokens"][:length] == tokens[:length]
    assert sample["text"] == tokenizer.decode(tokens[:length])
    assert all(change[3] > 0 for event in reveals for change in event.get("changes", []))
    assert end["trace"]["tokens"] == length, "only these are counted"


def test_over_http(models, serve):
    httpx = pytest.importorskip("httpx", reason="needs httpx")
    with serve(models[0]) as url:
        assert [run["name"] for run in httpx.get(f"{url}/api/runs").json()["runs"]] == [*models[1]]
        response = httpx.post(f"{url}/api/generate", json=CASES["race"], timeout=60)
        *_, last = map(json.loads, response.text.splitlines())
        assert last["trace"]["samples"][0]["text"].startswith("ab")
        body, headers = b'{"prompt": "\\ud800"}', {"content-type": "application/json"}
        response = httpx.post(f"{url}/api/generate", content=body, headers=headers)
        assert response.status_code == 422 and "half of a character" in response.json()["error"]


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    from lomdm_jax.serving.models import names

    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert names(folders) == [str(folder) for folder in folders]
    assert names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    with pytest.raises(UserError, match="twice"):
        names([tmp_path / "a", tmp_path / "b" / ".." / "a"])


@pytest.mark.parametrize("module", ["fastapi", "uvicorn"])
def test_the_job_says_what_to_install(models, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{module}.*pip install fastapi uvicorn"):
        serve_job(models[1]["learned"])


def test_the_job_refuses_an_address_and_runs_that_there_are_not(models, tmp_path):
    from lomdm_jax.serving.server import listen

    model = models[1]["learned"]
    with listen("127.0.0.1", 0) as taken:
        config = config_of("lomdm", serve_port=taken.getsockname()[1])
        with pytest.raises(UserError, match=r"config.serve.port is \d+, where nothing can listen"):
            serve_job(model._replace(config=config))
    for change in ({"serve_host": "no.such.host.invalid"}, {"serve_port": 70000}):
        with pytest.raises(UserError, match="nothing can listen"):
            serve_job(model._replace(config=config_of("lomdm", **change)))
    config = config_of("lomdm", serve_port=0, serve_runs=str(tmp_path / "none"))
    with pytest.raises(UserError, match="no folder of a run"):
        serve_job(model._replace(config=config))
