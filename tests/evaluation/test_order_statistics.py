"""What an order is, on held-out text: known answers on orders and rates made by hand."""

import json
import math

import jax
import numpy as np
import pytest

from lomdm_jax.evaluation import order_statistics
from lomdm_jax.evaluation.order_classes import BANDS, CLASSES, KINDS, bands, classes, token_kind
from lomdm_jax.evaluation.order_means import Mean, kendall_tau, mean_where, relative_rank
from lomdm_jax.evaluation.order_statistics import Draw, make_draw, measure, summarise
from lomdm_jax.objectives import make_objective
from lomdm_jax.orders import make_order
from tests import oracle

PIECES = ["⏎", " the", "ing", " 19", ".", " "]  # one of each class, by id
LENGTH = 6


def pieces(ids):
    return [PIECES[i] for i in ids]


def draws(rank_NL, velocity_NL=None, confidence_NL=None):
    ones = np.ones(np.shape(rank_NL))
    some = [ones if a is None else np.array(a, float) for a in (velocity_NL, confidence_NL)]
    return Draw(np.array(rank_NL), ones > 0, *some)


def everything(rank_NL, **rates):
    tokens_NL = np.tile(np.arange(LENGTH), (len(rank_NL), 1))
    counted_NL = np.ones(tokens_NL.shape, bool)
    return summarise(draws(rank_NL, **rates), tokens_NL, counted_NL, pieces)


def test_every_token_is_of_one_kind():
    found = dict(zip(PIECES, map(token_kind, PIECES), strict=True))
    assert list(found.values()) == [
        *("end of text", "word start", "inside a word", "number", "punctuation", "white space")
    ]
    assert token_kind("\n") == "white space"
    assert token_kind('"It') == "punctuation"


def test_a_token_is_in_a_kind_a_band_and_perhaps_capitalised():
    texts = [" The", "the", "É", "."]
    tokens_NL = np.array([[0, 1, 2, 3, 3]])
    counted_NL = np.array([[True, True, True, True, False]])
    found = classes(tokens_NL, counted_NL, lambda ids: [texts[i] for i in ids])
    assert list(found) == list(CLASSES)
    for group in (KINDS, BANDS):
        np.testing.assert_array_equal(sum(found[name].astype(int) for name in group), counted_NL)
    np.testing.assert_array_equal(found["capitalised"], [[True, False, True, False, False]])
    np.testing.assert_array_equal(found["punctuation"], [[False] * 3 + [True, False]])


def test_bands_hold_a_fifth_of_the_tokens_each():
    """Ids of one count share a band; where there are many counts the bands are of equal mass."""
    band_V = bands(np.array([1, 1, 50, 0]))
    assert band_V.tolist() == [0, 0, 2, 0]  # the frequent one holds the middle of all tokens
    count_V = np.arange(1, 2001)
    mass = np.bincount(bands(count_V), weights=count_V)
    np.testing.assert_allclose(mass / count_V.sum(), 0.2, atol=0.002)
    assert (np.diff(bands(count_V)) >= 0).all()


def test_relative_ranks_share_ties_and_skip_what_is_given():
    rank_NL = np.array([[9, 3, 3, 7], [0, 1, 2, 3]])
    counted_NL = np.array([[False, True, True, True], [True, False, False, False]])
    found = relative_rank(rank_NL, counted_NL)
    np.testing.assert_array_equal(found, [[np.nan, 0.25, 0.25, 1], [0, np.nan, np.nan, np.nan]])


def test_tau_to_blocks_counts_ties():
    """Blocks of two, and an order that follows them: 4 of 6 pairs are ordered in both, so tau-b is
    4 / sqrt(4 * 6); of its reverse, minus that; of a single block, none."""
    blocks, counted_NL = np.array([0, 0, 1, 1]), np.ones((2, 4), bool)
    tau = 4 / math.sqrt(4 * 6)
    orders = np.array([[1, 0, 2, 3], [2, 3, 1, 0]])
    np.testing.assert_allclose(kendall_tau(orders, counted_NL, blocks), [tau, -tau])
    assert np.isnan(kendall_tau(orders, counted_NL, np.zeros(4))).all()


def test_means_weigh_texts_by_their_tokens():
    """Sums 2 and 6 over 1 and 3 tokens are 8 / 4; residuals are 0, and so is the error."""
    values_NL = np.array([[2.0, 9.0, 9.0], [1.0, 2.0, 3.0]])
    where_NL = np.array([[True, False, False], [True, True, True]])
    assert mean_where(values_NL, where_NL) == pytest.approx((2.0, 0.0, 4))


@pytest.mark.parametrize(("order", "tau"), [(range(6), 1.0), (range(5, -1, -1), -1.0)])
def test_tau_and_ranks_of_orders_along_the_text(order, tau):
    found = everything([list(order)] * 3)
    assert found.kendall_tau == pytest.approx((tau, 0.0, 3))
    means = [mean.mean for mean in found.rank_by_position]
    np.testing.assert_allclose(means, np.array(order) / 5)
    assert found.rank_by_class["punctuation"].mean == pytest.approx(order[4] / 5)


def test_means_and_errors_are_over_sequences():
    """Two sequences, of which one is reversed: tau is 1 and -1, with a standard error of 1."""
    found = everything([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    assert found.kendall_tau == pytest.approx((0.0, 1.0, 2))
    assert found.rank_by_position[0] == pytest.approx((0.5, 0.5, 2))


def test_given_positions_and_absent_classes_are_left_out():
    tokens_NL = np.array([[0, 1, 1, 1]])
    counted_NL = np.array([[False, True, True, True]])
    found = summarise(draws([[0, 3, 1, 2]]), tokens_NL, counted_NL, pieces)
    assert [mean.mean for mean in found.rank_by_position[1:]] == [1.0, 0.0, 0.5]
    assert found.rank_by_position[0].values == found.rank_by_class["end of text"].values == 0
    assert found.rank_by_class["word start"].values == 3
    assert found.kendall_tau.mean == pytest.approx(-1 / 3)


def test_correlation_of_velocity_and_confidence():
    """Inside a state only ranks matter; a state of equal rates says nothing."""
    order = [list(range(LENGTH))] * 3
    rising = np.exp(np.arange(LENGTH))
    velocity = [rising, rising[::-1], np.ones(LENGTH)]
    confidence = np.tile(np.linspace(0.1, 0.9, LENGTH), (3, 1))
    found = everything(order, velocity_NL=velocity, confidence_NL=confidence)
    assert found.velocity_confidence == pytest.approx((0.0, 1.0, 2))
    pooled = np.corrcoef(np.ravel(velocity), confidence.ravel())[0, 1]
    assert found.velocity_confidence_pooled == pytest.approx(pooled)
    equal = everything(order, confidence_NL=confidence)
    assert equal.velocity_confidence.values == 0 and math.isnan(equal.velocity_confidence_pooled)


def test_a_race_with_known_weights_is_measured(tmp_path):
    """Two positions with rates 3 : 1: the first comes first with probability 3/4, so tau is 1/2."""
    generator = oracle.TableModel(2, 2)
    params = generator.init(jax.random.key(0))
    for name in ("forward", "reverse"):
        params[name] = np.broadcast_to(np.log([3.0, 1.0]), params[name].shape)
    objective = make_objective("order", mask_id=2, samples=1, eps=1e-3, reconstruction_share=0.1)
    draw = jax.jit(make_draw(generator, objective))
    full = {"tokens": np.zeros((500, 2), np.int32), "counted": np.ones((500, 2), bool)}
    padding = full | {"counted": np.zeros((500, 2), bool)}
    found = measure(
        draw, params, [full, full, padding, full, full], key=jax.random.key(1), pieces=pieces
    )
    error = math.sqrt((1 - 0.5**2) / 2000)
    assert found.kendall_tau.values == 2000
    assert found.kendall_tau.standard_error == pytest.approx(error, rel=0.05)
    assert abs(found.kendall_tau.mean - 0.5) < 4 * error
    table, picture = order_statistics.write(tmp_path, found, found, "lomdm")
    saved = json.loads(table.read_text())
    assert saved["after"]["kendall_tau"]["mean"] == found.kendall_tau.mean
    assert saved["before"]["rank_by_class"]["number"]["mean"] is None  # there is none
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_fixed_orders_are_described_too():
    generator = oracle.TableModel(3, 2, make_order("ar", c1=1.0, c2=0.0, exponent=1.0))
    objective = make_objective("order", mask_id=2, samples=1, eps=1e-3, reconstruction_share=0.1)
    draw = jax.jit(make_draw(generator, objective))
    batch = {"tokens": np.zeros((4, 3), np.int32), "counted": np.ones((4, 3), bool)}
    params = generator.init(jax.random.key(0))
    found = measure(draw, params, [batch], key=jax.random.key(1), pieces=pieces)
    assert found.kendall_tau == Mean(1.0, 0.0, 4)
    assert "none, all rates equal" in order_statistics.report(found, found)
