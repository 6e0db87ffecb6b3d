"""Evidence from below and from above, on data simulated from the model itself."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pvi.diagnostics.ais import Annealing
from pvi.diagnostics.evidence import (
    Evidence,
    Options,
    estimate,
    prepared,
    prepared_posterior,
)
from pvi.diagnostics.weights import Target, guide_weights, make_target, nested_weight
from pvi.engine.simulate import Simulated, replayed, simulate
from pvi.engine.traces import Program, replaced, subset
from pvi.errors import ObjectiveError

CONDITIONS = (
    "The bounds hold on average over draws. The upper one needs an exact posterior draw, so it is\n"
    "for simulated data only; on yours the gap may be larger if the model does not fit them."
)


@dataclass(frozen=True)
class Sandwich:
    r"""Stochastic bounds on :math:`\log p(x)`, nats.

    Attributes:
        lower, upper: Bounds for each simulated data set and datum `(R, *plates)`.
        offset: What observations outside the plates add to both, exactly `(R,)`.
        own: The lower bound on the user's data.
        how: Method and numbers of draws.
    """

    lower: Tensor
    upper: Tensor
    offset: Tensor
    own: Evidence
    how: str

    @property
    def gap(self) -> float:
        """Mean of upper - lower for a data set: no less than what the lower one lacks, nats."""
        return _mean_se(self.upper - self.lower)[0]

    @property
    def gap_se(self) -> float:
        """Standard error of the gap; NaN for a single difference."""
        return _mean_se(self.upper - self.lower)[1]

    def __str__(self) -> str:
        sets, data = len(self.lower), self.lower[0].numel()
        sizes = f"{sets:,} simulated data set{'s' * (sets > 1)}"
        per = f" for {data:,} data, {self.gap / data:.3g} each" if data > 1 else ""
        means = [(x.sum() / sets + self.offset.mean()).item() for x in (self.lower, self.upper)]
        lines = [
            f"log evidence of {sizes} ({self.how}), nats for one:",
            f"  at least  {means[0]:.2f}",
            f"  at most   {means[1]:.2f}",
            f"  gap       {self.gap:.3g} +- {self.gap_se:.2g}{per}",
            f"of your data: at least {self.own.total:.2f} +- {self.own.total_se:.2g}",
        ]
        return "\n".join([*lines, CONDITIONS])


def _mean_se(x: Tensor) -> tuple[float, float]:
    """Mean over data sets of the sum over data `(R, *plates)`, and its standard error."""
    count, values = len(x), x.flatten()
    se = float(values.std()) if len(values) > 1 else math.nan
    return float(values.sum()) / count, se * math.sqrt(len(values)) / count


def sandwich(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int = 5000,
    method: str = "ais",
    num_outer: int | None = None,
    num_chains: int = 16,
    num_steps: int = 200,
    num_simulations: int = 5,
    seed: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Sandwich:
    r"""Bound the log evidence from both sides: bidirectional Monte Carlo.

    A simulation draws (z*, x) from the model, so that z* is an exact draw from p(z | x). With
    weights :math:`w_1, \dots, w_K` of independent draws (or chains) from the guide, and
    :math:`w^*` that of z* (or of a chain run backwards from it),

    .. math::
        \log\frac1K\sum_{k=1}^K w_k \quad\text{and}\quad
        \log\frac1K\Bigl(w^* + \sum_{k=2}^K w_k\Bigr)

    have expectations below and above :math:`\log p(x)`. For the second: with
    :math:`\bar w = \frac1K \sum_k w_k` and all draws from the guide, the density
    :math:`\prod_k q(z_k)\, \bar w / p(x)` is that of K draws of which one, at a random place, is
    exact. Under it :math:`E[1 / \bar w] = 1 / p(x)`, so by Jensen's inequality
    :math:`E \log \bar w \ge \log p(x)`; the place does not matter to :math:`\bar w`. One exact draw
    is all that a data set has, and all that this needs; both bounds are tight as K or the number
    of annealed distributions grows. (The mean of 1 / w over several chains from the same exact draw
    is unbiased too, but does not become exact as K grows.)

    Conditions: the bounds hold in expectation; the upper one on data simulated from the model (at
    its present parameters) only; and a guide with parameters for each row of your data is no good
    guide to simulated ones, so the gap is then large (take an amortised guide, or `guide=None`).

    Args:
        model, guide: As in `evidence`. Simulated data replace the arguments that hold observations,
            so that an amortised guide sees them. `guide=None` starts from the prior.
        args, kwargs: Their arguments.
        num_samples, num_outer: With `method="iwae"`, as in `evidence`.
        method: "ais" for annealed chains; "iwae" for draws from the guide alone, which also works
            for discrete ones.
        num_chains, num_steps: With `method="ais"`, as in `evidence`.
        num_simulations: Data sets R of the size of yours.
        seed, progress: As in `evidence`.

    Raises:
        ObjectiveError: As `evidence`; also `pyro.factor`, `obs_mask` (no data can be simulated) and
            guides with auxiliary sites (no density at a given z), such as Pyro's autoguides.
        ModelError: The model reads the observations elsewhere too, so that it can't be simulated.

    Reference:
        Grosse, Ghahramani, Adams (2015), Sandwiching the Marginal Likelihood Using Bidirectional
        Monte Carlo; Grosse, Ancha, Roy (2016), Measuring the Reliability of MCMC Inference with
        Bidirectional Monte Carlo; Sobolev, Vetrov (2019), Importance Weighted Hierarchical
        Variational Inference, for the upper bound with one exact draw among K.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> found = sandwich(model, guide, torch.zeros(3), method="iwae", num_samples=10, seed=0)
        >>> abs(found.gap) < 1e-4  # the guide is the posterior
        True
    """
    options = _options(method, num_samples, num_outer, num_chains, num_steps, progress)
    with prepared(model, guide, args, kwargs, seed) as target:
        return _sandwich(target, guide, options, num_simulations)


def posterior_sandwich(
    posterior: Any,
    *,
    method: str = "ais",
    num_steps: int = 200,
    num_simulations: int = 5,
    seed: int | None = None,
    **options: Any,
) -> Sandwich:
    """The sandwich of a `Posterior`, by its own parameters; options as in `sandwich`."""
    checked = _options(method, num_steps=num_steps, **options)
    with prepared_posterior(posterior, seed) as target:
        return _sandwich(target, posterior.guide, checked, num_simulations)


def _options(method: str, *values: Any, **options: Any) -> Options:
    if method not in ("ais", "iwae"):
        raise ObjectiveError(f"method must be 'ais' or 'iwae', got {method!r}")
    return Options("is" if method == "iwae" else "ais", *values, **options)


def _sandwich(
    target: Target, guide: Program | None, options: Options, num_simulations: int
) -> Sandwich:
    if type(num_simulations) is not int or num_simulations < 1:
        raise ObjectiveError(f"num_simulations must be a whole number >= 1, got {num_simulations}")
    _check_sites(target)
    own, quiet = estimate(target, options), replace(options, progress=False)
    found = []
    for _ in options.bar("simulate")(range(num_simulations)):
        made = simulate(target.model, target.args, target.kwargs)
        replayed(made)  # else z* is no draw from p(z | x)
        other = make_target(made.model, guide, made.args, made.kwargs, target.plan)
        found.append((*bounds(other, made, quiet), other.offset))
    lower, upper, offset = map(torch.stack, zip(*found, strict=True))
    return Sandwich(lower, upper, offset, own, options.describe(target))


def _check_sites(target: Target) -> None:
    """Refuse guides whose density at given latents is not known."""
    if not target.latents:
        raise ObjectiveError("the model has no latent site: its likelihood is the evidence")
    for term in target.latents:
        if term.kind == "auxiliary" or term.point:
            raise ObjectiveError(
                f"the guide draws site '{term.name}' through an auxiliary one, so its density at "
                "an exact posterior draw is unknown. Sample each latent at the model's own site "
                "name, as in pvi.guides.MeanField, or use guide=None."
            )


def bounds(target: Target, made: Simulated, options: Options) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds on the log evidence of simulated data, `(*plates)` each."""
    names = [term.name for term in target.latents]
    exact: Any = {name: made.trace.nodes[name]["value"] for name in names}
    if options.method == "ais":
        annealing = Annealing(target, options.num_steps, options.num_chains, options.bar)
        target = annealing.target
        star = annealing.reverse(exact)
        weights = annealing.weights(options.num_chains)
    else:
        given = replaced(subset(target.guide_trace, names), exact)
        star = _exact_weight(target, given, options.num_samples)
        outer, bar = options.num_weights(target), options.bar("draw")
        weights = guide_weights(target, options.num_samples, outer, bar)
    return bracket(weights, star[0])


def _exact_weight(target: Target, given: Any, num_samples: int) -> Tensor:
    """Log weight `(1, *plates)` of the exact draw; nested, among other draws inside the plates."""
    known = target.weights(1, given)
    if not target.nested:
        return known[1]
    outer = subset(given, target.plan.scope.outer)
    return nested_weight(target, outer, target.chunks(num_samples - 1), [known])


def bracket(log_w: Iterable[Tensor], exact: Tensor) -> tuple[Tensor, Tensor]:
    """Log means of weights, as drawn, and with the first one replaced by that of an exact draw.

    Args:
        log_w: chunks `(k, *plates)` of log weights.
        exact: `(*plates)`.
    """
    chunks = iter(log_w)
    head = next(chunks)
    rest, count = [torch.logsumexp(head[1:], 0)], len(head)
    for chunk in chunks:
        rest.append(torch.logsumexp(chunk, 0))
        count += len(chunk)
    others = torch.logsumexp(torch.stack(rest), 0)
    lower, upper = (torch.logaddexp(others, x) - math.log(count) for x in (head[0], exact))
    return lower, upper
