"""Weights that change in the course of a fit: `pvi.schedules`.

A schedule is a value: a function of how many steps or epochs are done. Use one wherever a weight is
expected, `pvi.ELBO(beta=pvi.schedules.linear(50, unit="epoch"))`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pvi.errors import ObjectiveError

Unit = Literal["step", "epoch"]


@dataclass(frozen=True)
class Schedule:
    """A weight as a function of time t, counted in steps or epochs from 0.

    Args:
        text: what to print.
        shape: from t to the weight.
        length: when it has come to its end; a fit that ends sooner warns.
        unit: of t. Epochs are counted in fractions: after half of the batches it is 0.5.
    """

    text: str
    shape: Callable[[float], float]
    length: float = 0.0
    unit: Unit = "step"

    def at(self, step: int = 0, epoch: float = 0.0) -> float:
        """The weight after so many steps, or epochs."""
        return self.shape(step if self.unit == "step" else epoch)

    def __str__(self) -> str:
        return self.text


def constant(value: float) -> Schedule:
    """Always `value`.

    >>> constant(0.5).at(step=7)
    0.5
    """
    _check(value=value)
    return Schedule(f"{value:g}", _Line(value, value, 0.0, 1.0))


def linear(
    length: float, start: float = 0.0, end: float = 1.0, *, delay: float = 0.0, unit: Unit = "step"
) -> Schedule:
    """From `start` to `end` along a line of `length` steps or epochs (Bowman et al. 2016).

    $$w(t) = s + (e - s) \\min\\{1, \\max\\{0, (t - d) / \\ell\\}\\}$$

    Args:
        length: how long the weight rises, in steps or epochs.
        delay: how long it stays at `start` before.

    Raises:
        ObjectiveError: a length or weight that makes no sense.

    >>> [linear(100).at(step=t) for t in (0, 50, 200)]
    [0.0, 0.5, 1.0]
    """
    _check(length=length, start=start, end=end, delay=delay, unit=unit)
    text = f"linear {start:g} to {end:g} in {length:g} {unit}s"
    return Schedule(text, _Line(start, end, delay, length), delay + length, unit)


def sigmoid(
    length: float,
    start: float = 0.0,
    end: float = 1.0,
    *,
    steepness: float = 10.0,
    unit: Unit = "step",
) -> Schedule:
    """From `start` to `end` along a logistic curve, steepest in the middle (Bowman et al. 2016).

    $$w(t) = s + (e - s) \\frac{\\sigma(c (t/\\ell - 1/2)) - \\sigma(-c/2)}
    {\\sigma(c/2) - \\sigma(-c/2)}, \\quad 0 \\le t \\le \\ell$$
    so that both ends are reached exactly.

    Args:
        steepness: c.

    >>> [round(sigmoid(100).at(step=t), 3) for t in (0, 20, 50, 100, 200)]
    [0.0, 0.041, 0.5, 1.0, 1.0]
    """
    _check(length=length, start=start, end=end, unit=unit)
    if not steepness > 0:
        raise ObjectiveError(f"steepness must be > 0, got {steepness!r}")
    text = f"sigmoid {start:g} to {end:g} in {length:g} {unit}s"
    return Schedule(text, _Sigmoid(start, end, length, steepness), length, unit)


def cyclical(
    period: float,
    start: float = 0.0,
    end: float = 1.0,
    *,
    cycles: int = 4,
    ramp: float = 0.5,
    unit: Unit = "step",
) -> Schedule:
    """`cycles` times: a line from `start` to `end`, then level; after that `end` (Fu et al. 2019).

    Args:
        period: length of one cycle, in steps or epochs.
        ramp: share of a cycle in which the weight rises.

    >>> [cyclical(100, cycles=2).at(step=t) for t in (0, 25, 60, 100, 150, 300)]
    [0.0, 0.5, 1.0, 0.0, 1.0, 1.0]
    """
    _check(length=period, start=start, end=end, unit=unit)
    if not isinstance(cycles, int) or cycles < 1:
        raise ObjectiveError(f"cycles must be a whole number >= 1, got {cycles!r}")
    if not 0 < ramp <= 1:
        raise ObjectiveError(f"ramp must be in (0, 1], got {ramp!r}")
    text = f"cyclical {start:g} to {end:g}, {cycles} times {period:g} {unit}s"
    shape = _Cycles(_Line(start, end, 0.0, ramp * period), period, cycles)
    return Schedule(text, shape, (cycles - 1 + ramp) * period, unit)


@dataclass(frozen=True)
class _Line:
    start: float
    end: float
    delay: float
    length: float

    def __call__(self, t: float) -> float:
        share = min(1.0, max(0.0, (t - self.delay) / self.length))
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class _Sigmoid:
    start: float
    end: float
    length: float
    steepness: float

    def __call__(self, t: float) -> float:
        half = math.tanh(self.steepness / 4)  # sigma(c) is (1 + tanh(c / 2)) / 2
        along = min(1.0, max(0.0, t / self.length)) - 0.5
        share = 0.5 * (1 + math.tanh(self.steepness * along / 2) / half)
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class _Cycles:
    line: _Line
    period: float
    cycles: int

    def __call__(self, t: float) -> float:
        return self.line(t % self.period) if t < self.cycles * self.period else self.line.end


def _check(unit: str = "step", **numbers: float) -> None:
    """Refuse what is no weight or no length."""
    for name, value in numbers.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf or (name == "length" and value == 0):
            least = "> 0" if name == "length" else ">= 0"
            raise ObjectiveError(f"{name} must be a finite number {least}, got {value!r}")
    if unit not in ("step", "epoch"):
        raise ObjectiveError(f"unit must be 'step' or 'epoch', got {unit!r}")
