"""The job `score` against enumeration: texts, texts given others, what it refuses and writes."""

import csv
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lomdm_jax.config import default_config
from lomdm_jax.data.tokenizers import make_tokenizer
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.errors import UserError
from lomdm_jax.evaluation import text_score
from lomdm_jax.generator import init_params, make_generator
from lomdm_jax.jobs.score import score
from lomdm_jax.trained import Trained
from tests import oracle
from tests.evaluation.test_trajectories import Compiled
from tests.networks import noisy

LENGTH = 6
TEXT = "abcaba"
MESH = meshes.make_mesh(data=1)
TOKENIZER = make_tokenizer("characters", 0, lambda: [TEXT])


@functools.cache
def network(name, layout="own"):
    config = default_config()
    config.model.update(width=8, layers=1, heads=2, cond_dim=4, head_layers=0, layout=layout)
    config.order.name, config.data.length = name, LENGTH

    shapes = jax.eval_shape(lambda: init_params(config, TOKENIZER.rows, jax.random.key(0)))
    params = noisy(shapes, 0.65, seed=1)
    for pointer in {"prior_head", "posterior_head"} & set(params):  # tables count thirty times
        params[pointer] = jax.tree.map(lambda a: a / 30, params[pointer])
    generator = make_generator(config, TOKENIZER.rows, TOKENIZER.mask_id)
    return config, generator, params


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Score with a model of this order and with these settings of the section `score`."""

    def run(name, layout="own", ignore_first=False, timed=False, write=False, **settings):
        config, generator, params = network(name, layout)
        config = config.copy_and_resolve_references()
        config.score.update(settings)
        config.eval.batch_size = 16  # one shape, one compilation
        config.objective.ignore_first, config.model.time_conditioning = ignore_first, timed
        model = Trained(config, tmp_path, TOKENIZER, generator, MESH, params)
        if not write:
            monkeypatch.setattr(text_score, "write", lambda *asked: ())
        with jax.set_mesh(MESH):
            return score(model)

    return run


@pytest.mark.parametrize(("name", "layout"), [("ar", "own"), ("ar", "ranked")])
def test_from_left_to_right_joint_is_prefix_and_suffix_given_the_prefix(scored, name, layout):
    whole = scored(name, layout, text="abcab")
    first = scored(name, layout, text="abc")
    rest = scored(name, layout, prefix="abc", text="ab")
    assert whole.nelbo_order.nats == pytest.approx(
        first.nelbo_order.nats + rest.nelbo_order.nats, rel=1e-5
    )
    for found in (whole, first, rest):
        assert found.nelbo_order.error < 1e-5
        assert found.importance.nats == pytest.approx(found.nelbo_order.nats, rel=1e-5)
        assert found.nelbo == pytest.approx(found.nelbo_order, rel=1e-5)
    assert [token.rank for token in whole.tokens] == [0, 1, 2, 3, 4]
    joined = [*first.tokens, *rest.tokens]
    assert [t.nats for t in joined] == pytest.approx([t.nats for t in whole.tokens], rel=1e-4)


def test_from_right_to_left_it_is_the_suffix_that_may_be_given(scored):
    whole, last = scored("r2l", text=TEXT), scored("r2l", text="aba")
    first = scored("r2l", text="abc", suffix="aba")
    # Alone the last three stand at the start of the row: what stands where matters to no one.
    assert whole.nelbo_order.nats == pytest.approx(
        last.nelbo_order.nats + first.nelbo_order.nats, rel=1e-4
    )


@pytest.mark.parametrize("name", ["lomdm", "walk", "block:2"])
def test_bounds_are_those_of_enumeration_and_hold(scored, name):
    """Also of a part given what stands around it, where the order allows that."""
    _, generator, params = network(name, "own")
    generator = Compiled(generator)
    x = np.array(TOKENIZER.encode(TEXT), np.int32)
    around = dict(prefix="ab", text="cab", suffix="a") if name != "block:2" else {}
    for start, settings in ((-1, {"text": TEXT}), (0b011100, around)):
        if not settings:
            continue

        terms = oracle.closed_form(oracle.states_of(generator, params, x), start)
        log_p = float(oracle.log_p(generator, params, x, start))
        order, clock = float(terms.main + terms.order), float(terms.clock)
        found = scored(name, orders=64, **settings)
        assert found.nelbo_order.error < 0.6
        assert abs(found.nelbo_order.nats - order) < 4 * found.nelbo_order.error + 1e-4
        if name != "block:2":  # which has no clock
            assert abs(found.nelbo.nats - order - clock) < 4 * found.nelbo.error + 1e-4
        assert found.importance.nats <= found.nelbo_order.nats + 1e-9
        assert found.importance.nats > -log_p - 4 * found.importance.error - 1e-4
        assert order >= -log_p - 1e-4


@pytest.mark.parametrize("name", ["ar", "permutation:1"])
def test_on_the_ranked_layout_what_is_given_comes_first_wherever_it_stands(scored, name):
    _, generator, params = network(name, "ranked")
    targets = np.array([False, False, True, True, False, False])
    group = np.asarray(generator.order.groups(LENGTH)) + np.where(targets, LENGTH, 0)
    rank, x = np.argsort(np.argsort(group)).astype(np.int32), TOKENIZER.encode(TEXT)
    x_BL, z_BL = jnp.array([x], jnp.int32), jnp.full((1, LENGTH), TOKENIZER.mask_id)
    tokens, _ = generator.reverse(params)(z_BL[None], None, x_BL, jnp.asarray(rank)[None, None])
    (nll,), _ = tokens.costs(x_BL[None], jnp.ones_like(x_BL[None], bool))
    found = scored(name, "ranked", prefix="ab", text="ca", suffix="ba")
    assert [t.nats for t in found.tokens] == pytest.approx(np.asarray(nll)[0, 2:4], rel=1e-4)
    assert [t.rank for t in found.tokens] == (rank[2:4] - 4).tolist()
    assert found.nelbo_order.nats == pytest.approx(float(nll[0, 2:4].sum()), rel=1e-4)


def test_a_learned_order_on_the_ranked_layout_fills_a_blank(scored):
    around = dict(prefix="ab", suffix="ba", orders=64)
    found = scored("lomdm-ranked", text="ca", **around)
    assert found.importance.nats < found.nelbo_order.nats and found.nelbo_order.error > 0
    one = [scored("lomdm-ranked", text=c, prefix="ab", suffix="aba") for c in "abc"]
    assert all(abs(t.order_nats) < 1e-5 for each in one for t in each.tokens)  # no choice
    assert 0.05 < sum(math.exp(-each.importance.nats) for each in one) < 1


def test_a_long_text_is_scored_in_pieces(scored, capsys):
    long = scored("ar", text=TEXT * 2 + "ab")
    assert "3 pieces" in capsys.readouterr().out
    whole, rest = scored("ar", text=TEXT), scored("ar", text="ab")
    assert "pieces" not in capsys.readouterr().out
    assert long.nelbo_order.nats == pytest.approx(
        2 * whole.nelbo_order.nats + rest.nelbo_order.nats, rel=1e-5
    )
    assert [(t.row, t.position) for t in long.tokens[5:8]] == [(0, 5), (1, 0), (1, 1)]
    assert long.bytes == 14


def test_where_the_first_token_is_given_an_end_of_text_precedes_the_text(scored):
    found = scored("lomdm", ignore_first=True, text="abc")
    assert [t.position for t in found.tokens] == [1, 2, 3]
    assert [t.position for t in scored("lomdm", text="abc").tokens] == [0, 1, 2]


def test_what_is_written(scored, tmp_path):
    found = scored("lomdm", prefix="ab", text="cab", orders=4, write=True)
    facts = json.loads((tmp_path / "score.json").read_text())
    with open(tmp_path / "score.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert (
        [row["piece"] for row in table] == ["c", "a", "b"] == [t["piece"] for t in facts["tokens"]]
    )
    assert (facts["text"], facts["prefix"], facts["orders"]) == ("cab", "ab", 4)
    each = sum(float(row["nats"]) + float(row["order_nats"]) for row in table)
    assert each == pytest.approx(found.nelbo_order.nats, rel=1e-6)
    order = facts["nelbo_order"]
    assert order["nats"] == found.nelbo_order.nats
    assert order["nats_per_token"] == pytest.approx(order["nats"] / 3)
    assert order["perplexity"] == pytest.approx(math.exp(order["nats"] / 3))
    assert order["bits_per_byte"] == pytest.approx(order["nats"] / math.log(2) / 3)
    assert sum(float(row["rank"]) for row in table) == pytest.approx(3)
    assert (tmp_path / "score.png").read_bytes()[:4] == b"\x89PNG"


def test_one_order_has_no_error(scored, tmp_path):
    found = scored("lomdm", text="abc", orders=1, write=True)
    assert math.isnan(found.nelbo_order.error)
    facts = json.loads((tmp_path / "score.json").read_text())
    assert facts["nelbo_order"]["draw_error"] is None


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("lomdm", {}, ["config.score.text", "config.score.file", "both are empty"]),
        ("lomdm", {"text": "a", "file": "b"}, ["both are set"]),
        ("lomdm", {"file": "nowhere.txt"}, ["config.score.file", "nowhere.txt", "cannot be read"]),
        ("lomdm", {"text": "abc", "prefix": TEXT}, ["prefix (6 tokens)", "data.length = 6"]),
        ("ar", {"text": "a", "suffix": "bc"}, ["suffix 'bc'", "'ar' reveals 2", "ranked"]),
        ("r2l", {"text": "a", "prefix": "b"}, ["prefix is 'b'", "'r2l' reveals 1"]),
        ("block:2", {"text": "abc", "suffix": "ab"}, ["'block:2' reveals 2"]),
        ("permutation:1", {"text": "abc", "prefix": "abc"}, ["'permutation:1' reveals"]),
    ],
)
def test_what_cannot_be_scored_is_refused(scored, name, settings, words):
    with pytest.raises(UserError) as error:
        scored(name, **settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_network_that_needs_a_time_is_refused(scored):
    with pytest.raises(UserError, match="time_conditioning"):
        scored("lomdm", timed=True, text="abc")


def test_a_file_is_read(scored, tmp_path):
    (tmp_path / "text.txt").write_text("abcab")
    ours = scored("ar", file=str(tmp_path / "text.txt"))
    assert ours.nelbo_order == scored("ar", text="abcab").nelbo_order


def test_a_prefix_inside_a_block_may_be_given(scored):
    """What shares the block with the text is seen, whether before or after it."""
    whole = scored("block:2", text="bca", prefix="a", suffix="")
    other = scored("block:2", text="bca", prefix="b", suffix="")
    assert abs(whole.nelbo_order.nats - other.nelbo_order.nats) > 0.01
    same = scored("block:2", text="a", prefix="ab", suffix="b")
    assert len(same.tokens) == 1 and jnp.isfinite(same.nelbo_order.nats)
