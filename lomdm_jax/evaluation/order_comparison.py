"""Orders of several runs on the same texts: a summary, charts, and tables of every number."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lomdm_jax.evaluation.order_charts import Chart, Reference, Series
from lomdm_jax.evaluation.order_classes import BANDS, KINDS, classes
from lomdm_jax.evaluation.order_means import (
    Mean,
    correlation,
    kendall_tau,
    mean_of,
    mean_where,
    relative_rank,
)
from lomdm_jax.evaluation.order_statistics import rank_by_class, rank_by_position
from lomdm_jax.evaluation.trajectories import Trajectory
from lomdm_jax.orders import fixed

BINS = 10  # of a curve: each then holds 200 tokens of 64 texts at L = 32
STEPS = 64  # points of a curve by step; longer texts have several steps in each
BY_RANK = ("log_q", "log_p", "nll", "entropy", "confidence", "order_entropy")
# Fixed orders that every order is held against; blocks are ties, of no order among themselves.
FIXED: Mapping[str, Callable[[int], np.ndarray]] = {
    "left to right": fixed.left_to_right,
    "right to left": fixed.right_to_left,
    "blocks of 4": lambda length: np.arange(length) // 4,
    "blocks of 16": lambda length: np.arange(length) // 16,
}


class Reading(NamedTuple):
    """What a run made of N texts, arrays [N, L] on the host.

    name: of the run. pieces: from token ids to their texts. counted_NL: bool, what is scored.
    found: a trajectory of each text.
    """

    name: str
    pieces: Callable[[list[int]], list[str]]
    tokens_NL: np.ndarray
    counted_NL: np.ndarray
    found: Trajectory

    @property
    def rank_NL(self) -> np.ndarray:
        """See `relative_rank`."""
        return relative_rank(self.found.rank_BL, self.counted_NL)

    @property
    def step_NL(self) -> np.ndarray:
        """Targets revealed before each target; negative for what is given, int."""
        return self.found.rank_BL - (~self.found.targets_BL).sum(-1, keepdims=True)

    @property
    def left_NL(self) -> np.ndarray:
        """Targets that are masked just before each target's reveal, int."""
        return self.found.targets_BL.sum(-1, keepdims=True) - self.step_NL

    @property
    def gap_NL(self) -> np.ndarray:
        """log q - log p of each reveal, nats."""
        return self.found.log_q_BL - self.found.log_p_BL


def taus(reading: Reading) -> dict[str, Mean]:
    """Kendall's tau to each of FIXED, mean over the texts; nan where a text is one block."""
    ranks, counted_NL, length = reading.found.rank_BL, reading.counted_NL, reading.rank_NL.shape[1]
    return {
        name: mean_of(kendall_tau(ranks, counted_NL, groups(length)))
        for name, groups in FIXED.items()
    }


def summary(reading: Reading) -> list[tuple[str, str, Mean]]:
    """What is measured, in what unit, and its mean with the standard error over the texts."""
    found, counted_NL, targets_NL = reading.found, reading.counted_NL, reading.found.targets_BL
    gap_N = np.sum(reading.gap_NL, axis=-1, where=targets_NL)
    tokens_N = counted_NL.sum(-1)
    per_token = np.where(counted_NL, (gap_N / np.maximum(tokens_N, 1))[:, None], 0.0)
    order = [
        correlation(stats.spearmanr, rank_L[counted_L], entropy_L[counted_L])
        for rank_L, entropy_L, counted_L in zip(
            reading.rank_NL, found.entropy_BL, counted_NL, strict=True
        )
    ]
    return [
        ("surprisal", "nats per token", mean_where(found.nll_BL, counted_NL)),
        ("log q - log p", "nats per token", mean_where(per_token, counted_NL)),
        (
            "bound, both together",
            "nats per token",
            mean_where(found.nll_BL + per_token, counted_NL),
        ),
        ("log q - log p", "nats per text", mean_of(gap_N)),
        ("order entropy", "nats per reveal", mean_where(found.order_entropy_BL, targets_NL)),
        ("token entropy", "nats per token", mean_where(found.entropy_BL, counted_NL)),
        ("confidence", "probability", mean_where(found.confidence_BL, counted_NL)),
        *((f"tau to {name}", "Kendall's tau-b", mean) for name, mean in taus(reading).items()),
        ("rank with token entropy", "Spearman's correlation", mean_of(np.array(order))),
    ]


def charts(readings: Sequence[Reading]) -> list[Chart]:
    """All charts of the readings; what too few tokens leave without a point is left out."""
    members = {r.name: classes(r.tokens_NL, r.counted_NL, r.pieces) for r in readings}
    found = [
        rank_by_position({r.name: [mean_of(rank_N) for rank_N in r.rank_NL.T] for r in readings}),
        _tau_chart(readings),
        rank_by_class(
            {
                r.name: {k: mean_where(r.rank_NL, where) for k, where in members[r.name].items()}
                for r in readings
            }
        ),
        _entropy_chart(readings),
        _surprisal_chart(readings),
        _gap_chart(readings),
        _order_entropy_chart(readings),
    ]
    return [chart for chart in found if any(len(series.x) for series in chart.series)]


def _tau_chart(readings: Sequence[Reading]) -> Chart:
    where, end = np.arange(len(FIXED)), len(FIXED) - 0.4
    return Chart(
        name="kendall_tau",
        title="Agreement with fixed orders",
        caption="Kendall's tau, mean over the texts with its 95% interval: 1 is that order, -1 its "
        "reverse, 0 what a random order is expected to have. Blocks are ties (tau-b), so that 1 is "
        "out of reach there: an order that follows them comes near.",
        x="fixed order",
        y="Kendall's tau-b",
        series=[Series(r.name, where, list(taus(r).values())) for r in readings],
        references=[Reference("random order", np.zeros(2), np.array([-0.6, end]))],
        categories=list(FIXED),
    )


def _entropy_chart(readings: Sequence[Reading]) -> Chart:
    series = []
    for r in readings:
        ends = np.quantile(r.found.entropy_BL[r.counted_NL], np.linspace(0, 1, BINS + 1))
        series.append(binned(r.name, r.found.entropy_BL, r.rank_NL, r.counted_NL, np.unique(ends)))
    return Chart(
        name="rank_by_entropy",
        title="Reveal rank by uncertainty",
        caption="A rising line: what the network is sure of comes first. Token entropy when the "
        "token is revealed, in tenths of the tokens, each at its mean.",
        x="token entropy (nats)",
        y="reveal rank (0 first, 1 last)",
        series=series,
    )


def _surprisal_chart(readings: Sequence[Reading]) -> Chart:
    ends = np.linspace(0, 1, BINS + 1)
    return Chart(
        name="surprisal_by_rank",
        title="Surprisal by reveal rank",
        caption="What the tokens cost that come early, in the middle and late; mean over the texts "
        "with its 95% interval.",
        x="reveal rank (0 first, 1 last)",
        y="surprisal (nats per token)",
        series=[binned(r.name, r.rank_NL, r.found.nll_BL, r.counted_NL, ends) for r in readings],
    )


def _gap_chart(readings: Sequence[Reading]) -> Chart:
    ends = np.array([0.0, max(float(r.step_NL.max()) for r in readings)])
    return Chart(
        name="order_gap",
        title="Disagreement of the forward and the reverse order",
        caption="Mean of log q - log p, an estimate of a Kullback-Leibler divergence: 0 or more in "
        "expectation, and part of the bound. Fixed orders have none.",
        x="step (tokens revealed before)",
        y="log q - log p (nats per reveal)",
        series=_by_step(readings, lambda r: r.gap_NL),
        references=[Reference("agreement", ends, np.zeros(2))],
    )


def _order_entropy_chart(readings: Sequence[Reading]) -> Chart:
    uniform = _by_step(readings, lambda r: np.log(np.maximum(r.left_NL, 1)))
    longest = max(uniform, key=lambda series: series.x[-1])
    return Chart(
        name="order_entropy",
        title="Entropy of the model's order",
        caption="How open the choice of the next position is. The line is a uniform choice among "
        "all that are masked; 0 is a fixed order.",
        x="step (tokens revealed before)",
        y="order entropy (nats)",
        series=_by_step(readings, lambda r: r.found.order_entropy_BL),
        references=[Reference("uniform: ln(remaining)", longest.x, longest.mean)],
    )


def _by_step(readings: Sequence[Reading], values: Callable[[Reading], np.ndarray]) -> list[Series]:
    """The mean over all targets of values(reading), [N, L], by step."""
    most = max(int(r.step_NL.max()) for r in readings) + 1
    ends = np.linspace(-0.5, most - 0.5, min(most, STEPS) + 1)
    return [binned(r.name, r.step_NL, values(r), r.found.targets_BL, ends) for r in readings]


def binned(
    name: str, x_NL: np.ndarray, y_NL: np.ndarray, where_NL: np.ndarray, ends: np.ndarray
) -> Series:
    """The mean of y in each bin of x, at the mean of x there; empty bins are left out.

    ends: of the bins, rising, float [bins + 1]; the last bin includes its end.
    """
    bin_NL = np.clip(np.searchsorted(ends, x_NL, side="right") - 1, 0, max(len(ends) - 2, 0))
    members = [where_NL & (bin_NL == number) for number in range(max(len(ends) - 1, 1))]
    members = [member_NL for member_NL in members if member_NL.any()]
    x = np.array([x_NL[member_NL].mean() for member_NL in members])
    return Series(name, x, [mean_where(y_NL, member_NL) for member_NL in members])


def token_rows(reading: Reading) -> Iterator[list[Any]]:
    """A row of TOKEN_HEADER for each target, text by text in order of position."""
    found, members = reading.found, classes(reading.tokens_NL, reading.counted_NL, reading.pieces)
    rank_NL, step_NL = reading.rank_NL, reading.step_NL
    numbers = [getattr(found, f"{name}_BL") for name in BY_RANK]
    for n, i in zip(*np.nonzero(found.targets_BL), strict=True):
        token = int(reading.tokens_NL[n, i])
        named = [
            next((name for name in group if members[name][n, i]), "") for group in (KINDS, BANDS)
        ]
        yield [
            *(reading.name, n, i, token, reading.pieces([token])[0]),
            *(int(reading.counted_NL[n, i]), int(step_NL[n, i]), _plain(rank_NL[n, i])),
            *(_plain(a_NL[n, i]) for a_NL in numbers),
            *named,
            int(members["capitalised"][n, i]),
        ]


TOKEN_HEADER = (
    *("run", "text", "position", "token", "piece", "counted", "step", "relative_rank", *BY_RANK),
    *("kind", "frequency", "capitalised"),
)
STEP_HEADER = (
    *("run", "step", "reveals", "log_remaining", "log_q_minus_log_p"),
    *("log_q_minus_log_p_error", *(f"{n}{e}" for n in BY_RANK for e in ("", "_error"))),
)


def step_rows(reading: Reading) -> Iterator[list[Any]]:
    """A row of STEP_HEADER for each step, means over the texts that have it."""
    found, step_NL = reading.found, reading.step_NL
    numbers = [reading.gap_NL, *(getattr(found, f"{name}_BL") for name in BY_RANK)]
    for step in range(int(step_NL.max()) + 1):
        where_NL = found.targets_BL & (step_NL == step)
        means = [mean_where(a_NL, where_NL) for a_NL in numbers]
        left = float(np.log(reading.left_NL[where_NL]).mean())
        pairs = [value for mean in means for value in mean[:2]]
        yield [reading.name, step, int(where_NL.sum()), *map(_plain, (left, *pairs))]


def _plain(value: Any) -> float:
    """Six digits: more than float32 means."""
    return float(f"{float(value):.6g}")
