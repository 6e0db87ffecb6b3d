"""Every scalar parameter, under the guide and under the importance weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice, product

import torch

from pvi.posterior.psis import PSIS

MAX_DIM = 1000  # scalars: above this, weights over the joint latent space say nothing
ROUNDING = 1e-10  # an sd below this share of the mean is rounding: the scalar is constant


@dataclass(frozen=True)
class Row:
    """One scalar under the guide and under the weights, the latter NaN where there are none.

    `shift` is (psis_mean - mean) / sd and `sd_ratio` is psis_sd / sd, both without unit.
    """

    name: str
    mean: float
    sd: float
    psis_mean: float
    psis_sd: float
    shift: float
    sd_ratio: float


COLUMNS = [field.name for field in fields(Row)]


def scalars(values: Mapping[str, torch.Tensor], limit: int) -> tuple[list[str], torch.Tensor]:
    """Names such as "beta[0, 1]" and draws `(S, D)` in float64 of the first `limit` scalars."""
    names: list[str] = []
    columns: list[torch.Tensor] = []
    for site, value in values.items():
        left = limit - len(names)
        indices = islice(product(*map(range, value.shape[1:])), left)
        names += [f"{site}{list(index) or ''}" for index in indices]
        flat = value.detach().reshape(len(value), math.prod(value.shape[1:]))
        columns.append(flat[:, :left].cpu().double())
    return names, torch.cat(columns, 1)


def spelled(site: str, shape: Sequence[int], places: torch.Tensor) -> list[str]:
    """Names of the scalars at these places of a flattened site."""
    if not shape:
        return [site]
    indices = torch.stack(torch.unravel_index(places, tuple(shape)), 1).tolist()
    return [f"{site}{index}" for index in indices]


def make_table(values: Mapping[str, torch.Tensor], smoothed: PSIS | None = None) -> tuple[Row, ...]:
    """Moments of each scalar under the guide and, where there are weights, under the weights."""
    if not values:
        return ()
    names, x = scalars(values, MAX_DIM)
    return rows_of(names, x, None if smoothed is None else smoothed.log_weights.exp()[:, None])


def rows_of(names: list[str], x: torch.Tensor, w: torch.Tensor | None = None) -> tuple[Row, ...]:
    """The same of draws `(S, D)`, with weights `(S, 1)` or `(S, D)`."""
    mean, sd = x.mean(0), x.std(0, correction=0)
    psis_mean = psis_sd = shift = sd_ratio = torch.full_like(mean, math.nan)
    if w is not None:
        psis_mean = (w * x).sum(0)
        psis_sd = (w * (x - psis_mean) ** 2).sum(0).sqrt()
        constant = sd <= ROUNDING * mean.abs()
        shift = torch.where(constant, 0.0, (psis_mean - mean) / sd)
        sd_ratio = torch.where(constant, 1.0, psis_sd / sd)
    columns = (c.tolist() for c in (mean, sd, psis_mean, psis_sd, shift, sd_ratio))
    return tuple(Row(*cells) for cells in zip(names, *columns, strict=True))
