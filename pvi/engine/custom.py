"""What a gradient of the user's own is given: log weights and densities of the draws.

The two places where an objective takes a function are `mean` (how log weights become a bound) and
`gradient` (what is differentiated in its place).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvi.engine.bounds import Inner, Scope, fold
from pvi.engine.gradients import density
from pvi.engine.terms import Term, Terms
from pvi.engine.traces import Program


@dataclass(frozen=True)
class WeightedDraws:
    """The draws of one bound, for a gradient of your own.

    A gradient is a function of these that returns a scalar loss, or several by name to be added and
    recorded; only its gradient counts, since the value reported is that of the objective. Draws are
    reparameterised where they can be, unless the function has `detach_draws = True`.

    Args:
        log_w: log p - log q, `(K, *plates)`, nats, with gradients. Scales of the user are inside
            where they differ between sites; a common one is part of `size`.
        log_p: its part log p.
        log_q: the log density that the weighted draws follow, without scales and masks.
        size: what the sum over plates is multiplied by (N / B under subsampling).
        outer: log p - log q of what is drawn once per bound, a scalar.
        outer_sites: those of its terms that the guide draws.
        terms: site by site.
        model, guide, args, kwargs: what was run.
    """

    log_w: Tensor
    log_p: Tensor
    log_q: Tensor
    size: float
    outer: Tensor
    outer_sites: tuple[Term, ...]
    terms: Terms
    model: Program
    guide: Program
    args: tuple
    kwargs: Mapping[str, Any]


Losses = Tensor | Mapping[str, Tensor]
GradientRule = Callable[[WeightedDraws], Losses]


def weighted(
    terms: Terms, inner: Inner, outer: Tensor, scope: Scope, programs: tuple
) -> WeightedDraws:
    """Gather what a `GradientRule` needs."""
    model, guide, args, kwargs = programs
    drawn = [t for t in terms if t.log_q is not None]
    inside = [t for t in drawn if t.name not in scope.outer]
    nothing = torch.zeros_like(inner.log_w)
    log_q = sum((fold(density(t), t, scope) for t in inside), start=nothing)
    subtracted = sum((fold(_weighed(t, inner), t, scope) for t in inside), start=nothing)
    return WeightedDraws(
        log_w=inner.log_w,
        log_p=inner.log_w + subtracted,
        log_q=log_q,
        size=inner.size,
        outer=outer,
        outer_sites=tuple(t for t in drawn if t.name in scope.outer),
        terms=terms,
        model=model,
        guide=guide,
        args=args,
        kwargs=kwargs,
    )


def _weighed(term: Term, inner: Inner) -> Tensor:
    """log q as it stands in the log weight."""
    return term.guide_density() * term.scale_q if inner.scaled else term.guide_density()
