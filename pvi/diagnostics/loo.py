"""Leave-one-out cross-validation of a posterior that a guide stands for, by importance weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pvi.diagnostics.evidence import prepared_posterior
from pvi.diagnostics.weights import Target, weights_of
from pvi.engine.numbers import whole_number
from pvi.engine.terms import Term, Terms
from pvi.engine.traces import run, subset
from pvi.errors import DataError, ModelError, ObjectiveError
from pvi.posterior.draws import batch_shape, observed_in, with_draws
from pvi.posterior.psis import khat_threshold, psis
from pvi.progress import progress

MIN_ESS = 25.0  # of the inner weights: log p(y_i | theta) is then known to 0.2 nats
FEW = 5  # data that a reason names


@dataclass(frozen=True)
class Loo:
    r"""Leave-one-out predictive density of a model, nats.

    Attributes:
        elpd: :math:`\sum_i \log p(y_i \mid y_{-i})`.
        se: Its standard error over data, as of another sample of data of this size.
        mcse: Its Monte Carlo error: that of the draws.
        p_loo: Effective number of parameters, nats.
        pointwise: `(n,)` :math:`\log p(y_i \mid y_{-i})`, 0 for data that are masked out.
        khat: `(n,)` tail index of each datum's weights, see `psis`.
        num_draws: Draws S.
        reasons: Why not to rely on it, each with the next step.
        unit: What is left out at a time.
    """

    elpd: float
    se: float
    mcse: float
    p_loo: float
    pointwise: Tensor
    khat: Tensor
    num_draws: int
    reasons: tuple[str, ...]
    unit: str

    @property
    def reliable(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons

    @property
    def good_k(self) -> float:
        """Bound on `khat` below which a datum's term is usable."""
        return khat_threshold(self.num_draws)

    def __str__(self) -> str:
        head = (
            f"elpd_loo {self.elpd:.2f} +- {self.se:.2g} nats over {len(self.pointwise):,} "
            f"{self.unit} (Monte Carlo error {self.mcse:.2g}), p_loo {self.p_loo:.2f}"
        )
        worst = f"khat {self.khat.median():.2f} (median), {self.khat.max():.2f} (worst; usable "
        worst += f"below {self.good_k:.2f}), {self.num_draws:,} draws"
        verdict = "reliable" if self.reliable else "unreliable:"
        return "\n".join([head, worst, verdict, *(f"- {reason}" for reason in self.reasons)])

    def to_arviz(self) -> Any:
        """The same as the `ELPDData` of the installed arviz, for `arviz.compare`."""
        import xarray

        from pvi.posterior.arviz import load

        def array(x: Tensor) -> Any:
            return xarray.DataArray(x.cpu().numpy(), dims=["datum"])

        arviz, n = load(), len(self.pointwise)
        numbers = (self.elpd, self.se, self.p_loo, self.num_draws, n)
        warning, details = not self.reliable, (array(self.pointwise), array(self.khat))
        if not arviz.__version__.startswith("0."):
            from importlib import import_module

            utils = import_module("arviz_stats.utils")

            kind: Any = getattr(utils, "ELPDDataLOO", None) or partial(utils.ELPDData, kind="loo")
            names = "elpd se p n_samples n_data_points warning elpd_i pareto_k scale good_k"
            values = (*numbers, warning, *details, "log", self.good_k)
            return kind(**dict(zip(names.split(), values, strict=True)))
        from arviz.stats.stats_utils import ELPDData

        names = "elpd_loo se p_loo n_samples n_data_points warning loo_i pareto_k scale good_k"
        values = [*numbers, warning, *details, "log", self.good_k]
        return ELPDData(data=values, index=names.split())


def loo(target: Any, num_draws: int = 4000, *, num_inner: int = 100, seed: int = 0) -> Loo:
    r"""Estimate how well the model predicts each datum from all others, without fitting again.

    .. math:: \log p(y_i \mid y_{-i}) \approx
        \log \frac{\sum_s w_{is}\, p(y_i \mid \theta_s)}{\sum_s w_{is}},
        \qquad w_{is} = \frac{p(y, \theta_s)}{q(\theta_s)\, p(y_i \mid \theta_s)}

    for draws :math:`\theta_s` of the guide, the weights smoothed by `psis`. Dividing by q is what
    corrects a guide that is not the posterior; `arviz.loo` takes the draws for exact ones.

    With latents local to a plate of the data, a datum is an element of that plate with all that is
    observed in it, and :math:`p(y_i \mid \theta)` is the mean weight of `num_inner` draws of its
    own latents: the density given those would reward a latent for knowing its datum.

    Args:
        target: A `Posterior`, or anything with a `.posterior` (a `Fit`).
        num_draws: Draws S.
        num_inner: Draws of the local latents for each of them.
        seed: Of the draws.

    Returns:
        The estimate with a khat for each datum; `print` it.

    Raises:
        ObjectiveError: The log weights mean nothing: a Delta guide, a subsampled plate, a tempered
            objective.
        DataError: Local latents that can't be integrated out; no observation; no shared latent.
        ModelError: log p - log q is NaN or infinite.

    Reference:
        Magnusson, Andersen, Jonasson, Vehtari (2019), Bayesian leave-one-out cross-validation for
        large data, ICML; Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation.

    Example:
        >>> import pyro, pyro.distributions as dist, pvi
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> fit = pvi.fit(model, data=(torch.tensor([-1.0, 0.0, 1.0]),), seed=0)
        >>> found = loo(fit)
        >>> round(found.elpd, 1), found.reliable  # exactly -4.87
        (-4.9, True)
    """
    posterior = getattr(target, "posterior", target)
    num = whole_number("num_draws", num_draws, error=DataError)
    inner = whole_number("num_inner", num_inner, error=DataError)
    if caveats := posterior.caveats():
        raise ObjectiveError(f"leave-one-out needs log weights: {'; '.join(caveats)}")
    with prepared_posterior(posterior, seed) as found:
        data = set(posterior.runner.observed)
        _check(found, data)
        nested = bool(found.plan.scope.plates)
        draw = _integrated if nested else _given
        parts = [draw(found, k, data, inner) for k in progress(found.chunks(num), "loo")]
        log_r, log_lik, ess = (torch.cat(part) for part in zip(*parts, strict=True))
    plates = ", ".join(sorted(found.plan.scope.plates))
    unit = f"elements of plate {plates}" if nested else "data"
    return _weighted(log_r, log_lik, float(ess.median()), inner, unit)


def _check(target: Target, data: set[str]) -> None:
    """Refuse models without observations, and those of which no p(y_i | theta) is known."""
    observed = [term for term in target.single if _is_data(term, data)]
    if not observed:
        raise DataError("leave-one-out needs an observed site: pyro.sample(..., obs=y)")
    scope = target.plan.scope
    if scope.plates and not target.nested:
        raise DataError(
            f"all latents are local to plate '{min(scope.plates)}', so its elements tell nothing "
            "of each other and p(y_i | the others) is p(y_i): use evidence(), which gives it by "
            "datum."
        )
    plates = {plate.name for term in observed for plate in term.plates}
    for term in () if scope.plates else target.latents:
        if shared := plates & {plate.name for plate in term.plates}:
            raise DataError(
                f"latent '{term.name}' is local to plate '{min(shared)}' of the data, but the "
                "guide or the model ties that plate's elements together, so that it can't be "
                "integrated out datum by datum. Use pvi.guides.MeanField or Structured."
            )


def _is_data(term: Term, data: set[str]) -> bool:
    return term.kind == "likelihood" and term.log_p is not None and bool(data & observed_in(term))


def _by_datum(terms: Terms, data: set[str], num: int) -> list[Tensor]:
    """Log likelihoods of all that is observed, `(num, n)` for each site, in the order of names:
    other models of the same data may observe them in another one.
    """
    found = [t for t in terms if _is_data(t, data) and t.log_p is not None]
    found.sort(key=lambda term: term.name)
    return [with_draws(t.log_p, num, batch_shape(t)).reshape(num, -1) for t in found]  # type: ignore[arg-type]


Part = tuple[Tensor, Tensor, Tensor]


def _given(target: Target, num: int, data: set[str], _: int) -> Part:
    """Log ratios `(num,)` and log likelihoods `(num, n)` of draws of all latents, and infinity."""
    terms = target.terms(num)
    log_lik = torch.cat(_by_datum(terms, data, num), 1).double()
    return terms.log_weights().double(), log_lik, torch.full((num,), math.inf)


def _integrated(target: Target, num: int, data: set[str], inner: int) -> Part:
    """The same for draws of the shared latents, with the effective number of inner draws."""
    plan, outer = target.plan, target.plan.scope.outer
    guide = plan.enumeration.guide(target.guide, num)
    given = subset(run(guide, target.args, target.kwargs), outer)
    sums = [torch.tensor(-math.inf)] * 2  # logs of sum w and sum w^2
    fixed = Terms(())
    for _ in range(inner):
        terms = target.terms(num, given)
        log_w = weights_of(terms, plan.scope)[1].double().reshape(num, -1)
        fixed = Terms(tuple(t for t in terms if t.name in outer))
        powers = [power * log_w for power in (1, 2)]
        sums = [torch.logaddexp(a.to(b), b) for a, b in zip(sums, powers, strict=True)]
    local = sums[0] - math.log(inner)
    ess = (2 * sums[0] - sums[1]).exp().amin(1)
    log_r = local.sum(1) + fixed.log_weights().double()
    return log_r, torch.cat([local, *(x.double() for x in _by_datum(fixed, data, num))], 1), ess


def _weighted(log_r: Tensor, log_lik: Tensor, ess: float, inner: int, unit: str) -> Loo:
    """From log p(y, theta) - log q(theta) `(S,)` and log p(y_i | theta) `(S, n)`."""
    log_r, log_lik = log_r.cpu(), log_lik.cpu()
    bad = log_r.isnan() | log_r.isposinf() | log_lik.isnan().any(1) | log_lik.isposinf().any(1)
    if bool(bad.any()):
        raise ModelError(
            f"log p - log q or a log likelihood is NaN or infinite at {int(bad.sum()):,} of "
            f"{len(bad):,} draws: look for an overflow, a log of 0 or a division by 0."
        )
    whole = psis(log_r).log_weights
    pointwise, khat, gain = [], [], []
    error = torch.zeros(len(log_r), dtype=log_r.dtype)
    for column in progress(list(log_lik.T), "smooth weights"):
        left_out = (log_r - column).where(~log_r.isneginf(), log_r)
        smoothed = psis(left_out)
        terms = smoothed.log_weights + column.clamp(min=torch.finfo(column.dtype).min)
        elpd = torch.logsumexp(terms, 0)
        error += (terms - elpd).exp() - smoothed.log_weights.exp()
        pointwise.append(elpd)
        khat.append(smoothed.khat)
        gain.append(torch.logsumexp(whole + column, 0) - elpd)
    values, tails = torch.stack(pointwise), torch.tensor(khat, dtype=torch.float64)
    count = int((log_lik != 0).any(0).sum())  # the others are masked
    impossible = int(log_lik.isneginf().any(1).sum())
    reasons = _reasons(tails, khat_threshold(len(log_r)), ess, inner, impossible)
    kept = values[(log_lik != 0).any(0)]
    return Loo(
        elpd=float(values.sum()),
        se=float(kept.std() * math.sqrt(count)) if count > 1 else math.nan,
        mcse=float(error.square().sum().sqrt()),
        p_loo=float(torch.stack(gain).sum()),
        pointwise=values,
        khat=tails,
        num_draws=len(log_r),
        reasons=tuple(reasons),
        unit=unit,
    )


def _reasons(khat: Tensor, limit: float, ess: float, inner: int, impossible: int) -> Iterator[str]:
    """What speaks against an estimate, each with the next step."""
    if impossible:
        yield (
            f"{impossible:,} draws give a datum the density 0, and what they weigh without that "
            "datum is unknown: check on held-out data, or fit again without each"
        )
    bad = (khat >= limit).nonzero().flatten().tolist()
    if bad:
        named = ", ".join(map(str, bad[:FEW])) + (", ..." if len(bad) > FEW else "")
        yield (
            f"khat is above {limit:.2f} for {len(bad):,} of {len(khat):,} data ({named}): the "
            "draws do not reach the posterior without them; try a richer guide, or fit again "
            "without each"
        )
    if ess < (least := min(MIN_ESS, inner / 2)):
        yield (
            f"the local latents' weights have an ESS of {ess:.1f} of {inner:,} draws, below "
            f"{least:.3g}, for the worst datum: raise num_inner"
        )
