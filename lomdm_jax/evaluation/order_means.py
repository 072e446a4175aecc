"""Reveal ranks, and means over texts with their standard errors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lomdm_jax.evaluation.likelihood import ratio


class Mean(NamedTuple):
    """A mean, its standard error over texts, and how many values are in it."""

    mean: float
    standard_error: float
    values: int


def mean_where(values_NL: np.ndarray, where_NL: np.ndarray) -> Mean:
    """Of the values of N texts at the places where_NL, bool; nan if there are none."""
    count = int(where_NL.sum())
    if not count:
        return Mean(float("nan"), float("nan"), 0)
    sums_N = np.sum(values_NL, axis=-1, where=where_NL)
    return Mean(*ratio(sums_N, where_NL.sum(axis=-1)), count)


def mean_of(values_N: np.ndarray) -> Mean:
    """Of one value for each text, float [N]; nan is none."""
    return mean_where(values_N[:, None], ~np.isnan(values_N)[:, None])


def relative_rank(rank_NL: np.ndarray, counted_NL: np.ndarray) -> np.ndarray:
    """Reveal rank among the counted positions, 0 first and 1 last; nan elsewhere, float [N, L].

    rank_NL: int or float; equal ranks share their mean.
    """
    rank_NL = stats.rankdata(np.where(counted_NL, rank_NL, np.nan), nan_policy="omit", axis=-1) - 1
    count_N1 = counted_NL.sum(axis=-1, keepdims=True)
    return np.where(counted_NL, rank_NL / np.maximum(count_N1 - 1, 1), np.nan)


def kendall_tau(rank_NL: np.ndarray, counted_NL: np.ndarray, reference_L: np.ndarray) -> np.ndarray:
    """Kendall's tau-b between the ranks of the counted positions and a reference order, which may
    have ties, float [N]; nan for texts where either is constant."""
    return np.array(
        [
            correlation(stats.kendalltau, reference_L[counted_L], rank_L[counted_L], 2)
            for rank_L, counted_L in zip(rank_NL, counted_NL, strict=True)
        ]
    )


def correlation(
    measure: Callable[..., Any], x: np.ndarray, y: np.ndarray, fewest: int = 3
) -> float:
    """measure(x, y), one of scipy.stats; nan where one is constant, or of fewer values."""
    if len(x) < fewest or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(measure(x, y).statistic)
