"""Draws chosen by their PSIS weights, so that they follow the posterior and not the guide."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pvi.engine.numbers import whole_number
from pvi.errors import DataError, GuideError
from pvi.posterior.draws import Run, Runner
from pvi.posterior.psis import PSIS, khat_threshold, psis

if TYPE_CHECKING:
    from pvi.posterior.posterior import Posterior

CANDIDATES = 10  # draws of the guide for one that is kept


def check_correct(correct: str | None) -> None:
    """Refuse what `correct=` can't be."""
    if correct not in (None, "psis"):
        raise DataError(f'correct must be None or "psis", got {correct!r}')


def choose(
    posterior: "Posterior", num_draws: int, seed: int, beside: Runner | None = None
) -> tuple[PSIS, Tensor]:
    r"""The weights of `10 num_draws` candidates, and which of them are kept, `(num_draws,)`.

    Systematic resampling: with :math:`u \sim U(0, 1)`, those at which the running sum of the
    weights passes :math:`(u + i) / N`. Draw s is kept :math:`N w_s` times on average, and at most
    once more or less. Without replacement the heaviest draws would come too seldom.

    Args:
        beside: as in `Runner.runs` and `chosen_runs`, since it changes what is drawn.

    Raises:
        ObjectiveError: the log weights mean nothing here.
        GuideError: khat is above the threshold.
    """
    total = CANDIDATES * whole_number("num_draws", num_draws, error=DataError)
    posterior.check_weights()
    with posterior.drawing(seed) as runner:
        parts = [run.draws() for run in runner.runs(total, beside)]
    found = psis(torch.cat([draws.log_p - draws.log_q for draws in parts]).cpu())
    limit = khat_threshold(total)
    if not found.khat < limit:
        raise GuideError(
            f'correct="psis": khat is {found.khat:.2f} at {total:,} draws, and weights are usable '
            f"below {limit:.2f}: the guide is too far from the posterior. Take a richer guide "
            "(pvi.guides.FullRank, Flow), or leave correct= out and read fit.diagnose()."
        )
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    points = (torch.arange(num_draws, dtype=torch.float64) + start) / num_draws
    passed = found.log_weights.exp().cumsum(0)
    return found, torch.searchsorted(passed, points).clamp(max=total - 1)


def chosen_runs(
    runner: Runner, num_draws: int, chosen: Tensor | None, beside: Runner | None = None
) -> Iterator[tuple[Run, Tensor | slice]]:
    """Runs, and which of their draws are kept: all, or those of `chosen` in ascending order."""
    if chosen is None:
        for run in runner.runs(num_draws, beside):
            yield run, slice(None)
        return
    start = 0
    for run in runner.runs(CANDIDATES * num_draws, beside):
        inside = chosen[(chosen >= start) & (chosen < start + run.num)] - start
        start += run.num
        if len(inside):
            yield run, inside
