"""One observed site: what was predicted of it, against what came."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvi.diagnostics.findings import findings
from pvi.diagnostics.predictions import Predicted
from pvi.diagnostics.scores import (
    Band,
    Reliability,
    brier,
    coverage,
    crps,
    ecdf_band,
    pit,
    reliability,
)
from pvi.errors import DataError
from pvi.posterior.psis import khat_threshold, psis
from pvi.progress import progress
from pvi.text import table

CIRCULAR = ("VonMises",)  # angles
EVEN = 0.1  # nats: log ratios of a smaller sd change nothing, whatever their tail
Statistic = Callable[[Tensor], Any]


@dataclass(frozen=True)
class SiteCheck:
    """One observed site; numbers that have no meaning for its kind are NaN, objects `None`.

    Attributes:
        name: The site.
        kind: "continuous", "circular", "discrete", "binary" or "categorical".
        num: Numbers that are observed (for vectors, each component), without masked ones.
        statistics: Name -> the statistic of the data, its mean over replicated data, and the
            posterior predictive p-value P(T(y_rep) > T(y)) + P(T(y_rep) = T(y)) / 2.
        pit: `(num,)` randomised PITs; leave-one-out ones on the training data.
        band: Their ECDF with its simultaneous 95 % band.
        coverage: Level, share of data in the central interval, its standard error.
        log_score: Mean log predictive density of a datum, nats; larger is better.
        log_score_se: Its standard error over the data, nats.
        crps: Mean CRPS, in units of the data; smaller is better.
        rmse: Root mean squared error of the predictive mean.
        brier: Mean Brier score.
        accuracy: Share of data whose most probable class is right.
        reliability: The diagram: of P(y = 1), or of the most probable class.
        bad_khat: Share of data whose leave-one-out weights are unreliable.
        bad_log_score: Share of data whose log density rests on fewer than 10 effective draws.
    """

    name: str
    kind: str
    num: int
    statistics: Mapping[str, tuple[float, float, float]]
    pit: Tensor | None = None
    band: Band | None = None
    coverage: tuple[tuple[float, float, float], ...] = ()
    log_score: float = math.nan
    log_score_se: float = math.nan
    crps: float = math.nan
    rmse: float = math.nan
    brier: float = math.nan
    accuracy: float = math.nan
    reliability: Reliability | None = None
    bad_khat: float = math.nan
    bad_log_score: float = math.nan

    @property
    def findings(self) -> tuple[str, ...]:
        """What is wrong, each with the next step."""
        return tuple(findings(self))

    def scores(self) -> dict[str, float]:
        """The scores that mean something here."""
        names = ("log_score", "log_score_se", "crps", "rmse", "brier", "accuracy")
        found = {name: getattr(self, name) for name in names}
        if self.reliability is not None:
            found["ece"] = self.reliability.ece
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def __str__(self) -> str:
        verdict = "look at this" if self.findings else "nothing found"
        lines = [f"{self.name} ({self.kind}, {self.num:,} numbers): {verdict}"]
        lines += [f"- {finding}" for finding in self.findings]
        scores = self.scores()
        se = scores.pop("log_score_se", None)
        texts = [f"{k} {v:.4g}{f' +- {se:.2g}' * (k == 'log_score')}" for k, v in scores.items()]
        if (r := self.reliability) is not None:
            texts[-1] += f" (calibrated: {r.ece_calibrated:.2g}, below {r.ece_limit:.2g})"
        lines += [", ".join(texts)] if texts else []
        if self.coverage:
            shares = [f"{x:.0%}: {share:.1%} +- {se:.1%}" for x, share, se in self.coverage]
            lines.append("coverage " + ", ".join(shares))
        rows = [[n, *(f"{x:.4g}" for x in row)] for n, row in self.statistics.items()]
        lines += [table(("statistic", "data", "replicated", "p"), rows)] if rows else []
        return "\n".join(lines)


def check_site(
    site: Predicted, base: Tensor | None, loo: bool, functions: Mapping[str, Statistic]
) -> SiteCheck:
    event = site.observed.shape[site.valid.dim() :]
    y = site.observed[site.valid].double()  # (data, *event)
    x = site.draws[:, site.valid].double()  # (S, data, *event)
    log_lik = None if site.log_lik is None else site.log_lik[:, site.valid].double()
    if len(y) == 0:
        raise DataError(f"site '{site.name}' has no observation that is not masked out")
    weights, bad = _weights(log_lik, base, len(x), loo)
    kind = _kind(site.fn)
    spread = weights.reshape(*weights.shape, *(1,) * len(event)).expand(-1, -1, *event)
    if weights.shape[1] == 1:
        spread = weights
    flat = (x.flatten(1), y.flatten(), spread.flatten(1))
    num = y.numel() if kind != "categorical" else len(y)
    common: dict[str, Any] = {"name": site.name, "kind": kind, "num": num, "bad_khat": bad}
    common |= _log_score(log_lik, weights)
    if kind == "categorical":
        common |= _classes(site.fn, x, y, weights)
    else:
        if kind == "circular":
            flat = (*_around(*flat), flat[2])
        u = pit(*flat)
        mean = (flat[2] * flat[0]).sum(0)
        common |= {
            "pit": u,
            "band": ecdf_band(u),
            "coverage": coverage(u),
        }
        if kind != "circular" and _has(site.fn, "mean"):
            common["crps"] = float(crps(*flat).mean())
        if kind != "circular" and _has(site.fn, "variance"):
            common["rmse"] = float((mean - flat[1]).square().mean().sqrt())
    if kind == "binary":
        common |= _binary(*flat)
    return SiteCheck(statistics=_statistics(site, kind, x, y, functions), **common)


def _weights(
    log_lik: Tensor | None, base: Tensor | None, num: int, loo: bool
) -> tuple[Tensor, float]:
    """Weights `(S, data)` or `(S, 1)`, and the share of data whose weights are unreliable."""
    if not loo or log_lik is None:
        flat = torch.full((num, 1), 1 / num, dtype=torch.float64)
        return flat, math.nan
    ratios = -log_lik if base is None else base[:, None] - log_lik
    ratios = ratios.masked_fill(log_lik.isneginf(), -math.inf)  # such a draw is no posterior's
    made = [psis(column) for column in progress(list(ratios.T), "leave one out")]
    khats = torch.tensor([each.khat for each in made])
    bad = float(((khats >= khat_threshold(num)) & (ratios.std(0).cpu() >= EVEN)).double().mean())
    return torch.stack([each.log_weights.exp() for each in made], 1), bad


def _log_score(log_lik: Tensor | None, weights: Tensor) -> dict[str, float]:
    if log_lik is None:
        return {}
    parts = weights.log() + log_lik
    scores = torch.logsumexp(parts, 0)
    ess = torch.exp(2 * scores - torch.logsumexp(2 * parts, 0))
    se = float(scores.std() / len(scores) ** 0.5) if len(scores) > 1 else math.nan
    bad = float((ess < 10).double().mean())
    return {"log_score": float(scores.mean()), "log_score_se": se, "bad_log_score": bad}


def _binary(x: Tensor, y: Tensor, weights: Tensor) -> dict[str, Any]:
    p = (weights * x).sum(0)
    score = brier(p[:, None], y[:, None], _squares(weights))
    right = ((p > 0.5) == (y > 0.5)).double()
    return {
        "brier": float(score.mean()),
        "accuracy": float(right.mean()),
        "reliability": reliability(x.mean(0), y),  # see `Reliability`
    }


def _classes(fn: Any, x: Tensor, y: Tensor, weights: Tensor) -> dict[str, Any]:
    one_hot = "OneHot" in _base_name(fn)
    x, y = (x.argmax(-1), y.argmax(-1)) if one_hot else (x, y)
    x, y, weights = _flat(x, y, weights)
    labels = torch.arange(int(max(x.max(), y.max())) + 1, device=y.device)
    p = torch.stack([(weights * (x == label)).sum(0) for label in labels], 1)
    truth = (y[:, None] == labels).double()
    right = (p.argmax(1) == y).double()
    fitted = torch.stack([(x == label).double().mean(0) for label in labels], 1)
    confidence, top = fitted.max(1)
    return {
        "brier": float(brier(p, truth, _squares(weights)).mean()),
        "accuracy": float(right.mean()),
        "reliability": reliability(confidence, (top == y).double()),
    }


def _flat(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels inside events as data of their own."""
    if y.dim() > 1 and weights.shape[1] > 1:
        weights = weights.reshape(*weights.shape, *(1,) * (y.dim() - 1)).expand(x.shape).flatten(1)
    return x.flatten(1), y.flatten(), weights


def _squares(weights: Tensor) -> Tensor:
    return weights.square().sum(0)[:, None]


def _statistics(
    site: Predicted, kind: str, x: Tensor, y: Tensor, functions: Mapping[str, Statistic]
) -> dict[str, tuple[float, float, float]]:
    flat, data = x.flatten(1), y.flatten()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if kind == "circular":
        found = {"concentration": (_concentration(flat), _concentration(data))}
    elif kind != "categorical":
        defaults: dict[str, Any] = {"mean": lambda v: v.mean(-1)}
        if not _has(site.fn, "variance"):
            defaults = {"median": lambda v: v.median(-1).values}
        if kind != "binary":
            if len(data) > 1 and "mean" in defaults:
                defaults["sd"] = lambda v: v.std(-1)
            defaults |= {"min": lambda v: v.amin(-1), "max": lambda v: v.amax(-1)}
            if bool((data == 0).any()) or bool((flat == 0).any()):
                defaults["zeros"] = lambda v: (v == 0).double().mean(-1)
        found = {name: (f(flat), f(data)) for name, f in defaults.items()}
    hidden = ~site.valid.reshape(
        *site.valid.shape, *(1,) * (site.observed.dim() - site.valid.dim())
    )
    for name, function in functions.items():
        values = [
            _number(site.name, name, function(each.double().masked_fill(hidden, math.nan)))
            for each in (site.observed, *progress(list(site.draws), f"statistic {name}"))
        ]
        found[name] = (torch.tensor(values[1:]), torch.tensor(values[0]))
    return {name: _p_value(*pair) for name, pair in found.items()}


def _concentration(x: Tensor) -> Tensor:
    """Length of the mean of unit vectors, 0 to 1."""
    return torch.hypot(x.cos().mean(-1), x.sin().mean(-1))


def _number(site: str, name: str, value: Any) -> float:
    number = torch.as_tensor(value, dtype=torch.float64)
    if number.numel() != 1 or bool(number.isnan()):
        raise DataError(
            f"statistic '{name}' of site '{site}' must be one number that is not NaN (masked "
            f"numbers are: use nanmean and the like), got {value!r}"
        )
    return float(number)


def _p_value(replicated: Tensor, data: Tensor) -> tuple[float, float, float]:
    p = (replicated > data).double().mean() + (replicated == data).double().mean() / 2
    return float(data), float(replicated.mean()), float(p)


def _base_name(fn: Any) -> str:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__


def _kind(fn: Any) -> str:
    name = _base_name(fn)
    if "Categorical" in name:
        return "categorical"
    if name in CIRCULAR:
        return "circular"
    if not getattr(fn.support, "is_discrete", False):
        return "continuous"
    return "binary" if "Bernoulli" in name else "discrete"


def _has(fn: Any, moment: str) -> bool:
    """Whether a distribution's mean or variance is finite; taken as such where it is unknown."""
    try:
        return bool(getattr(fn, moment).isfinite().all())
    except NotImplementedError:
        return True


def _around(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Angles from the mean direction of each prediction, in [-pi, pi): the cut is opposite."""
    centre = torch.atan2((weights * x.sin()).sum(0), (weights * x.cos()).sum(0))
    first, second = (torch.remainder(v - centre + math.pi, 2 * math.pi) - math.pi for v in (x, y))
    return first, second
