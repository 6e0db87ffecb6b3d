"""What each estimator computes in each situation, as a table, and the answers to compare with.

`CELLS` says for every bound, gradient and situation whether the value is a bound, an estimate or
refused; `test_matrix` checks it cell by cell, and `docs/generate_estimators.py` makes a page of it.
A new estimator is a new row of `ESTIMATORS` or `SITUATIONS`, and a rule where it is special.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

import pvi
from tests.scenarios import mean_se
from tests.situations import (
    COLUMN_SD,
    GLOBAL,
    KEEP,
    LOCAL,
    NESTED,
    NUM,
    PAIRS,
    SCALE,
    S,
    Situation,
    X,
    auxiliary_guide,
    auxiliary_posterior,
    auxiliary_weights,
    both_masked,
    coin_guide,
    coin_log_z,
    coin_mean,
    coin_model,
    local_weights,
    log_z,
    missing_guide,
    missing_model,
    missing_posterior,
    missing_weights,
    point_guide,
    point_weights,
    table_guide,
    table_model,
    table_posterior,
    table_weights,
)

BETA = 2.5
BATCHES, BATCH = 20, 5_000  # of the references


def both(wrap: Callable, situation: Situation, **changes: Any) -> Situation:
    return replace(situation, model=wrap(situation.model), guide=wrap(situation.guide), **changes)


def part(situation: Situation) -> Situation:
    """With Pyro's own subsampling; its RenyiELBO raises weights to the power N / B."""
    return both(lambda f: partial(f, part=True), situation, posterior=None, wrong=3.0)


SITUATIONS = {
    "local": LOCAL,
    "global": GLOBAL,
    "global + local": NESTED,
    "subsampled": part(LOCAL),
    "subsampled, global": part(GLOBAL),
    "subsampled, global + local": part(NESTED),
    "masked": both(
        both_masked,
        LOCAL,
        weights=partial(local_weights, X[KEEP]),
        dims=(0, 2),
        log_z=log_z(X[KEEP]),
    ),
    "scaled": both(lambda f: poutine.scale(f, SCALE), LOCAL, factor=SCALE, wrong=SCALE),
    "beta": NESTED,
    "nested plates": Situation(
        table_model,
        table_guide,
        table_weights,
        start=(-0.2, -1.0, 0.1, 0.2, -1.0),
        posterior=table_posterior,
        dims=(0, 8),
        log_z=sum(log_z(x, 1.0, COLUMN_SD**2 + S**2) for x in PAIRS.T),
        data=PAIRS.T,
        nesting=2,
    ),
    "obs_mask": Situation(
        missing_model,
        missing_guide,
        missing_weights,
        start=(-0.4, 1.2, -0.9, 0.2, -0.2, -0.7),
        posterior=missing_posterior,
        dims=(0, 6),
        log_z=log_z(X[KEEP]),
    ),
    "auxiliary": replace(
        LOCAL,
        guide=auxiliary_guide,
        weights=auxiliary_weights,
        start=(-0.2, 0.6, -1.5),
        posterior=auxiliary_posterior,
    ),
    "to_event": replace(
        LOCAL,
        weights=partial(local_weights, PAIRS),
        dims=(0, 6),
        log_z=log_z(PAIRS.flatten()),
        data=PAIRS,
    ),
    "Delta (MAP)": replace(
        LOCAL,
        guide=point_guide,
        weights=point_weights,
        start=(0.1, 0.6),
        posterior=None,
        dims=(0, 0),
    ),
    "discrete": Situation(
        coin_model,
        coin_guide,
        None,
        start=(0.5, 1.0),
        posterior=None,
        dims=(0, 0),
        log_z=coin_log_z(),
        mean=coin_mean,
    ),
}


@dataclass(frozen=True)
class Estimator:
    """A bound by its order, how it takes KLs, and its own weight of them."""

    make: Callable[..., pvi.Objective]
    alpha: float = 1.0
    exact: bool = False
    beta: float = 1.0


@dataclass(frozen=True)
class Cell:
    """One entry of the table: `status` is "bound", or "estimate" or "refused" with a reason."""

    estimator: str
    gradient: str
    situation: str

    def __str__(self) -> str:
        return f"{self.estimator}-{self.gradient}-{self.situation}"

    @property
    def row(self) -> Estimator:
        return ESTIMATORS[self.estimator]

    @property
    def place(self) -> Situation:
        return SITUATIONS[self.situation]

    @property
    def status(self) -> str:
        return next((status for applies, status in RULES if applies(self)), "bound")

    @property
    def is_bound(self) -> bool:
        """Whether the mean of `.bound()` is at most the evidence, whatever the loss."""
        return self.status == "bound" or self.status == WEIGHTED

    @property
    def beta(self) -> tuple[float, float]:
        """KL weights of the latents drawn once per bound, and of the others."""
        if self.situation != "beta":
            return self.row.beta, self.row.beta
        return (BETA, 1.0) if self.row.beta != 1.0 else (BETA, BETA)  # one weight, or per site

    def objective(self, num_particles: int = NUM, **options: Any) -> pvi.Objective:
        if self.beta[0] != self.beta[1]:
            options["beta"] = {"theta": self.beta[0]}
        else:
            options["beta"] = self.beta[0]
        return self.row.make(num_particles=num_particles, gradient=self.gradient, **options)


def _renyi(alpha: float) -> Estimator:
    return Estimator(lambda **options: pvi.RenyiELBO(alpha, **options), alpha)


ESTIMATORS = {
    "ELBO": Estimator(pvi.ELBO),
    "TraceMeanFieldELBO": Estimator(pvi.TraceMeanFieldELBO, exact=True),
    "BetaELBO": Estimator(pvi.BetaELBO, beta=BETA),
    "IWAE": Estimator(pvi.IWAE, 0.0),
    "RenyiELBO(0.5)": _renyi(0.5),
    "RenyiELBO(2)": _renyi(2.0),
    "RenyiELBO(-1)": _renyi(-1.0),
}
GRADIENTS = ("reparam", "path", "score", "auto")

# Reasons, and for refusals what the error says. The first rule that applies decides.
REFUSED = {
    "refused: freezing the guide would delete the exact KL's gradient": "delete the gradient",
    "refused: its correction needs one common beta": "one common beta",
    "refused: the draw cannot be differentiated": "no reparameterised sampler",
    "refused: a weight of the whole batch would be raised to the power N/B": "is subsampled",
}
DELETES, COMMON, RIGID, POWER = REFUSED

WEIGHTED = "estimate: the KL is weighted; `.bound()` reports weight 1, a bound"

RULES: list[tuple[Callable[[Cell], bool], str]] = [
    (lambda c: c.gradient == "path" and c.row.exact, DELETES),
    (lambda c: c.gradient == "path" and c.beta[0] != c.beta[1], COMMON),
    (lambda c: c.gradient in ("reparam", "path") and c.situation == "discrete", RIGID),
    (lambda c: c.row.alpha != 1.0 and c.situation == "subsampled, global", POWER),
    (lambda c: c.situation == "Delta (MAP)", "estimate: the log joint at a point"),
    (lambda c: c.row.alpha < 0, "estimate: with alpha < 0 it can exceed the evidence"),
    (lambda c: c.beta != (1.0, 1.0), WEIGHTED),
]

CELLS = [Cell(e, g, s) for e in ESTIMATORS for g in GRADIENTS for s in SITUATIONS]


@dataclass(frozen=True)
class Reference:
    """Mean bound of one copy and its gradient, with standard errors (0: closed form)."""

    value: float
    value_se: float
    gradient: Tensor
    gradient_se: Tensor


def reference(
    situation: str, alpha: float, beta: tuple[float, float], inside: float = 1.0
) -> Reference:
    """Closed form where there is one, else 100,000 draws; `inside` as in `Weights.bound`."""
    place = SITUATIONS[situation]
    same = (n for n, s in SITUATIONS.items() if (s.weights, s.mean) == (place.weights, place.mean))
    values = _reference(next(same), alpha, beta, inside)
    mean, se = (place.factor * v for v in values)
    return Reference(float(mean[0]), float(se[0]), mean[1:], se[1:])


@cache
def _reference(
    situation: str, alpha: float, beta: tuple[float, float], inside: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the bound, followed by its gradient."""
    place = SITUATIONS[situation]
    closed = alpha == 1.0 or place.mean is not None or sum(place.dims) == 0
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(1 if closed else BATCHES):
        raw = torch.tensor(place.start).requires_grad_()
        if place.mean is not None:
            value = place.mean(raw, alpha, beta)
        else:
            points = _cubature(place.dims) if closed else _noise(place.dims, generator)
            value = place.weights(raw, *points).bound(alpha, beta, inside).mean()
        (gradient,) = torch.autograd.grad(value, raw)
        batches.append(torch.cat([value.detach().reshape(1), gradient]))
    found = torch.stack(batches)
    return (found[0], torch.zeros_like(found[0])) if closed else mean_se(found)


def _noise(dims: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    outer = torch.randn(BATCH, dims[0], generator=generator)
    return outer, torch.randn(NUM, BATCH, dims[1], generator=generator)


def _cubature(dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Points whose average is the mean over normal noise, exactly for polynomials of degree 3."""
    total = sum(dims)
    points = math.sqrt(total) * torch.cat([torch.eye(total), -torch.eye(total)])
    points = points if total else torch.zeros(1, 0)
    return points[:, : dims[0]], points[None, :, dims[0] :]
