"""How far a session gets in its time: the pace of its batches, what a validation takes, and where --max-hours ends it.

Imports the standard library only. Used by the driver.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

SETTLING = 5  # first batches of a session, which fill caches, do not count
FORECAST_AFTER = 30  # batches after which the pace is taken for known
RECENT = 200  # batches whose mean the pace is
RESERVE = 1.1  # times the seconds that a validation took are kept for the last one


class Pace:
    """How long the batches of a session take."""

    def __init__(self) -> None:
        self.count = 0
        self._recent: deque[float] = deque(maxlen=RECENT)

    def add(self, seconds: float) -> None:
        """Count one batch."""
        self.count += 1
        if self.count > SETTLING:
            self._recent.append(seconds)

    @property
    def is_known(self) -> bool:
        """Return whether enough batches were counted."""
        return self.count >= FORECAST_AFTER

    @property
    def seconds(self) -> float:
        """Return the mean seconds of a batch, 0 where none was counted."""
        return math.fsum(self._recent) / max(len(self._recent), 1)


@dataclass(frozen=True)
class Costs:
    """What the rest of a run takes: seconds of an epoch's batches and of a validation, which comes after every
    `eval_every`-th of all `epochs` and after the last one."""

    epoch: float
    validation: float
    eval_every: int
    epochs: int

    def seconds_from(self, progress: float) -> float:
        """Return the seconds from `progress` (in epochs) to the end of the last epoch, its validation included."""
        done = math.floor(progress)
        validations = sum(self._is_validated(epoch) for epoch in range(done, self.epochs))
        return (self.epochs - progress) * self.epoch + validations * self.validation

    def reached_after(self, progress: float, seconds: float) -> float:
        """Return where in the run (in epochs, at most `epochs`) training stands after so many seconds more."""
        while progress < self.epochs:
            whole = math.floor(progress) + 1
            training = (whole - progress) * self.epoch
            if training >= seconds:
                return progress + max(seconds, 0.0) / self.epoch
            seconds -= training + self._is_validated(whole - 1) * self.validation
            progress = float(whole)
        return progress

    def _is_validated(self, epoch: int) -> bool:
        return (epoch + 1) % self.eval_every == 0 or epoch + 1 == self.epochs
