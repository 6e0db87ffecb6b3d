"""Learning from one set of data after another: yesterday's posterior is today's prior."""

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

import pvi
from pvi.errors import ModelError
from pvi.models.bnn.priors import Prior, normal
from pvi.models.bnn.selection import Weight

ONE_SD = (0.15865525, 0.5, 0.84134475)  # quantiles of a normal at -1, 0 and 1 sd


class Remembered(Prior):
    """Independent normals $w \\sim N(m, s^2)$ with a mean and an sd for each number.

    Args:
        marginals: mean and sd of each random tensor by its name.
    """

    def __init__(self, marginals: Mapping[str, tuple[Tensor, Tensor]]):
        super().__init__()
        self.marginals = dict(marginals)

    def forward(self, weight: Weight) -> Any:
        if weight.name not in self.marginals:
            raise ModelError(
                f"the posterior that is the prior here has no weight '{weight.name}', only "
                f"{sorted(self.marginals)}"
            )
        loc, scale = self.marginals[weight.name]
        if loc.shape[loc.dim() - len(weight.shape) :] != weight.shape:
            raise ModelError(
                f"the posterior that is the prior here has '{weight.name}' of shape "
                f"{tuple(loc.shape)}, but the network's is {tuple(weight.shape)}"
            )
        return normal(loc, scale, weight)


def posterior_as_prior(fit: pvi.Fit) -> Remembered:
    r"""The prior for the next data (Nguyen, Li, Bui, Turner 2018).

    .. math:: p_t(w) = q_{t-1}(w) \approx p(w \mid D_1, \ldots, D_{t-1})

    It keeps the means and sds of all weights. What a guide knows of their correlations is lost, and
    so is what the approximation of each step lacks.

    Args:
        fit: of a model of `bayesianize`, with a guide of `pvi.guides`.

    Returns:
        A prior for `bayesianize`, of a module with tensors of the same names and shapes. Give the
        next fit no warm-up of the KL: it would forget meanwhile.
    """
    return Remembered(marginals(fit, dict.fromkeys(_model(fit).sites, False)))


def noise_prior(fit: pvi.Fit) -> Any:
    """What was learned of the site "noise" as a log-normal, its own family in a mean-field guide.

    Args:
        fit: of a model with a latent noise.

    Returns:
        `prior=` of the next `Gaussian`; `None` for a model without that site.
    """
    if "noise" not in fit.guide.latents:  # type: ignore[union-attr]
        return None
    loc, scale = marginals(fit, {"noise": True})["noise"]
    return dist.LogNormal(loc, scale)


def marginals(fit: pvi.Fit, logs: Mapping[str, bool]) -> dict[str, tuple[Tensor, Tensor]]:
    """Means and sds of sites, or of the logarithms of those that are positive.

    Args:
        logs: whether to take the logarithm, by the name of the site.
    """
    guide: Any = fit.guide
    with fit.posterior.drawing(None):
        found = guide.quantiles(ONE_SD)
    quantiles = {n: found[n].log() if log else found[n] for n, log in logs.items()}
    return {n: (q[1], torch.maximum((q[2] - q[0]) / 2, _least(q[1]))) for n, q in quantiles.items()}


def _least(loc: Tensor) -> Tensor:
    """An sd that a difference of quantiles around `loc` can still resolve."""
    return torch.finfo(loc.dtype).eps * (1.0 + loc.abs())


def _model(fit: pvi.Fit) -> Any:
    return fit.model
