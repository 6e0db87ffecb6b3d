"""When to lower the learning rate, and when to stop."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

FLOOR = 1e-3  # the last learning rate, as a share of the first
LAST = 200  # steps at the end, at next to no rate, whose bounds are those of the parameters kept


def cosine(step: int, steps: int) -> float:
    """Factor on the learning rate at `step` of `steps`: from 1 down to `FLOOR` along half a cosine.

    >>> cosine(0, 100), round(cosine(100, 100), 6)
    (1.0, 0.001)
    """
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * min(step / steps, 1.0)))


def still_rising(bounds: Sequence[float]) -> str:
    """Whether the last tenth of the steps is above the tenth before by three standard errors.

    Returns:
        What to read, with the difference in nats and the next step, or "" if the bound was level.
    """
    tenth = len(bounds) // 10
    if tenth < 5:
        return f"{len(bounds)} steps are too few to tell whether the bound was level; raise steps"
    last, last_square = _center(bounds[-tenth:])
    before, before_square = _center(bounds[-2 * tenth : -tenth])
    rise = last - before
    if rise <= 3.0 * math.sqrt(last_square + before_square):
        return ""
    return f"the bound still rose by {rise:.2g} nats over the last {tenth} steps; raise steps"


def _center(values: Sequence[float]) -> tuple[float, float]:
    """Median and its squared standard error (by the median deviation: bounds have heavy tails)."""
    center = median(values)
    sd = 1.4826 * median(abs(v - center) for v in values)
    return center, 0.5 * math.pi * sd**2 / len(values)


@dataclass
class Plateau:
    """Lower the rate when the bound stops rising, and stop when the rate is at its floor.

    Training runs in stages of `length` steps. A stage whose mean bound is not above that of the
    best
    stage before, at this rate, by two standard errors of their difference is a plateau: the rate is
    multiplied by `shrink`. After the plateau at the floor, the fit has converged.

    Args:
        length: steps in a stage.
        shrink: factor on the rate at a plateau.
    """

    length: int = 200
    shrink: float = 0.3
    factor: float = 1.0
    converged: bool = False
    _values: list[float] = field(default_factory=list)
    _best: tuple[float, float] | None = None  # median and squared standard error

    def update(self, bound: float) -> float:
        """Take one step's bound; return the factor for the next step."""
        self._values.append(bound)
        if len(self._values) == self.length:
            center, square = _center(self._values)
            self._values = []
            if self._best and center - self._best[0] < 2.0 * math.sqrt(square + self._best[1]):
                self._lower()
            elif self._best is None or center > self._best[0]:
                self._best = center, square
        return self.factor

    def state(self) -> dict[str, Any]:
        """What changes in training, as plain data."""
        changing = {"factor": self.factor, "converged": self.converged}
        return changing | {"values": list(self._values), "best": self._best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier `state`."""
        self.factor, self.converged = state["factor"], state["converged"]
        self._values, self._best = list(state["values"]), state["best"]

    def _lower(self) -> None:
        self._best = None
        self.converged = self.factor <= FLOOR
        self.factor = max(self.factor * self.shrink, FLOOR)

    @property
    def stages_left(self) -> int:
        """The fewest stages that remain."""
        return 2 * (1 + math.ceil(max(math.log(FLOOR / self.factor) / math.log(self.shrink), 0.0)))


@dataclass
class Stages:
    """Stages of one rate and growing length, until averages over them are no better than before.

    Each stage is twice as long as the one before. Its rate is half of it if the parameters had come
    to rest around the optimum there. With rates that fall as lengths grow, the error of the
    averages falls as one over the number of steps, so that the gain of a stage over the stage
    before is about what there is still to gain. Once it is below `tolerance`, a stage of a quarter
    of the rate has to confirm that.

    Args:
        length: steps in the first stage.
        limit: steps in all.
        tolerance: nats.
        start: steps before the first stage.

    Reference:
        Hazan and Kale 2014 (epoch gradient descent); Welandawe et al. 2022 (rates and averages).
    """

    length: int
    limit: int
    tolerance: float
    start: int = 0
    factor: float = 1.0
    gain: float = math.inf
    lowered: bool = False
    ended: bool = False
    converged: bool = False

    @property
    def end(self) -> int:
        """The step at which this stage ends."""
        return min(self.start + self.length, max(self.limit - LAST, self.start + 1))

    @property
    def finished(self) -> int | None:
        """The step after which training is over, once that is known."""
        return min(self.start + LAST, self.limit) if self.ended else None

    def judge(self, gain: float, error: float, moving: bool) -> None:
        """Set the next stage after one.

        Args:
            gain: of its best parameters over the best before, nats.
            error: standard error of that.
            moving: whether the parameters were still on their way.
        """
        self.start, self.gain = self.end, gain
        small = math.isfinite(gain) and gain <= max(self.tolerance, 2.0 * error)
        self.converged = small and self.lowered
        self.ended = self.converged or self.start >= self.limit - LAST
        self.lowered = small or not moving
        self.length = max(self.length // 2, 1) if small else 2 * self.length
        if self.ended:
            self.factor *= FLOOR
        elif self.lowered:
            self.factor *= 0.25 if small else 0.5

    def state(self) -> dict[str, Any]:
        """What changes in training, as plain data."""
        return vars(self).copy()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier `state`."""
        vars(self).update(state)
