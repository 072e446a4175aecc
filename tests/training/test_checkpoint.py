"""Which checkpoints are kept and found."""

import jax.numpy as jnp
import pytest

from lomdm_jax.errors import UserError
from lomdm_jax.training.checkpoint import Checkpoints
from lomdm_jax.training.state import TrainState


def save(folder, bounds):
    """A checkpoint for each step; None for one that was not evaluated."""
    checkpoints = Checkpoints(folder, 2, create=True)
    nothing = {field: jnp.zeros(1) for field in TrainState.__dataclass_fields__}
    for step, bound in bounds.items():
        checkpoints.save(TrainState(**nothing | {"step": step}), {}, {"model.width": 1}, bound)
    checkpoints.close()


def test_the_best_is_kept_and_found_across_restarts(tmp_path):
    save(tmp_path / "c", {10: 3.0, 20: 2.0, 30: None, 40: None})
    save(tmp_path / "c", {50: 2.5, 60: None, 70: None})
    checkpoints = Checkpoints(tmp_path / "c", 2, create=False)
    assert checkpoints.steps() == [20, 60, 70]
    assert checkpoints.find("best") == 20 and checkpoints.find("latest") == 70
    save(tmp_path / "c", {80: 0.0, 90: None, 100: None})
    again = Checkpoints(tmp_path / "c", 2, create=False)
    assert again.steps() == [80, 90, 100] and again.find("best") == 80


def test_a_bound_that_cannot_be_read_leaves_the_others(tmp_path):
    save(tmp_path / "c", {10: 3.0, 20: 2.0})
    (tmp_path / "c" / "20" / "evaluation" / "metadata").write_text("{")
    assert Checkpoints(tmp_path / "c", 2, create=False).find("best") == 10


def test_none_is_best_where_none_was_evaluated(tmp_path):
    save(tmp_path / "c", {10: None})
    with pytest.raises(UserError, match="No checkpoint 'best'"):
        Checkpoints(tmp_path / "c", 2, create=False).find("best")
