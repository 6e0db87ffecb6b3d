"""From terms to a bound: how log weights are averaged, over particles and within plates.

$$L_\\alpha = \\frac{1}{1-\\alpha} \\log \\frac1K \\sum_k w_k^{1-\\alpha},
\\qquad L_1 = \\frac1K \\sum_k \\log w_k$$

alpha = 1 is the ELBO, alpha = 0 the importance-weighted bound (Burda, Grosse, Salakhutdinov 2016),
other values Renyi bounds (Li and Turner 2016). Latents that factorise over a plate are weighted
datum by datum inside it, so that subsampling scales the bound and never the weights.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pvi.engine.terms import Term, Terms, Weight
from pvi.engine.traces import Plate
from pvi.errors import ObjectiveError

NEGLIGIBLE = 46.0  # nats: a share of 1e-20
Mean = Callable[[Tensor], Tensor]
Order = float | Mean  # alpha, or a mean of log weights over the particles of the user's own


@dataclass(frozen=True)
class Scope:
    """What is weighted together: the plates over which it factorises, and what stays outside.

    Args:
        plates: weights are formed separately for every element of these plates; empty = jointly.
        outer: latents drawn once for all particles, and observations that do not depend on the
            rest.
    """

    plates: frozenset[str] = frozenset()
    outer: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"per element of {', '.join(sorted(self.plates))}" if self.plates else "joint"


def renyi_mean(log_w: Tensor, order: Order) -> Tensor:
    """Order-alpha mean of log weights over particles: `(K, *plates) -> (*plates)`, nats."""
    if callable(order):
        value = order(log_w)
        if not isinstance(value, Tensor) or value.shape != log_w.shape[1:]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ObjectiveError(
                f"mean= must turn log weights of shape {tuple(log_w.shape)} into "
                f"{tuple(log_w.shape[1:])}, one value for each element of the plates; got {got}. "
                "Reduce over dimension 0 only."
            )
        return value
    if order == 1.0:
        return log_w.mean(0)
    power = 1.0 - order
    return (torch.logsumexp(raised(power * log_w), 0) - math.log(len(log_w))) / power


def raised(log_w: Tensor) -> Tensor:
    """Log weights `(K, *plates)`, the lowest at 46 below the highest: shares below 1e-20.

    In a mean they make no difference, but gradients times them are denormal numbers, which make
    matrix products several times slower.
    """
    return torch.maximum(log_w, log_w.detach().amax(0) - NEGLIGIBLE)


@dataclass(frozen=True)
class Inner:
    """The weighted part of a bound: log weights `(K, *plates)` and the factor outside the mean.

    Args:
        scaled: whether the user's scales are inside the weights, because they differ.
    """

    log_w: Tensor
    size: float
    scaled: bool = False

    def value(self, order: Order) -> Tensor:
        return self.size * renyi_mean(self.log_w, order).sum()


@dataclass(frozen=True)
class Parts:
    """A bound's value, a scalar, its weighted part if it has one, and what stands outside.

    Args:
        recorded: what a weighting rule has to record, by name.
    """

    value: Tensor
    inner: Inner | None = None
    outer: Tensor = field(default_factory=lambda: torch.zeros(()))
    recorded: Mapping[str, Tensor] = field(default_factory=dict)


def split(terms: Terms, weight: Weight, scope: Scope) -> tuple[Tensor, Inner | None]:
    """ELBO terms of the outer sites as a scalar, and the inner ones as log weights; nats."""
    analytic = [t.name for t in terms if t.kind == "analytic"]
    if analytic:
        raise ObjectiveError(
            f"pvi.kl '{analytic[0]}' is a term of the ELBO: importance weights need a draw and its "
            "densities. Use pvi.ELBO with a built-in gradient, or sample the latent."
        )
    inner = [t for t in terms if t.name not in scope.outer]
    outer = [t for t in terms if t.name in scope.outer]
    total = sum((t.per_particle(weight(t)).mean() for t in outer), start=torch.zeros(()))
    if not inner:
        return total, None
    check_subsampling(inner, scope)
    scale = common_scale(inner)
    parts = [fold(t.log_ratio(weight(t), scaled=scale is None), t, scope) for t in inner]
    log_w = parts[0]
    for part in parts[1:]:
        log_w = log_w + part
    size = math.prod(p.scale for p in inner[0].plates if p.name in scope.plates)
    return total, Inner(log_w, size * (1.0 if scale is None else scale), scale is None)


def fold(x: Tensor, term: Term, scope: Scope, depth: int = 0) -> Tensor:
    """Sum a term's tensor `(K, *batch)` over all plates but the scope's: `(K, *plates)`.

    Args:
        depth: plate dimensions to keep room for, where the term lacks some of the scope's plates.
    """
    keep = {p.dim for p in term.plates if p.name in scope.plates and p.dim is not None}
    dims = [d for d in range(1 - x.dim(), 0) if d not in keep]
    x = x.sum(dims, keepdim=True) if dims else x
    own = -min(keep, default=0)
    return x.reshape(x.shape[0], *[1] * (depth - own), *x.shape[x.dim() - own :])


def common_scale(terms: list[Term]) -> float | None:
    """The user's scale if it is one number for all of these terms, else `None`."""
    scales = [t.scale_p for t in terms if t.log_p is not None]
    scales += [t.scale_q for t in terms if t.log_q is not None]
    if not scales:
        return 1.0
    first = scales[0]
    if isinstance(first, Tensor) or any(isinstance(s, Tensor) or s != first for s in scales):
        return None
    return float(first)


def check_subsampling(inner: list[Term], scope: Scope) -> None:
    """Refuse weights that would be raised to the power full_size / size of a subsampled plate."""
    for term in inner:
        for plate in term.plates:
            if plate.scale != 1.0 and plate.name not in scope.plates:
                raise ObjectiveError(_subsampling_message(term, plate, scope))


def _subsampling_message(term: Term, plate: Plate, scope: Scope) -> str:
    return (
        f"plate '{plate.name}' is subsampled ({plate.size} of {plate.full_size}) at site "
        f"'{term.name}', but the weights are formed {scope.name}: scaling inside the weights gives "
        "a value that exceeds the evidence. Put every weighted latent inside that plate, fit on "
        "all the data, or use pvi.ELBO with a built-in gradient."
    )
