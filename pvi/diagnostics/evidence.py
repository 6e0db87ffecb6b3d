"""How probable are the data under the model? Log evidence by importance sampling."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pvi.diagnostics.ais import Annealing
from pvi.diagnostics.weights import Bar, Tally, Target, guide_weights, make_target
from pvi.engine.params import Params, check_trained
from pvi.engine.traces import Program, preserved_rng
from pvi.errors import ObjectiveError
from pvi.posterior.psis import khat_threshold
from pvi.progress import progress as progress_bar

MAX_BAD = 0.05  # of the data: of true khats of 0.5, 1 % are found above 0.7 at 5,000 draws
MIN_ESS = 25.0  # a standard error of 0.2 nats and a bias of about -0.02 nats for each datum
MIN_ACCEPTANCE = 0.2  # of AIS moves: below, the chains hardly move


@dataclass(frozen=True)
class Options:
    """How evidence is estimated; the arguments of `evidence`, checked.

    Raises:
        ObjectiveError: naming the option.
    """

    method: str = "is"
    num_samples: int = 5000
    num_outer: int | None = None
    num_chains: int = 16
    num_steps: int = 500
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.method not in ("is", "ais"):
            raise ObjectiveError(f"method must be 'is' or 'ais', got {self.method!r}")
        for name in ("num_samples", "num_outer", "num_chains", "num_steps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ObjectiveError(f"{name} must be a whole number >= 1, got {value!r}")

    def bar(self, what: str) -> Bar:
        """A progress bar from the second second on, or none."""
        return (lambda items: items) if self.progress is False else partial(progress_bar, what=what)

    def num_weights(self, target: Target) -> int:
        """How many weights are averaged for each datum."""
        if self.method == "ais":
            return self.num_chains
        return (self.num_outer or 100) if target.nested else self.num_samples

    def describe(self, target: Target) -> str:
        if self.method == "ais":
            return f"AIS, {self.num_chains:,} chains, {self.num_steps:,} distributions"
        outer = f"{self.num_weights(target):,} x " if target.nested else ""
        return f"importance sampling, {outer}{self.num_samples:,} draws"


@dataclass(frozen=True)
class Evidence:
    r"""An estimate of :math:`\log p(x)`, nats; its expectation is below the truth.

    Attributes:
        log_evidence: `(*plates)`, one for each datum where the latents factorise over plates, else
            a scalar.
        se: Its standard error `(*plates)`, by the delta method.
        ess: Effective number of weights `(*plates)`.
        khat: Tail index of the weights `(*plates)`, see `psis`; NaN for AIS.
        total: Log evidence of all data.
        total_se: Its standard error.
        reasons: Why not to rely on it.
        how: Method and numbers of draws.
        num_weights: Weights averaged for each datum.
    """

    log_evidence: Tensor
    se: Tensor
    ess: Tensor
    khat: Tensor
    total: float
    total_se: float
    reasons: tuple[str, ...]
    how: str
    num_weights: int

    @property
    def reliable(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons

    def __str__(self) -> str:
        count = self.log_evidence.numel()
        over = f" over {count:,} data" if count > 1 else ""
        lines = [f"log evidence {self.total:.2f} +- {self.total_se:.2g} nats{over} ({self.how})"]
        if self.num_weights > 1:
            lines.append(f"ESS {_spread(self.ess, worst=min)} of {self.num_weights:,}")
            if not self.khat.isnan().all():
                lines[-1] += f", khat {_spread(self.khat, worst=max)}"
        verdict = "reliable" if self.reliable else "unreliable, probably too low:"
        return "\n".join([*lines, verdict, *(f"- {reason}" for reason in self.reasons)])


def _spread(x: Tensor, worst: Callable) -> str:
    values = x.flatten().tolist()
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{x.median():.3g} (median), {worst(values):.3g} (worst)"


def evidence(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int = 5000,
    method: str = "is",
    num_outer: int | None = None,
    num_chains: int = 16,
    num_steps: int = 500,
    seed: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Evidence:
    r"""Estimate the log evidence, with the guide as the proposal.

    .. math:: \log \hat p(x_i) = \log \frac1K \sum_k w_{ik},
        \qquad w_{ik} = \frac{p(x_i, z_{ik})}{q(z_{ik} \mid x_i)}

    for each datum where latents are local to a plate, and for all data together else. With latents
    :math:`\theta` outside that plate too, the nested estimate, whose mean is p(x) for any K:

    .. math:: \log \hat p(x) = \log \frac1M \sum_m \frac{p(\theta_m)}{q(\theta_m)}
        \prod_i \frac1K \sum_k w_{imk}

    The logarithm of an unbiased estimate is a lower bound in expectation, too low by about half its
    squared standard error. A guide that misses a part of the posterior makes it lower still, which
    its own draws may not show.

    Args:
        model, guide: The programs, trained, with parameters in Pyro's store or their own. They are
            run in evaluation mode. `guide=None` draws from the prior.
        args, kwargs: Their arguments.
        num_samples: K, exactly; with `method="is"`.
        method: "is" for importance sampling, "ais" for annealed importance sampling, which takes
            K chains from the guide to the posterior; see `pvi.diagnostics.ais`.
        num_outer: M, by default 100.
        num_chains, num_steps: Chains K and distributions on the way, with `method="ais"`.
        seed: Makes it repeatable and leaves the random state as it was.
        progress: A progress bar; by default on terminals, from the second second.

    Returns:
        Log evidence in nats, per datum and in total, and whether to rely on it; `print` it.

    Raises:
        ObjectiveError: There is no evidence, or no weights: a point (Delta) in the guide, a
            subsampled plate, `poutine.scale`, `pvi.kl`; discrete draws with "ais".
        ModelError: A weight is NaN or infinite.
        GuideError: A parameter has no trained value.

    Reference:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders, eq. 8; Neal (2001),
        Annealed Importance Sampling.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> found = evidence(model, guide, torch.tensor([0.0, 1.0]), num_samples=100, seed=0)
        >>> found.log_evidence  # log N(x; 0, 2)
        tensor([-1.2655, -1.5155], dtype=torch.float64)
        >>> found.reliable
        True
    """
    options = Options(method, num_samples, num_outer, num_chains, num_steps, progress)
    with prepared(model, guide, args, kwargs, seed) as target:
        return estimate(target, options)


def posterior_evidence(posterior: Any, *, seed: int | None = None, **options: Any) -> Evidence:
    """The evidence of a `Posterior`'s data, by its own parameters; options as in `evidence`."""
    checked = Options(**options)
    with prepared_posterior(posterior, seed) as target:
        return estimate(target, checked)


@contextmanager
def prepared(
    model: Program, guide: Program | None, args: tuple, kwargs: Mapping, seed: int | None
) -> Iterator[Target]:
    """Inside: a copy of the parameter store, evaluation mode, no gradients, our own seed.

    Raises:
        GuideError: a parameter that is created only now.
    """
    state: dict = dict(pyro.get_param_store().get_state())
    params = Params(*filter(None, (model, guide)), state=state)
    known = params.names()
    with params.scope(), params.evaluation(), torch.no_grad(), _seeded(seed):
        target = make_target(model, guide, args, kwargs)
        params.sync()
        check_trained(
            params.names() - known,
            "Train the programs first; after pvi.fit use fit.evidence() or fit.sandwich().",
        )
        yield target


@contextmanager
def prepared_posterior(posterior: Any, seed: int | None) -> Iterator[Target]:
    """The same with a `Posterior`'s data and its own parameters."""
    args, kwargs = posterior.data.whole()
    with posterior.drawing(None), _seeded(seed):
        yield make_target(posterior.model, posterior.guide, args, kwargs)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    with nullcontext() if seed is None else preserved_rng():
        if seed is not None:
            torch.manual_seed(seed)
        yield


def estimate(target: Target, options: Options) -> Evidence:
    """`evidence` of what has been looked at."""
    if not target.latents:
        return _exact(target)
    if options.num_outer is not None and (options.method == "ais" or not target.nested):
        raise ObjectiveError(
            f"num_outer={options.num_outer} is for method='is' and latents both inside and outside "
            f"a plate of independent data; here weights are formed {target.plan.scope.name}. Leave "
            "it out."
        )
    number, how = options.num_weights(target), options.describe(target)
    tally, acceptance = Tally(number), None
    if options.method == "ais":
        annealing = Annealing(target, options.num_steps, options.num_chains, options.bar)
        target = annealing.target
        for log_w in annealing.weights(options.num_chains):
            tally.add(log_w)
        acceptance = annealing.acceptance
    else:
        outer = options.num_weights(target) if target.nested else 1
        for log_w in guide_weights(target, options.num_samples, outer, options.bar("evidence")):
            tally.add(log_w)
    return _summary(tally, target, how, acceptance)


def _exact(target: Target) -> Evidence:
    """Without latents the likelihood is the evidence."""
    total = target.single.log_weights()[0].double()
    zero, one = torch.zeros_like(total), torch.ones_like(total)
    return Evidence(total, zero, one, zero, float(total), 0.0, (), "exact: no latent sites", 1)


def _summary(tally: Tally, target: Target, how: str, acceptance: Tensor | None) -> Evidence:
    log_mean, se, ess = tally.log_mean(), tally.se(), tally.ess()
    khat = tally.khat() if acceptance is None else torch.full_like(ess, math.nan)
    return Evidence(
        log_evidence=log_mean,
        se=se,
        ess=ess,
        khat=khat,
        total=float(log_mean.sum() + target.offset),
        total_se=float(se.square().sum().sqrt()),
        reasons=tuple(_reasons(khat, ess, tally.num, acceptance)),
        how=how,
        num_weights=tally.num,
    )


def _reasons(khat: Tensor, ess: Tensor, num: int, acceptance: Tensor | None) -> Iterator[str]:
    """What speaks against an estimate, each with the next step."""
    limit, least = khat_threshold(num), min(MIN_ESS, num / 2)
    richer = "try a richer or better trained guide, or method='ais'"
    more = richer if acceptance is None else "try more num_steps or num_chains"
    checks = [
        (khat >= limit, f"khat is above {limit:.2f}", f"the guide's tails are too light; {richer}"),
        (ess < least, f"ESS is below {least:.3g}", f"a few draws carry the weight; {more}"),
    ]
    if acceptance is not None:
        what = f"fewer than {MIN_ACCEPTANCE:.0%} of the moves are accepted"
        checks.append((acceptance < MIN_ACCEPTANCE, what, "try more num_steps"))
    for bad, what, step in checks:
        if (count := int(bad.sum())) > MAX_BAD * bad.numel():
            data = f" for {count:,} of {bad.numel():,} data" if bad.dim() else ""
            yield f"{what}{data}: {step}"
