"""Fits side by side: guides of one model, or models of the same data."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvi.diagnostics import Loo, diagnose, loo, posterior_evidence
from pvi.errors import DataError, PviError
from pvi.posterior import Posterior
from pvi.progress import progress
from pvi.text import table as text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Entry:
    """One fit; what is not available is NaN. All in nats but `khat`, `parameters` and `seconds`.

    `elpd_diff` is to the best fit, and `diff_se` its standard error over data, from the paired
    differences datum by datum. `seconds` are those of the fit.
    """

    name: str
    verdict: str
    khat: float
    bound: float
    bound_se: float
    evidence: float
    evidence_se: float
    elpd: float
    elpd_se: float
    elpd_diff: float
    diff_se: float
    parameters: int
    seconds: float


COLUMNS = tuple(field.name for field in fields(Entry))


@dataclass(frozen=True)
class Comparison:
    """Fits side by side.

    Attributes:
        entries: The best `elpd` first, then by the bound.
        reasons: What is not available or not reliable, and why.
        loos: The `Loo` of each fit that has one, by name.
    """

    entries: tuple[Entry, ...]
    reasons: tuple[str, ...]
    loos: Mapping[str, Loo]

    def to_pandas(self) -> Any:
        """A pandas DataFrame indexed by name."""
        import pandas as pd

        rows = [asdict(entry) for entry in self.entries]
        return pd.DataFrame(rows, columns=COLUMNS).set_index("name")

    def plot(self) -> "Figure":
        """Bounds, evidence and leave-one-out densities with their errors; see `pvi.plots`."""
        from pvi.plots.compare import plot_compare

        return plot_compare(self.entries)

    def __str__(self) -> str:
        header = [
            "",
            "verdict",
            "khat",
            "bound",
            "evidence",
            "elpd_loo",
            "difference",
            "parameters",
        ]
        cells = [
            [
                e.name,
                e.verdict,
                f"{e.khat:.2f}",
                _with_error(e.bound, e.bound_se),
                _with_error(e.evidence, e.evidence_se),
                _with_error(e.elpd, e.elpd_se),
                _with_error(e.elpd_diff, e.diff_se),
                f"{e.parameters:,}",
            ]
            for e in self.entries
        ]
        timed = not all(math.isnan(e.seconds) for e in self.entries)
        if timed:
            header.append("seconds")
            for row, e in zip(cells, self.entries, strict=True):
                row.append(f"{e.seconds:.1f}")
        return "\n".join([text_table(header, cells), *(f"- {reason}" for reason in self.reasons)])


def _with_error(value: float, se: float) -> str:
    if math.isnan(value):
        return "nan"
    return f"{value:.2f}" if math.isnan(se) else f"{value:.2f} +- {se:.2g}"


def compare(
    fits: Mapping[str, Any], *, num_draws: int = 20_000, loo_draws: int = 4000, seed: int = 0
) -> Comparison:
    r"""Put fits of the same data side by side: bound, evidence, leave-one-out density, verdict.

    .. math:: \Delta = \sum_i d_i, \quad \mathrm{se}(\Delta) = \sqrt{n\,\mathrm{Var}_i\, d_i},
        \qquad d_i = \log p_a(y_i \mid y_{-i}) - \log p_b(y_i \mid y_{-i})

    Guides of one model are ranked by the bound; models by evidence and by the leave-one-out
    density, which should not depend on the guide beyond its Monte Carlo error.

    Args:
        fits: Name -> `Fit` or `Posterior`, of the same observations.
        num_draws: Of each guide, for bound, khat and verdict.
        loo_draws: As `num_draws` of `loo`.
        seed: Of the draws.

    Returns:
        A table; `print` it. What is not available is NaN, and the reasons say why.

    Raises:
        DataError: Fewer than two fits, or fits of different observations.

    Reference:
        Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC, Statistics and Computing 27, section 5.
    """
    posteriors = {name: getattr(fit, "posterior", fit) for name, fit in dict(fits).items()}
    if len(posteriors) < 2 or not all(isinstance(p, Posterior) for p in posteriors.values()):
        raise DataError("compare needs a dict of two or more fits: {'name': fit, 'other': fit}")
    _check_data(posteriors)
    reasons: list[str] = []
    loos: dict[str, Loo] = {}
    found = []
    for name in progress(list(posteriors), "compare"):
        entry = _entry(name, fits[name], posteriors[name], num_draws, seed, reasons)
        one = _tried(name, "loo", reasons, lambda n=name: loo(posteriors[n], loo_draws, seed=seed))
        if one is not None:
            loos[name] = one
            entry |= {"elpd": one.elpd, "elpd_se": one.se}
        found.append(entry)
    _differences(found, loos, reasons)
    found.sort(key=lambda e: [-math.inf if math.isnan(e[k]) else e[k] for k in ("elpd", "bound")])
    return Comparison(tuple(Entry(**entry) for entry in found[::-1]), tuple(reasons), loos)


def _tried(name: str, what: str, reasons: list[str], make: Callable[[], Any]) -> Any:
    """What `make` returns, or `None`; either way, reasons not to rely on it are noted."""
    try:
        found = make()
    except PviError as error:
        reasons.append(f"{name}: no {what}: {error}")
        return None
    reasons += [f"{name}: {what}: {reason}" for reason in found.reasons if not found.reliable]
    return found


def _entry(
    name: str, fit: Any, posterior: Posterior, num_draws: int, seed: int, reasons: list[str]
) -> dict[str, Any]:
    """All columns but those of leave-one-out."""
    diagnosis = diagnose(fit, num_draws, seed=seed)
    if diagnosis.verdict != "good":
        reasons += [f"{name}: {diagnosis.verdict}: {reason}" for reason in diagnosis.reasons]
    evidence = _tried(name, "evidence", reasons, lambda: posterior_evidence(posterior, seed=seed))
    trained = [x for x in posterior.params.tensors().values() if x.requires_grad]
    empty = dict.fromkeys(COLUMNS, math.nan)
    return empty | {
        "name": name,
        "verdict": diagnosis.verdict,
        "khat": diagnosis.khat,
        "bound": diagnosis.bound,
        "bound_se": diagnosis.bound_se,
        "evidence": math.nan if evidence is None else evidence.total,
        "evidence_se": math.nan if evidence is None else evidence.total_se,
        "parameters": sum(x.numel() for x in trained),
        "seconds": getattr(fit, "seconds", math.nan),
    }


def _differences(
    entries: list[dict[str, Any]], loos: Mapping[str, Loo], reasons: list[str]
) -> None:
    """Fill in the differences to the best, datum by datum."""
    if not loos:
        return
    best = max(loos, key=lambda name: loos[name].elpd)
    for entry in entries:
        one = loos.get(entry["name"])
        if one is None:
            continue
        if (one.unit, len(one.pointwise)) != (loos[best].unit, len(loos[best].pointwise)):
            reasons.append(
                f"{entry['name']}: no difference to {best}: it leaves out {len(one.pointwise):,} "
                f"{one.unit}, the other {len(loos[best].pointwise):,} {loos[best].unit}"
            )
            continue
        rows = (one.pointwise != 0.0) | (loos[best].pointwise != 0.0)  # the others are masked
        gap = (one.pointwise - loos[best].pointwise)[rows]
        entry["elpd_diff"] = float(gap.sum())
        entry["diff_se"] = float(gap.std() * math.sqrt(len(gap))) if len(gap) > 1 else math.nan


def _check_data(posteriors: Mapping[str, Posterior]) -> None:
    """Refuse fits of different observations: their bounds have nothing to do with each other."""
    seen = {name: _observations(posterior) for name, posterior in posteriors.items()}
    first = next(iter(seen))
    for name, values in seen.items():
        other = seen[first]
        same = len(values) == len(other)
        for a, b in zip(values, other, strict=False):
            same = same and a.shape == b.shape and torch.allclose(a, b, equal_nan=True)
        if not same:
            raise DataError(
                f"'{first}' and '{name}' are fits of different observations ("
                f"{_shapes(other)} and {_shapes(values)}, or other values): bounds, evidence and "
                "predictive densities compare models of the same numbers only, in the same units"
            )


def _observations(posterior: Posterior) -> list[Tensor]:
    runner = posterior.runner
    values = [runner.nodes[name]["value"] for name in runner.observed]
    return sorted((v.detach().cpu().double().flatten() for v in values), key=len)


def _shapes(values: list[Tensor]) -> str:
    return " + ".join(f"{len(v):,}" for v in values) + " numbers"
