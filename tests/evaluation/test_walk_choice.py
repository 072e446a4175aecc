"""The walk of an order: the best of those offered, with the error of the comparison."""

import numpy as np
import pytest

from lomdm_jax.evaluation import walk_choice


def test_the_lowest_bound_wins_and_errors_leave_out_what_sequences_differ_by():
    rng = np.random.default_rng(0)
    sequences_N = 1000 * rng.normal(size=64)
    own = {name: rng.normal(size=64) for name in walk_choice.WALKS}
    shift = {"to the right": 0.0, "to the left": -5.0, "to both sides": 1.0}

    def nats(table):
        name = next(name for name, t in walk_choice.WALKS.items() if t is table)
        return sequences_N + own[name] + shift[name]

    choice = walk_choice.choose(nats)
    assert choice.name == "to the left" and choice.table is walk_choice.WALKS["to the left"]
    excess = own["to the right"] - np.mean(list(own.values()), axis=0)
    mean, error = choice.nats["to the right"]
    assert error == pytest.approx(excess.std(ddof=1) / 8, rel=1e-6)
    assert mean == pytest.approx(nats(walk_choice.WALKS["to the right"]).mean())
    line = walk_choice.report(choice, length=10)
    assert "to the left" in line.rsplit(":", 1)[1] and f"{mean / 10:.4f}" in line


def test_tables_are_indexed_left_then_right():
    right, left = walk_choice.WALKS["to the right"], walk_choice.WALKS["to the left"]
    assert right[1, 0] == right[1, 1] > 0 == right[0, 1]
    np.testing.assert_array_equal(left, right.T)
