"""Does the model predict data like these? Test statistics, PITs, coverage and scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvi.diagnostics import predictions
from pvi.diagnostics.site_check import EVEN, SiteCheck, Statistic, check_site
from pvi.errors import DataError
from pvi.posterior.psis import khat_threshold, psis


@dataclass(frozen=True)
class PredictiveCheck:
    """What `check_predictive` found; `print` it, or plot it by `pvi.plots`.

    Attributes:
        sites: One `SiteCheck` for each observed site.
        how: Which data and which draws.
        num_draws: Draws S.
        notes: What to keep in mind.
    """

    sites: tuple[SiteCheck, ...]
    how: str
    num_draws: int
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> SiteCheck:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"'{name}' is none of the observed sites {[s.name for s in self.sites]}")

    def to_pandas(self) -> Any:
        """Scores, coverage and p-values as a DataFrame, one row a site."""
        import pandas as pd

        rows = {}
        for s in self.sites:
            shares = {f"coverage_{level:.0%}": share for level, share, _ in s.coverage}
            p = {f"p_{name}": row[-1] for name, row in s.statistics.items()}
            rows[s.name] = {"kind": s.kind, "num": s.num, **s.scores(), **shares, **p}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("site")

    def __str__(self) -> str:
        head = f"{self.how}, {self.num_draws:,} draws"
        return "\n".join([head, *map(str, self.sites), *(f"note: {n}" for n in self.notes)])


def check_predictive(
    target: Any,
    data: Any = None,
    *,
    args: tuple | None = None,
    kwargs: Mapping[str, Any] | None = None,
    sites: list[str] | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    local: str = "auto",
    num_draws: int = 1000,
    seed: int = 0,
) -> PredictiveCheck:
    r"""Compare data with what the posterior predicts of them.

    On the training data PITs, coverage and scores are leave-one-out: draw s counts for datum i with
    the smoothed weight

    .. math:: w_{si} \propto \frac{p(y, \theta_s)}{q(\theta_s)} \, \frac{1}{p(y_i \mid \theta_s)},

    the first factor only where PSIS can carry it. On held-out data all draws count the same. The
    log score of a datum is :math:`\log \sum_s w_{si} \, p(y_i \mid \theta_s)`.

    Args:
        target: A `Posterior` or a `Fit`.
        data: Held-out data, as in `pvi.fit`, with the outcome; by default the training data.
        args, kwargs: Constants of the model there, by default those of the posterior.
        sites: Observed sites to look at; all by default.
        statistics: Name -> function of the site's data `(*batch, *event)` (masked numbers are NaN)
            that returns one number; besides mean, sd, min, max and the share of zeros.
        local: Latents that belong to single rows: "posterior" draws them from the guide, which has
            seen their rows, so that predictions are too good; "prior" from the model given the
            latents shared by all rows, so that densities are integrated over them. "auto" is
            "prior" on held-out data, else "posterior".
        num_draws: Draws S; fewer where predictions would fill the memory, which `num_draws` of the
            result says.
        seed: Of the draws and of the randomised PITs.

    Returns:
        One check for each observed site.

    Raises:
        DataError: No observed site, data that do not fit, NaN that is not masked.

    Reference:
        Gelman, Meng, Stern (1996), Posterior Predictive Assessment; Vehtari, Gelman, Gabry (2017),
        Practical Bayesian Model Evaluation Using Leave-One-Out; Marshall, Spiegelhalter (2007),
        Identifying Outliers in Bayesian Hierarchical Models (draws from the prior of local
        latents).
    """
    posterior = getattr(target, "posterior", target)
    if local not in ("auto", "posterior", "prior"):
        raise DataError(f"local must be 'auto', 'posterior' or 'prior', got {local!r}")
    found, how, notes = _predict(posterior, data, args, kwargs, local, num_draws, seed)
    unknown = sorted(set(sites or ()) - {p.name for p in found.sites})
    if unknown or not found.sites:
        names = [p.name for p in found.sites]
        raise DataError(f"sites: expected some of the observed sites {names}, got {unknown}")
    chosen = [p for p in found.sites if sites is None or p.name in sites]
    loo = data is None and not found.local
    base = _base_weights(found.log_ratios, found.num_draws)
    if loo and base is None and posterior.caveats() == []:
        notes.append("the weights log p - log q can't be carried: the guide is taken at its word")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        checks = [check_site(p, base, loo, statistics or {}) for p in chosen]
    return PredictiveCheck(tuple(checks), how, found.num_draws, tuple(notes))


def _predict(
    posterior: Any, data: Any, args: Any, kwargs: Any, local: str, num_draws: int, seed: int
) -> tuple[predictions.Predictions, str, list[str]]:
    """The predictions, in words how they were made, and notes."""
    redraw = local == "prior" or (local == "auto" and data is not None)
    if data is not None and not redraw:
        posterior = posterior.on(data, args=args, kwargs=kwargs)
    notes: list[str] = []
    where = "training data" if data is None else "held-out data"
    with posterior.drawing(seed) as runner:
        rows = posterior.data.size
        own = set(runner.latent) - set(runner.shared(runner.latent, rows)) if rows else set()
        if redraw and (own or data is not None):
            new = (
                posterior.data if data is None else predictions.read(posterior, data, args, kwargs)
            )
            found = predictions.redrawn(posterior, runner, new, num_draws)
            if found.local:
                where += f", {', '.join(found.local)} from the prior of each row"
            return found, where, notes
        if own:
            notes.append(
                f"given the guide's draws of {', '.join(sorted(own))}, which have seen the row "
                "that they predict: scores are too good. local='prior' integrates over them"
            )
        posterior.data.whole()
        weigh = data is None and not posterior.caveats()
        found = predictions.given(runner, num_draws, weigh)
    return found, where + (", leave-one-out" if data is None else ""), notes


def _base_weights(log_ratios: Tensor | None, num_draws: int) -> Tensor | None:
    """The log ratios that correct the guide, where PSIS can carry them."""
    if log_ratios is None or bool((log_ratios.isnan() | log_ratios.isposinf()).any()):
        return None
    ratios = log_ratios.double()
    if bool(ratios.isneginf().all()):
        return None
    if float(ratios.std()) < EVEN:
        return torch.zeros_like(ratios)
    return None if psis(ratios).khat >= khat_threshold(num_draws) else ratios
