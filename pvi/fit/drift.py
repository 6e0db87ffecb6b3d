"""Were the parameters still on their way when training ended? Look further along their path.

In a narrow valley each step gains less than the noise of the bound, so a level history proves
nothing. But the steps add up: from the middle of the fit to its end they point along the valley.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean, stdev

import torch
from torch import Tensor

FURTHER = (0.5, 2.0, 8.0)  # multiples of the way from the middle to the end
REPEATS = 24
NEGLIGIBLE = 0.1  # nats


class Path:
    """Where the parameters were about halfway, whenever training ends."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, dict[int, Tensor]]] = []

    def pass_by(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Remember the parameters at steps 64, 128, 256, ..., the last two of them."""
        if step >= 64 and step & (step - 1) == 0:
            values = {id(p): p.detach().clone() for p in leaves_in(optimizer)}
            self.kept = [*self.kept[-1:], (step, values)]

    def since_middle(self, step: int, leaves: Sequence[Tensor]) -> list[Tensor] | None:
        """The way of each parameter since then; `None` if the fit was too short to tell."""
        early = [values for at, values in self.kept if at <= 0.75 * step]
        if not early:
            return None
        return [p.detach() - early[-1].get(id(p), p.detach()) for p in leaves]


def leaves_in(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that an optimiser moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def rise_ahead(
    leaves: Sequence[Tensor], way: Sequence[Tensor], bounds: Callable[[int], Callable[[], float]]
) -> str:
    """How much the bound would gain further along `way`, as a sentence; "" if nothing.

    Args:
        leaves: the parameters at the end; they are moved and put back.
        bounds: reads the batch of a seed, and gives the bound there with the noise of that seed,
            so that differences are paired.
    """
    found: dict[float, list[float]] = {factor: [] for factor in (0.0, *FURTHER)}
    for seed in range(REPEATS):
        bound = bounds(seed)
        for factor, values in found.items():
            with _moved(leaves, way, factor):
                values.append(bound())
    for factor in FURTHER:
        gains = [b - a for a, b in zip(found[0.0], found[factor], strict=True)]
        if not all(map(math.isfinite, gains)):
            continue
        gain, error = fmean(gains), stdev(gains) / math.sqrt(REPEATS)
        if gain > max(NEGLIGIBLE, 4.0 * error):
            return (
                f"the parameters were still on their way: {factor:g} times the distance of the "
                f"second half of the fit further on, the bound is {gain:.2g} nats higher; give "
                "more steps, scale or centre the data, or use a richer guide"
            )
    return ""


@contextmanager
def _moved(leaves: Sequence[Tensor], way: Sequence[Tensor], factor: float) -> Iterator[None]:
    start = [p.detach().clone() for p in leaves]
    with torch.no_grad():
        for p, d in zip(leaves, way, strict=True):
            p.add_(d, alpha=factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(leaves, start, strict=True):
                p.copy_(value)
