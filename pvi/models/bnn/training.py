"""What makes mean-field posteriors of networks work, as one recipe."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pvi
from pvi.errors import FitError
from pvi.guides.init import prior_median
from pvi.models.bnn.bayesian import BayesianModule
from pvi.models.bnn.stopping import EarlyStopping


class Stopping(NamedTuple):
    """Held-out rows x and y, steps between two looks at them, and looks without a better one."""

    x: Any
    y: Tensor
    every: int
    patience: int


@dataclass(frozen=True)
class Recipe:
    r"""A mean-field normal guide with He means and small scales, trained by Adam.

    .. math:: \max_q \; E_q[\log p(y \mid x, w)] - \beta \, KL(q(w) \,\|\, p(w))

    With scales that start small the first steps are those of an ordinary network; the KL's weight
    rises from 0, so that units are in use before the prior can switch them off.

    Args:
        steps: of Adam.
        batch_size: rows in a step.
        lr: the first learning rate; it falls along a cosine.
        kl_weight: beta. Below 1 the posterior is tempered: it is that of
            :math:`p(w) \, p(y \mid x, w)^{1/\beta}` and no bound on the evidence.
        warm_up: share of the steps in which the KL's weight rises.
        init_scale: sds of the weights at the start.
        local_reparam: "local", "flipout", or `None` to draw weights.

    Reference:
        Graves (2011), Practical Variational Inference for Neural Networks; Kingma, Salimans,
        Welling (2015), Variational Dropout and the Local Reparameterization Trick; Wenzel et al.
        (2020), How Good is the Bayes Posterior in Deep Neural Networks Really?
    """

    steps: int = 2000
    batch_size: int = 128
    lr: float = 0.01
    kl_weight: float = 1.0
    warm_up: float = 0.2
    init_scale: float = 0.01
    local_reparam: str | None = "local"

    def __post_init__(self) -> None:
        if not 0.0 <= self.warm_up <= 1.0:
            raise FitError(f"warm_up: expected a share of the steps, 0 to 1, got {self.warm_up}")
        if not self.kl_weight > 0:
            raise FitError(f"kl_weight: expected a number > 0, got {self.kl_weight}")

    def fit(
        self,
        model: Any,
        x: Any,
        y: Tensor,
        *,
        start: Any = None,
        stopping: Stopping | None = None,
        **options: Any,
    ) -> pvi.Fit:
        """Fit a network's weights.

        Args:
            model: of `bayesianize`, possibly with copies.
            x, y: the model's arguments.
            start: an `init_loc_fn` of `pvi.guides`, by default `he(model)`.
            stopping: ends the fit where held-out rows are predicted best.
            options: of `pvi.fit`, such as seed and progress.
        """
        guide = pvi.guides.MeanField(init_loc_fn=start or he(model), init_scale=self.init_scale)
        program = self.program(model)
        batch_size = min(self.batch_size, len(y))
        given = {"steps": self.steps, "batch_size": batch_size, "lr": self.lr} | options
        if stopping is not None:
            look = EarlyStopping(program, guide, *stopping)
            given["callbacks"] = [*given.get("callbacks", ()), look]
        return pvi.fit(program, guide, (x, y), objective=self.objective(), **given)

    def program(self, model: Any) -> Any:
        """The model as it is trained."""
        kind = self.local_reparam
        return model if kind is None else pvi.local_reparam(model, kind=kind)

    def objective(self) -> pvi.Objective:
        """The ELBO with this weight of the KL."""
        rise = round(self.warm_up * self.steps)
        if not rise:
            return pvi.BetaELBO(self.kl_weight, kl="exact")
        return pvi.BetaELBO(pvi.schedules.linear(rise, 0.0, self.kl_weight), kl="exact")


def he(model: BayesianModule) -> Callable[[Mapping], Tensor]:
    r"""Means :math:`N(0, 2 / n)` of weights with fan-in n, of their own for each copy; biases 0.

    A start for the guides' `init_loc_fn`; other sites start at their prior's median.

    Args:
        model: whose weights they are.

    Reference:
        He, Zhang, Ren, Sun (2015), Delving Deep into Rectifiers, eq. 10.
    """
    weights = model.weights

    def start(site: Mapping) -> Tensor:
        default = prior_median(site)
        weight = weights.get(site["name"])
        if weight is None or len(weight.shape) < 2:
            return default
        return torch.randn_like(default) * math.sqrt(2.0 / weight.fan_in)

    return start
