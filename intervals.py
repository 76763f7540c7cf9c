"""The 95 % intervals of shares and means that stand beside every score.

Imports numpy only, so that a report is made without torch. Used by scoring and report_page.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

QUANTILE = 1.959963984540054  # of the standard normal distribution at 97.5 %
RESAMPLES = 2000


def wilson_interval(right: int, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion; (0, 1) of nothing.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference
    """
    if not of:
        return 0.0, 1.0
    share, squared = right / of, QUANTILE**2
    middle = share + squared / (2 * of)
    half = QUANTILE * math.sqrt(share * (1 - share) / of + squared / (4 * of**2))
    low, high = ((middle + sign * half) / (1 + squared / of) for sign in (-1, 1))
    return (low if right > 0 else 0.0), (high if right < of else 1.0)


def bootstrap_interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of sum(sums) / sum(counts) where whole tasks are drawn with replacement; (0, 1) of none.

    One entry of both per task. The resamples are the same in every call.
    """
    if not len(sums):
        return 0.0, 1.0
    weights = _resamples(len(sums))
    low, high = np.quantile((weights @ np.asarray(sums, float)) / (weights @ np.asarray(counts, float)), (0.025, 0.975))
    return float(low), float(high)


@functools.lru_cache(maxsize=4)
def _resamples(tasks: int) -> np.ndarray:
    """Return how often each task is drawn in each resample, [RESAMPLES, tasks]."""
    return np.random.default_rng(0).multinomial(tasks, np.full(tasks, 1 / tasks), RESAMPLES).astype(float)
