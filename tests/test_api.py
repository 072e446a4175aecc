"""The Python API: the page's examples, the jobs' numbers, enumeration, and what it refuses."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from csv import DictReader
from pathlib import Path

import jax
import numpy as np
import pytest

import lomdm_jax
from lomdm_jax import main as program
from lomdm_jax.evaluation.reveal_ranks import summarise
from lomdm_jax.evaluation.trajectories import Trajectory
from lomdm_jax.jobs.sample import records
from lomdm_jax.jobs.score import score as score_job
from lomdm_jax.trained import Trained
from tests import oracle
from tests.evaluation.test_trajectories import Compiled
from tests.test_main import TINY
from tests.test_score import MESH, TEXT, TOKENIZER, network

ROOT = Path(__file__).parent.parent
TRAINING, *EXAMPLES = (
    example
    for page in ("docs/python.md", "README.md")
    for example in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
)
SMALL = """
data.source=novel.txt data.valid_share=0.2 data.length=32 model.head_layers=0 train.steps=2
train.eval_every=1 checkpoint.every=1 eval.sequences=16 mesh.data=1
""".split()
SAID = "Return the name."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's example has trained, in little: like a clone. The text is gone since."""
    folder, original = tmp_path_factory.mktemp("clone"), program.main
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copy(ROOT / "README.md", folder / "novel.txt")

    def small(argv):
        return original([*argv, *(f"--config.{change}" for change in (*TINY, *SMALL))])

    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(program, "main", small)
        exec(TRAINING, names)
    assert names["status"] == 0
    (folder / "novel.txt").unlink()
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return lomdm_jax.load(folder / "runs" / "quickstart")


def test_the_examples_of_both_pages_run_in_order(folder, monkeypatch, capsys):
    """And what a comment beside a print says is what it prints."""
    monkeypatch.chdir(folder)
    names = {}
    for example in EXAMPLES:
        exec(example, names)
        printed = capsys.readouterr().out
        for comment in re.findall(r"print\(error\)  # (.*)", example):
            assert printed == f"{comment}\n"
    assert {"model", "found", "done", "order", "error"} - names.keys() == {"error"}
    assert (folder / "score.png").exists()
    saved = json.loads((folder / "runs/quickstart/config.json").read_text())
    assert names["model"].config.to_dict() == saved, "a call has changed the model's config"
    assert names["best"].config.sample.top_p == 0.9


LIGHT = """
import sys, lomdm_jax
heavy = {"jax", "numpy", "flax", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
assert set(lomdm_jax.__all__) | {"__version__"} <= set(dir(lomdm_jax))
try:
    lomdm_jax.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError("there is no such name")
assert not {"jax"} & sys.modules.keys()
from lomdm_jax import orders  # the package: no function has its name
assert orders.NAMES and all(getattr(lomdm_jax, name) for name in lomdm_jax.__all__)
"""


def test_importing_starts_nothing():
    subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, check=True)


def test_scores_are_those_of_the_job(model):
    texts = {"prefix": "Return the", "text": " name", "suffix": "."}
    settings = {f"score.{name}": text for name, text in texts.items()} | {"score.orders": 8}
    asked = lomdm_jax.load(model.workdir, **settings)
    with jax.set_mesh(asked.mesh):
        theirs = score_job(asked)
    ours = lomdm_jax.score(model, **texts, orders=8)
    assert ours == theirs and ours.orders == 8
    assert lomdm_jax.score(model, **texts, orders=8, seed=5) != ours
    order = lomdm_jax.order_of(model, **texts, orders=8)
    assert [t.piece for t in order.tokens] == [t.piece for t in ours.tokens]
    assert "".join(token.piece for token in ours.tokens) == " name"
    ranks = np.array([token.rank for token in ours.tokens]) / (len(ours.tokens) - 1)
    np.testing.assert_allclose([token.forward.mean for token in order.tokens], ranks, atol=1e-6)


def test_samples_are_those_of_the_run_whatever_the_count(model):
    lines = (model.workdir / "samples.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    ours = lomdm_jax.sample(model, count=8)
    assert [*records(ours)] == written
    assert lomdm_jax.sample(model)[0].tokens == ours[0].tokens
    assert lomdm_jax.sample(model, seed=5)[0].tokens != ours[0].tokens


def test_one_sample_is_drawn_on_eight_devices(model):
    """Where rows must split evenly."""
    wide = lomdm_jax.load(model.workdir, **{"mesh.data": 8, "eval.batch_size": 9})
    (ours,), (theirs,) = (lomdm_jax.sample(m) for m in (wide, model))
    assert wide.mesh.size == 8 and ours.tokens == theirs.tokens
    assert len(lomdm_jax.score(wide, SAID, orders=2).tokens) > 1


def test_a_completion_keeps_what_is_given(model):
    (done,) = lomdm_jax.sample(model, SAID, suffix=" end.", temperature=0.0)
    assert done.text.startswith(SAID) and done.text.endswith(" end.")
    given = [step == 0 for step in done.revealed]
    assert given[0] and given[-1] and done.length == len(given) == 32
    assert done.calls == max(done.revealed) == 32 - sum(given)
    assert all((log_p == 0) == known for log_p, known in zip(done.log_p, given, strict=True))


def test_further_calls_compile_nothing_anew(model):
    compiled = []

    def listen(name, seconds, **facts):
        if name.endswith("backend_compile_duration"):
            compiled.append(facts["fun_name"])

    def ask(text, seed):
        compiled.clear()
        lomdm_jax.sample(model, text, top_k=5, seed=seed)
        lomdm_jax.score(model, text, orders=24)
        lomdm_jax.order_of(model, text, orders=24, seed=seed)
        return {name for name in compiled if "lambda" not in name}  # a key is made each time

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert ask(SAID, 1) >= {"jit(advance)", "jit(start)", "jit(finish)", "jit(draw)"}
        assert not ask("Some other text", 2)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def expected(share_SL, length):
    """Mean rank, and mean and mean square of the share at the reveal, of each position over all
    orders, by the probabilities of what comes next in every subset that is masked."""
    found = np.zeros((3, length))
    for order in itertools.permutations(range(length)):
        masked, steps = 2**length - 1, []
        for i in order:
            steps.append(share_SL[masked, i])
            masked -= 2**i
        each = np.arange(length) / (length - 1), np.array(steps), np.array(steps) ** 2
        found[:, list(order)] += np.prod(steps) * np.array(each)
    return found


def test_ranks_and_shares_are_those_of_enumeration():
    """By both orders, which differ by more than the errors."""
    config, generator, params = network("lomdm")
    model = Trained(config, Path("tiny"), TOKENIZER, generator, MESH, params)
    x = np.array(TOKENIZER.encode(TEXT), np.int32)
    states = oracle.states_of(Compiled(generator), params, x)
    found = lomdm_jax.order_of(model, TEXT, orders=1024)
    exact = {}
    for order in ("forward", "reverse"):
        share_SL = states.share if order == "forward" else states.reverse_share
        exact[order], share, square = expected(np.asarray(share_SL), len(x))
        ranks = [getattr(token, order) for token in found.tokens]
        means, errors, shares = np.array(ranks).T
        assert (errors > 0).all() and (errors < 0.03).all()
        assert (np.abs(means - exact[order]) < 4 * errors).all()
        spread = np.sqrt((square - share**2) / found.effective)
        assert (np.abs(shares - share) < 4 * spread + 1e-6).all()
    apart = np.abs(exact["forward"] - exact["reverse"]).max()
    assert apart > 6 * errors.max() and 300 < found.effective < 1000
    assert [token.piece for token in found.tokens] == list(TEXT) and found.orders == 1024


def by_hand(rank_KL, counted_L, log_p_KL=0.0):
    """The ranks of a text whose orders are these."""
    rank_KL = np.array(rank_KL)
    arrays = dict.fromkeys(Trajectory._fields, np.zeros((1, *rank_KL.shape)))
    arrays |= {"rank_BL": rank_KL[None], "log_p_BL": arrays["nll_BL"] + log_p_KL}
    rows = {"tokens": np.arange(len(counted_L))[None], "counted": np.array(counted_L)[None] > 0}
    return summarise(Trajectory(**arrays), rows, lambda ids: [*map(str, ids)])


def test_a_fixed_order_is_certain_and_only_the_text_is_ranked():
    """What is given comes first, wherever it stands."""
    found = by_hand([[0, 4, 3, 2, 1]] * 8, [0, 1, 1, 1, 0])
    assert found.orders == found.effective == 8
    for token, piece, rank in zip(found.tokens, "123", (1, 0.5, 0), strict=True):
        assert token == (piece, (rank, 0, 1), (rank, 0, 1))


def test_the_weights_of_the_reverse_order():
    """One of two orders is three times as likely by it."""
    found = by_hand([[0, 1], [1, 0]], [1, 1], np.log([[3.0, 1.0], [1.0, 1.0]]))
    assert found.effective == pytest.approx(16 / 10)
    first, last = found.tokens
    assert first.forward == pytest.approx((0.5, 0.5, 1))
    error = np.sqrt(2 * (3 / 4 * 1 / 4) ** 2 * 1.6 / 0.6)
    assert first.reverse == pytest.approx((1 / 4, error, (3 * 3 + 1) / 4))
    assert last.reverse == pytest.approx((3 / 4, error, 1))


def test_one_order_of_one_token_has_no_error():
    found = by_hand([[0]], [1])
    (token,) = found.tokens
    assert found.orders == found.effective == 1 and token.piece == "0"
    for rank in (token.forward, token.reverse):
        assert (rank.mean, rank.share) == (0, 1) and np.isnan(rank.error)


def test_checkpoints_by_name_and_by_step(model):
    with (model.workdir / "eval.csv").open(newline="") as file:
        bounds = {int(r["step"]): float(r["nelbo_order_nats_per_token"]) for r in DictReader(file)}
    best = min(bounds, key=bounds.get)

    def params(which):
        found = lomdm_jax.load(str(model.workdir), checkpoint=which).params
        return np.concatenate([np.ravel(a) for a in jax.tree.leaves(found)])

    by_step = {1: params(1), 2: params("2")}
    assert not np.array_equal(by_step[1], by_step[2]) and bounds.keys() == by_step.keys()
    np.testing.assert_array_equal(params("best"), by_step[best])
    np.testing.assert_array_equal(params(None), by_step[2])


def test_a_model_in_a_word(model):
    words = str(model)
    assert len(words) < 200 and "lomdm, 32 tokens" in words and str(model.workdir) in words


REFUSED = [
    ("score", dict(text=""), "text is '', in which there is no token"),
    ("score", dict(text=["a"]), r"text is \['a'\], but it must be a str"),
    ("score", dict(text="a", orders=0), "orders is 0, but it must be above zero"),
    ("score", dict(text="a", orders=2.5), "orders is '2.5', but it must be int"),
    ("score", dict(text="a", seed=-1), "seed is -1, but it must not be negative"),
    (
        "score",
        dict(text="a", prefix="b" * 99),
        r"prefix \(99 tokens\).*suffix \(0\) do not fit in model\.config\.data\.length = 32",
    ),
    ("order_of", dict(text="a" * 99), "text has 99 tokens.*model.config.data.length = 32"),
    ("sample", dict(prompt=3), "prompt is 3, but it must be a str"),
    ("sample", dict(count=0), "count is 0, but it must be above zero"),
    ("sample", dict(top_p=2.0), r"top_p is 2.0, but it must lie in \(0, 1\]"),
    ("sample", dict(topp=0.5), "topp = '0.5': there is no such key. Near it: top_p,"),
    ("sample", dict(prompt="a" * 99, suffix="b"), r"and suffix \(1 tokens\) do.*set length\."),
    ("sample", dict(length=64), "length is 64, .*: set block, so"),
    ("sample", dict(remask=0.5), "use sampler = 'ancestral' with grid = 'linear'"),
    ("sample", dict(threshold=0.5), "threshold is 0.5, but sampler = 'race' has none"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), REFUSED)
def test_errors_name_the_argument(model, function, arguments, message):
    with pytest.raises(lomdm_jax.UserError, match=message) as caught:
        getattr(lomdm_jax, function)(model, **arguments)
    assert not re.search(r"--|(?<!model\.)config\.[a-z]+\.[a-z]", str(caught.value))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "bst"}, "checkpoint is 'bst', but it must be \"latest\""),
        ({"checkpoint": 17}, r"No checkpoint '17' in .* \(there: \[1, 2\]\)"),
        ({"mesh.dat": 1}, "mesh.dat = '1': there is no such key. Near it: mesh.data"),
        ({"mesh.data": 64}, "there are 8 cpu"),
        ({"sample.top_p": "much"}, "sample.top_p is 'much', but it must be float"),
        ({"model.width": 64}, "model.width"),
    ],
)
def test_what_cannot_be_loaded_is_refused(model, settings, message):
    with pytest.raises(lomdm_jax.UserError, match=message) as caught:
        lomdm_jax.load(model.workdir, **settings)
    assert "config." not in str(caught.value).replace("config.py", "")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(lomdm_jax.UserError, match=r"folder is .*nowhere', which holds no run"):
        lomdm_jax.load(tmp_path / "nowhere")
