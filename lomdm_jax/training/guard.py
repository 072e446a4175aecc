"""Steps that must not count: found in the compiled step, dealt with by the loop."""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lomdm_jax.errors import UserError
from lomdm_jax.training.checkpoint import Checkpoints
from lomdm_jax.training.metrics import TERMS

HORIZON = 100  # good steps that the running mean of the loss looks back on
# One batch may be bad, and after a spike perhaps the next few. If none of so many is good, then
# what they have in common is: the parameters, or the data from here on.
IN_A_ROW = 10
_HINT = ' To leave out the update of such a step and go on, set config.train.on_bad_step to "skip".'


class Verdict(NamedTuple):
    """bad: bool scalar; running: float32 [3], the running loss after the step; metrics: float32
    scalars, `bad_steps` 0 or 1 and what the loss was compared with."""

    bad: jax.Array
    running: jax.Array
    metrics: dict[str, jax.Array]


def judge(running: jax.Array, metrics: Mapping[str, jax.Array], spike: float) -> Verdict:
    """Whether a step is bad, in the compiled step.

    It is if its `loss` or `grad_norm` is not finite, or if `spike` is not 0, HORIZON good steps
    were seen and the loss lies more than `spike` standard deviations above their mean. Plain mean
    and variance over the first HORIZON steps, exponential ones after (D. H. D. West, Updating mean
    and variance estimates, 1979); bad steps are left out.

    running: float32 [3], number of good steps up to HORIZON, mean and variance of their losses.
    """
    (count, mean, variance), loss = running, metrics["loss"]
    deviation = jnp.sqrt(variance)
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"]))
    if spike:
        bad |= (count >= HORIZON) & (loss > mean + spike * deviation)
    count = jnp.minimum(count + 1, HORIZON)
    weight, gap = 1 / count, loss - mean
    after = jnp.stack([count, mean + weight * gap, (1 - weight) * (variance + weight * gap**2)])
    compared = {"loss_mean": mean, "loss_deviation": deviation, "bad_steps": jnp.float32(bad)}
    return Verdict(bad, jnp.where(bad, running, after), compared)


def keeper(bad: jax.Array, on_bad_step: str) -> Callable[[Any, Any], Any]:
    """(old, new) -> new, trees of arrays; with "skip" it is old if the step is bad.

    Element by element, which needs no second copy of a donated state where compilers fuse (TPU);
    `jax.lax.cond` does, and makes a GPU's host wait for the condition.
    """
    if on_bad_step == "stop":
        return lambda old, new: new
    return lambda old, new: jax.tree.map(lambda a, b: jnp.where(bad, a, b), old, new)


class Guard:
    """Stops a run at a bad step, or says that its update was left out.

    config: the section `train`.
    """

    def __init__(self, config: ConfigDict, checkpoints: Checkpoints):
        self._config, self._checkpoints = config, checkpoints
        self._in_a_row = 0

    def check(self, number: int, values: Mapping[str, float]) -> None:
        """Look at the metrics of step `number`; they must come in order, none left out.

        Raises:
          UserError: the run must not go on.
        """
        self._in_a_row = self._in_a_row + 1 if values["bad_steps"] else 0
        if not values["bad_steps"]:
            return
        reason = self._reason(values)
        if self._config.on_bad_step == "stop":
            raise self._stopped(number, reason)
        print(f"step {number} is skipped: {reason}", file=sys.stderr, flush=True)
        if self._in_a_row >= IN_A_ROW:
            raise self._stopped(number, f"{IN_A_ROW} steps in a row are bad; in the last {reason}")

    def _reason(self, values: Mapping[str, float]) -> str:
        terms = ", ".join(f"{name} {values[name]:g}" for name in (*TERMS, "grad_norm"))
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            return f"the loss or its gradient is not finite ({terms})"
        return (
            f"the loss lies more than config.train.spike = {self._config.spike:g} standard "
            f"deviations ({values['loss_deviation']:g}) above its running mean "
            f"{values['loss_mean']:g} ({terms})"
        )

    def _stopped(self, number: int, reason: str) -> UserError:
        self._checkpoints.wait()
        good = self._checkpoints.latest()
        saved = "no checkpoint was saved yet" if good is None else f"step {good} is saved"
        hint = "" if self._config.on_bad_step == "skip" else _HINT
        return UserError(
            f"Training stopped at step {number}: {reason}. The last good checkpoint: {saved} in "
            f"{self._checkpoints.folder}. Lower config.optimizer.learning_rate or raise "
            "config.optimizer.warmup_steps, and run the same command again: it continues from "
            f"there.{hint}"
        )
