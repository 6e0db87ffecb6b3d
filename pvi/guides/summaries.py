"""Numbers that sum up a marginal distribution."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import IndependentTransform


def is_elementwise(transform: Any) -> bool:
    """Whether a bijection maps each number by itself."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform.domain.event_dim == 0 and transform.codomain.event_dim == 0


def normal_quantiles(transform: Any, loc: Tensor, scale: Tensor, probs: Tensor) -> Tensor:
    """Quantiles of $t(z)$, $z \\sim N(m, s^2)$, for a map of single numbers: `(*probs, *loc)`."""
    z = torch.special.ndtri(probs.to(loc)).reshape(probs.shape + (1,) * loc.dim())
    rising = transform(loc + scale) > transform(loc - scale)
    return transform(loc + scale * torch.where(rising, z, -z))


def empirical_quantiles(draws: Tensor, probs: Tensor) -> Tensor:
    """Quantiles along the first dimension; `torch.quantile` has a limit in size."""
    ordered = draws.sort(0).values
    place = probs.to(draws).reshape(-1) * (len(draws) - 1)
    low = place.floor().long()
    weight = (place - low).reshape(-1, *(1,) * (draws.dim() - 1))
    found = torch.lerp(ordered[low], ordered[(low + 1).clamp(max=len(draws) - 1)], weight)
    return found.reshape((*probs.shape, *draws.shape[1:]))
