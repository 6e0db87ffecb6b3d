"""Covariances by linear response: what a factorised guide says of them without having them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from pvi.engine.params import Params
from pvi.engine.traces import preserved_rng
from pvi.errors import FitError
from pvi.fit.deterministic import smooth_density
from pvi.fit.double import doubled, in_double
from pvi.fit.fixed_draws import FAMILIES, FixedDraws, Moments
from pvi.guides import FullRank
from pvi.guides.mean_field import NormalGuide
from pvi.guides.summaries import is_elementwise
from pvi.posterior import Posterior

NUM_DRAWS, LARGEST = 1024, 3000
NODES = 64  # of Gauss and Hermite's rule
NEWTON, STEP, CLOSE = 50, 1.0, 1e-6  # steps of Newton's method, the longest, the last error in sds


def linear_response(posterior: Posterior, num_draws: int = NUM_DRAWS) -> Posterior:
    """The posterior with the guide's means, and covariances by linear response.

    The means of the optimal guide move when the log density is tilted by $t^\\top g$, and how they
    move is an estimate of the covariance, better than that of the guide, which may have none:
    $\\mathrm{Cov}(g) = d\\,E_{q^*}[g]/dt$ (see `FixedDraws.response`). It is exact for a Gaussian
    posterior. g are the numbers of the sites in the model's own space, and in unconstrained space
    those of sites such as simplexes, whose map mixes them: the logarithm of a scale has another
    tail than the scale.

    Args:
        posterior: of a fit with one of the normal guides, at the optimum.
        num_draws: fixed draws over which the bound is differentiated twice; fewer, at least 64,
            where the model is large.

    Returns:
        A posterior like any other, with a `FullRank` guide in unconstrained space. Its draws have
        the guide's means, and these sds and correlations (the correlations as those of a Gaussian
        copula).

    Raises:
        FitError: another kind of guide, too many parameters, or not at a maximum of the bound.

    Reference:
        Giordano, Broderick, Jordan 2018; Giordano, Ingram, Broderick 2024, section 3.3.
    """
    guide, model = posterior.guide, posterior.model
    if not isinstance(guide, NormalGuide) or type(guide) not in FAMILIES:
        raise FitError(
            f"linear response needs a guide of pvi's normal families, such as MeanField, not "
            f"{type(guide).__name__}"
        )
    size = sum(p.numel() for p in guide.parameters())
    if size > LARGEST:
        raise FitError(
            f"linear response inverts a matrix of the guide's {size} parameters; it takes at most "
            f"{LARGEST}. Use FullRank or Structured instead."
        )
    args, kwargs = posterior.data.whole()
    corrected: Any = FullRank(model)
    with posterior._params.scope(), preserved_rng(), in_double(guide):
        density = smooth_density(model, guide.layout, doubled(args), doubled(kwargs))
        if density is None or density.left_out:
            why = density.left_out if density else "the model can't be run on float64 draws"
            raise FitError(f"linear response differentiates the ELBO twice, but {why}")
        route, values = FixedDraws(guide, density), partial(_values, guide)
        response = route.response(num_draws, values)
        sd = response.diagonal().sqrt()
        mean, spread = normal_with(values, route.moments(), sd)
        covariance = response * torch.outer(spread / sd, spread / sd)
    corrected.adopt(guide.latents.values(), args, kwargs)
    corrected.place_covariance(mean, covariance)
    params = Params(model, corrected)
    params.freeze()
    return Posterior(model, corrected, posterior.data, params=params, checked=True)


def _values(guide: NormalGuide, u: Tensor) -> Tensor:
    """The numbers of all sites in the model's space, where each is a function of one in ours."""
    layout = guide.layout
    parts = {
        name: layout.flat(latent, latent.transform(x) if is_elementwise(latent.transform) else x)
        for (name, x), latent in zip(layout.split(u).items(), layout.latents.values(), strict=True)
    }
    return layout.join(parts)


def normal_with(
    values: Callable[[Tensor], Tensor], guide: Moments, sd: Tensor
) -> tuple[Tensor, Tensor]:
    """The normals $N(m_i, s_i^2)$ whose values have the guide's means and other sds.

    Newton's method in m and log s; where there is no such normal, as of an sd that an interval has
    no room for, m stays and s is $\\mathrm{sd} / E[t']$.

    Args:
        values: elementwise, `(K, D)` to `(K, D)`.
        sd: of the values, `(D)`.

    Returns:
        m and s, `(D)` each.
    """
    nodes, weights = (torch.tensor(x).to(sd).unsqueeze(-1) for x in hermegauss(NODES))
    weights = weights / weights.sum()

    def moments(m: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
        x = values(m + log_s.exp() * nodes)
        mean = (weights * x).sum(0)
        return mean, (weights * (x - mean).square()).sum(0).sqrt().log()

    m, log_s = guide.mean.detach(), guide.sd.log()
    found = torch.zeros_like(sd, dtype=torch.bool)
    with torch.no_grad():
        target, goal = moments(m, log_s)[0], sd.log()
    for _ in range(NEWTON):
        m, log_s = (x.detach().requires_grad_() for x in (m, log_s))
        with torch.enable_grad():
            mean, log_sd = moments(m, log_s)
            a, b = torch.autograd.grad(mean.sum(), (m, log_s), retain_graph=True)
            c, d = torch.autograd.grad(log_sd.sum(), (m, log_s))
        off, wide, det = target - mean.detach(), goal - log_sd.detach(), a * d - b * c
        found = (off.abs() < CLOSE * sd) & (wide.abs() < CLOSE)
        if bool(found.all()):
            break
        m = m + ((d * off - b * wide) / det).clamp(-STEP * guide.sd, STEP * guide.sd)
        log_s = log_s + ((a * wide - c * off) / det).clamp(-STEP, STEP)
    with torch.enable_grad():
        own = guide.mean.detach().requires_grad_()
        (slope,) = torch.autograd.grad(moments(own, guide.sd.log())[0].sum(), own)
    return (
        torch.where(found, m.detach(), guide.mean),
        torch.where(found, log_s.detach().exp(), sd / slope.abs()),
    )
