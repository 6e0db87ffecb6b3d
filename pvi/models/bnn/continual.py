"""A posterior as the prior of what comes next."""

from typing import Any

import pvi
from pvi.errors import GuideError
from pvi.models.bnn.priors import FanIn, Normals, Prior, as_prior


def posterior_as_prior(fit: pvi.Fit, default: Any = None) -> Prior:
    """The posterior of the weights as a prior: variational continual learning (Nguyen et al. 2018).

    After data $D_1$, $q_1(w) \\approx p(w \\mid D_1)$; with it as prior the posterior after $D_2$
    is that after both. Means and standard deviations are kept, correlations are not.

    Args:
        fit: of a model of `bayesianize`, with a guide that has them in closed form.
        default: the prior of weights that the fit does not know, such as those of a new head;
            `FanIn()` if `None`.

    Raises:
        GuideError: a site's guide has no mean or standard deviation in closed form.
    """
    found = fit.posterior.as_prior()
    latents: Any = fit.guide.latents  # type: ignore[union-attr]
    weights = [name for name in fit.model.sites if name in latents]  # type: ignore[attr-defined]
    if missing := [name for name in weights if name not in found]:
        raise GuideError(
            f"the guide has no mean and standard deviation of site '{missing[0]}' in closed form. "
            "Fit pvi.guides.MeanField, LowRank or FullRank to carry on from"
        )
    values = {name: found[name] for name in weights}
    return Normals(values, FanIn() if default is None else as_prior(default))
