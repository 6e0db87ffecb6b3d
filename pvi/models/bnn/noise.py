"""What a fit has learned of the noise, for the next data."""

from typing import Any

import pyro.distributions as dist
import torch

import pvi

ONE_SD = (0.15865525, 0.5, 0.84134475)  # quantiles of a normal at -1, 0 and 1 sd


def noise_prior(fit: pvi.Fit) -> Any:
    """The posterior of the site "noise" as a log-normal, its own family in a mean-field guide.

    Args:
        fit: of a model of `bayesianize`.

    Returns:
        `prior=` of the next `Gaussian`; `None` for a model without a latent noise.
    """
    guide: Any = fit.guide
    if "noise" not in guide.latents:
        return None
    with fit.posterior.drawing(None):
        low, middle, high = guide.quantiles(ONE_SD)["noise"].log()
    least = torch.finfo(middle.dtype).eps * (1.0 + middle.abs())  # what a difference resolves
    return dist.LogNormal(middle, torch.maximum((high - low) / 2, least))
