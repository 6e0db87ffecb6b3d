"""A posterior as the prior of what comes next."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import pvi
from pvi.engine.local import normal_of
from pvi.engine.traces import run_hidden, sample_nodes
from pvi.errors import GuideError
from pvi.models.bnn.priors import FanIn, Prior, as_prior, normal
from pvi.models.bnn.selection import Weight


class Normals(Prior):
    """Independent normals of given means and standard deviations.

    Args:
        values: mean and standard deviation of tensors, by name.
        default: the prior of tensors that are not there.
    """

    def __init__(self, values: Mapping[str, tuple[Tensor, Tensor]], default: Prior):
        super().__init__()
        self.values, self.default = dict(values), default

    def forward(self, weight: Weight) -> Any:
        if weight.name not in self.values:
            return self.default(weight)
        return normal(*self.values[weight.name], weight)


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
    posterior = fit.posterior
    with posterior.drawing(0) as runner:
        nodes = sample_nodes(run_hidden(fit.guide, runner.args, runner.kwargs))
        weights = [name for name in nodes if name in fit.model.sites]  # type: ignore[attr-defined]
        found = {name: _moments(name, nodes[name]["fn"]) for name in weights}
    values = {n: (m.detach().clone(), s.detach().clone()) for n, (m, s) in found.items()}
    return Normals(values, FanIn() if default is None else as_prior(default))


def _moments(name: str, fn: Any) -> tuple[Tensor, Tensor]:
    try:
        return normal_of(fn) or (fn.mean, fn.stddev)
    except NotImplementedError:
        raise GuideError(
            f"the guide has no mean and standard deviation of site '{name}' in closed form "
            f"({type(fn).__name__}). Fit pvi.guides.MeanField, LowRank or FullRank to carry on from"
        ) from None
