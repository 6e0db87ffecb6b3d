"""L-BFGS that keeps to where the function is finite, a step at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY = 20  # pairs of steps and gradients that stand for the curvature
Differentiable = Callable[[Tensor], tuple[float, Tensor]]


@dataclass(frozen=True)
class Point:
    """A point of a search.

    Args:
        x, value, gradient: where, and the function there.
        evaluations: of the function, until now.
    """

    x: Tensor
    value: float
    gradient: Tensor
    evaluations: int

    @property
    def steepness(self) -> float:
        """The largest entry of the gradient."""
        return float(self.gradient.abs().max())

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value) and bool(self.gradient.isfinite().all())


class Search:
    """Minimise a smooth function of a vector by L-BFGS with a strong Wolfe line search.

    Where the function is not finite there is a wall: the line search turns back. A search that has
    failed goes on from its best point without its memory.

    Args:
        f: value and gradient at a point `(n)`.
        start: a point where both are finite, or the search ends at once.

    Reference:
        Liu and Nocedal 1989.

    >>> f = lambda x: (float((x - 1.0).square().sum()), 2.0 * (x - 1.0))
    >>> bool((Search(f, torch.zeros(3)).run(1e-6).x - 1.0).abs().max() < 1e-6)
    True
    """

    def __init__(self, f: Differentiable, start: Tensor):
        self._f = f
        self._evaluations = 0
        self._last: Point | None = None
        self.best = self._at(start.detach().clone())
        self._begin()

    def run(
        self,
        tolerance: float,
        max_iter: int = 500,
        after: Callable[[Point], None] = lambda point: None,
    ) -> Point:
        """Search until no entry of the gradient is above `tolerance`; return the best point.

        Args:
            after: called with the best point after each iteration.
        """
        fresh = True
        for _ in range(max_iter):
            if not self.best.is_finite or self.best.steepness <= tolerance:
                break
            before = self.best.value
            self._step()
            after(self.best)
            if before - self.best.value > 1e-12 * (1.0 + abs(before)):
                fresh = False
            elif fresh:
                break  # no way down, not even along the gradient
            else:
                self._begin()
                fresh = True
        return self.best

    def _begin(self) -> None:
        self._x = self.best.x.clone().requires_grad_()
        self._optimizer = torch.optim.LBFGS(
            [self._x],
            max_iter=1,
            max_eval=25,
            history_size=MEMORY,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

    def _step(self) -> None:
        self._optimizer.step(self._closure)  # type: ignore[arg-type]

    def _closure(self) -> Tensor:
        point = self._at(self._x.detach())
        if not point.is_finite:
            self._x.grad = torch.zeros_like(self._x)
            return self._x.new_tensor(self.best.value + 10.0 * (1.0 + abs(self.best.value)))
        if point.value < self.best.value:
            self.best = point
        self._x.grad = point.gradient.clone()
        return self._x.new_tensor(point.value)

    def _at(self, x: Tensor) -> Point:
        """The function at a point, once where it is asked for twice in a row."""
        if self._last is None or not torch.equal(self._last.x, x):
            value, gradient = self._f(x)
            self._evaluations += 1
            self._last = Point(x.clone(), value, gradient, self._evaluations)
        return self._last
