"""Covariances by linear response: what a factorised guide says of them without having them."""

from typing import Any

import torch

from pvi.engine.params import Params
from pvi.engine.traces import preserved_rng
from pvi.errors import FitError
from pvi.fit.deterministic import is_normal
from pvi.fit.double import doubled, in_double
from pvi.fit.fixed_draws import FixedDraws
from pvi.guides import FullRank
from pvi.guides.mode import LogJoint
from pvi.posterior import Posterior

NUM_DRAWS, LARGEST = 1024, 3000


def linear_response(posterior: Posterior, num_draws: int = NUM_DRAWS) -> Posterior:
    """The posterior with the guide's means, and covariances by linear response.

    The optimal means of independent normals move when the log density is tilted by $t^\\top u$,
    and how they move is an estimate of the covariance, better than that of the guide, which has
    none: $\\mathrm{Cov}(u) = dm^*/dt$ (see `FixedDraws.response`). It is exact for a Gaussian
    posterior.

    Args:
        posterior: of a fit with one of the normal guides, at the optimum.
        num_draws: fixed draws over which the bound is differentiated twice.

    Returns:
        A posterior like any other, with a `FullRank` guide in unconstrained space.

    Raises:
        FitError: another kind of guide, too many parameters, or not at a maximum of the bound.

    Reference:
        Giordano, Broderick, Jordan 2018; Giordano, Ingram, Broderick 2024, section 3.3.
    """
    guide, model = posterior.guide, posterior.model
    if not is_normal(guide):
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
        density = LogJoint(model, guide.layout, doubled(args), doubled(kwargs))
        covariance = FixedDraws(guide, density, 0, lambda *_: None).response(num_draws)
        mean = guide.transport(torch.zeros(1, guide.noise_size))[0].detach()
    corrected.adopt(guide.latents.values(), args, kwargs)
    corrected.place_covariance(mean, covariance)
    params = Params(model, corrected)
    params.freeze()
    return Posterior(model, corrected, posterior.data, params=params, checked=True)
