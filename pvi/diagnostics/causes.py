"""Where a guide fails, each with the next step: on its way, tails, correlations, coordinates."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributions import biject_to

from pvi.diagnostics.table import MAX_DIM, ROUNDING, scalars
from pvi.posterior.psis import PSIS, tail_size

FAR = 3.0  # mean square of a standardised scalar among the heaviest draws; 1 if they are as others
REST = 0.1  # nats that the bound rises for each sd that a mean moves; about the error of the mean
RESCALED = 0.1  # of log scale
SURE = 5.0  # standard errors
LEVEL = (
    "the bound is level in the guide's location and scale: another guide helps more than more steps"
)


def at_rest(posterior: Any, values: Mapping[str, torch.Tensor], ratios: torch.Tensor) -> list[str]:
    r"""Whether the bound is level in the guide's location and overall scale, and what to do.

    For a guide q with mean m, covariance C and a free location, in unconstrained space, the bound
    rises with the mean by :math:`C^{-1} \mathrm{Cov}_q(u, \log p - \log q)`, and with the log of an
    overall scale by :math:`\mathrm{Cov}_q(u^\top C^{-1} u, \log p - \log q)`, both 0 at the optimum
    of a normal guide. So the draws tell whether the optimisation has arrived, whatever its history
    says.

    Reference:
        Opper and Archambeau (2009), The Variational Gaussian Approximation Revisited.
    """
    names, u = _unconstrained(posterior, values)
    if not names or not ratios.isfinite().all() or len(u) < 4 * len(names):
        return []
    mean, sd = u.mean(0), u.std(0)
    keep = sd > ROUNDING * mean.abs()
    names, u = [n for n, k in zip(names, keep.tolist(), strict=True) if k], u[:, keep]
    if not names:
        return []
    u = (u - u.mean(0)) / u.std(0)
    gap = (ratios - ratios.mean())[:, None]
    slope, error = _mean(gap * u)
    slope, sure = slope.abs(), slope.abs() > SURE * error
    if bool(((slope > REST) & sure).any()):
        i = int((slope * sure).argmax())
        return [
            f"not at the optimum: the bound still rises by {slope[i]:.2g} nats for each sd that "
            f"{names[i]} moves: raise steps; if that changes nothing, try another guide"
        ]
    root, failed = torch.linalg.cholesky_ex(u.T @ u / len(u))
    if int(failed):
        return []
    square = torch.linalg.solve_triangular(root, u.T, upper=False).square().sum(0)
    rise, error = _mean(gap * (square - len(names))[:, None])
    if float(rise.abs()) > max(2 * len(names) * RESCALED, SURE * float(error)):
        how = "wide" if float(rise) < 0 else "narrow"
        return [
            f"not at the optimum: the guide is too {how}, and the bound rises by "
            f"{float(rise.abs()) / 10:.2g} nats for each 10 % of scale: raise steps"
        ]
    return [LEVEL]


def _mean(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means `(D,)` of `(S, D)` and their standard errors."""
    return x.mean(0), x.std(0) / math.sqrt(len(x))


def _unconstrained(
    posterior: Any, values: Mapping[str, torch.Tensor]
) -> tuple[list[str], torch.Tensor]:
    """The continuous latents' numbers where they have no bounds, `(S, D)`, and their names."""
    nodes, found = posterior.runner.model_trace.nodes, {}
    for name, value in values.items():
        try:
            moved = biject_to(nodes[name]["fn"].support).inv(value.detach().cpu().double())
        except (NotImplementedError, KeyError):  # discrete, or the guide's own
            continue
        if bool(moved.isfinite().all()):
            found[name] = moved
    return scalars(found, MAX_DIM) if found else ([], torch.empty(0, 0))


def heavy(names: list[str], x: torch.Tensor, smoothed: PSIS) -> list[str]:
    """A reason if the draws with the largest weights lie far out in one scalar."""
    top = smoothed.log_weights.topk(min(tail_size(len(x)), len(x))).indices.to(x.device)
    mean, sd = x.mean(0), x.std(0)
    far = (((x[top] - mean) / sd) ** 2).mean(0).nan_to_num(0.0, posinf=0.0)
    i = int(far.argmax())
    if far[i] < FAR:
        return []
    side = "both sides" if abs(float((x[top, i] - mean[i]).mean() / sd[i])) < 1 else "one side"
    return [
        f"the largest weights lie at extreme values of {names[i]}, on {side}, {far[i].sqrt():.1f} "
        f"guide sds out: its tail is too light there; try pvi.guides.Flow, or another scale for it"
    ]


def correlated(names: list[str], x: torch.Tensor, smoothed: PSIS) -> list[str]:
    r"""A reason if two scalars correlate under the weights but not in the guide.

    A weighted correlation r counts where :math:`|r| > \max(0.5, 5/\sqrt{\text{ESS}})`, which keeps
    chance correlations among a few heavy draws out, and the guide's differs by over :math:`|r|/2`.
    """
    guide = _correlation(x, torch.full((len(x),), 1 / len(x), dtype=x.dtype))
    weighted = _correlation(x, smoothed.log_weights.exp())
    strong = weighted.abs() > max(0.5, 5 / math.sqrt(smoothed.ess))
    gap = (weighted - guide).abs() * strong
    gap *= gap > weighted.abs() / 2
    if not gap.any():
        return []
    i, j = sorted(divmod(int(gap.argmax()), len(names)))
    return [
        f"joint statements are off: {names[i]} and {names[j]} correlate {weighted[i, j]:+.2f} "
        f"under the weights but {guide[i, j]:+.2f} in the guide: try pvi.guides.FullRank"
    ]


def centred(posterior: Any) -> list[str]:
    """A reason if latents are told in coordinates that make funnels."""
    sites = posterior.dependent_latents()
    if not sites:
        return []
    return [
        f"the location or scale of '{sites[0]}' depends on another latent, which makes funnels "
        "where the data say little: try pvi.fit(..., reparam='noncentered')"
    ]


def _correlation(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Correlations `(D, D)` of draws `(S, D)` under weights `(S,)`; 0 where an sd is 0."""
    mean = w @ x
    x = x - mean
    covariance = (w[:, None] * x).T @ x
    sd = covariance.diagonal().sqrt()
    precision = torch.where(sd > ROUNDING * mean.abs(), 1 / sd, 0.0)
    return covariance * torch.outer(precision, precision)
