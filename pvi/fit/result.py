"""What a fit returns."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pvi.diagnostics import (
    Diagnosis,
    Evidence,
    Sandwich,
    diagnose,
    posterior_evidence,
    posterior_sandwich,
)
from pvi.engine import Objective
from pvi.engine.traces import Program
from pvi.fit.history import History, smoothed
from pvi.fit.restarts import Mode
from pvi.posterior import Posterior
from pvi.posterior.arviz import Course

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAST = 200  # steps in the bound that is shown


@dataclass(frozen=True)
class Fit:
    """A fitted guide, with the posterior it stands for.

    Args:
        model, guide: the programs.
        objective: what was maximised; `None` after `pvi.load` if it held functions or schedules.
        posterior: draws, predictions, log weights.
        history: what was recorded at each step.
        converged: whether the bound was level when the optimisation ended.
        reason: why it did not; empty otherwise.
        modes: what `restarts` has found, the best first; the guide is at the first.
        seed: as given to `pvi.fit`.
        notes: what was done to the fit on its way: steps that were left out because they were not
            finite and where that began, learning rates that were lowered, parameters of an earlier
            step that were restored.
        seconds: that the fit took, with checks, callbacks and validation; NaN if unknown.
        arguments: of `pvi.fit`, as far as they are plain data and not the default.
    """

    model: Program
    guide: Program
    objective: Objective | None
    posterior: Posterior
    history: History
    converged: bool
    reason: str
    seed: int | None = None
    notes: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = ()
    seconds: float = math.nan
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def diagnose(self, num_draws: int = 20_000, **options: Any) -> Diagnosis:
        """May this posterior be trusted? See `pvi.diagnose`.

        Args:
            num_draws: from the guide.
            options: as of `pvi.diagnose`.
        """
        return diagnose(self, num_draws, **options)

    def evidence(self, data: Any = None, **options: Any) -> Evidence:
        """Log evidence of the training data or of others, nats. See `pvi.evidence`.

        Args:
            data: as in `pvi.fit`; the guide must be able to read its latents off other data.
            options: num_samples, method, num_outer, num_chains, num_steps, seed, progress.
        """
        posterior = self.posterior if data is None else self.posterior.on(data)
        return posterior_evidence(posterior, **options)

    def sandwich(self, **options: Any) -> Sandwich:
        """Bounds on the log evidence from both sides, on simulated data. See `pvi.sandwich`.

        Args:
            options: as of `pvi.sandwich`.
        """
        return posterior_sandwich(self.posterior, **options)

    def linear_response(self, **options: Any) -> Posterior:
        """The posterior with the guide's means, and sds and covariances by linear response.

        $$\\mathrm{Cov}(g) = d\\,E_{q^*}[g]/dt$$

        for the density tilted by $t^\\top g$, where g are the sites' numbers: what a factorised
        guide such as `MeanField` lacks.

        Args:
            options: num_draws: fixed draws over which the bound is differentiated twice (1024).

        Returns:
            A posterior like any other, with a `FullRank` guide.

        Raises:
            FitError: a guide that is not normal, too many parameters, or not at the optimum.

        Reference:
            Giordano, Broderick, Jordan 2018.
        """
        from pvi.fit.linear_response import linear_response

        return linear_response(self.posterior, **options)

    def to_arviz(self, num_draws: int = 1000, **options: Any) -> Any:
        """The posterior as arviz opens it, and the fit's course. See `pvi.Posterior.to_arviz`.

        The group `fit_history` holds the columns of `history` with dim `step` (KLs as `kl` with dim
        `site`); the attributes of `posterior` say `converged` (0 or 1), `reason`, `steps`, `bound`
        and `bound_se` (nats).

        Args:
            num_draws: from the guide.
            options: as of `pvi.Posterior.to_arviz`.
        """
        return self.posterior.to_arviz(num_draws, course=self.course(), **options)

    def to_datatree(self, num_draws: int = 1000, **options: Any) -> Any:
        """The same as an `xarray.DataTree`, whatever arviz is installed.

        Args:
            num_draws, options: as in `to_arviz`.
        """
        return self.posterior.to_datatree(num_draws, course=self.course(), **options)

    def course(self) -> Course:
        """How the fit went, as numbers and words for `xarray`."""
        history = self.history
        own = (name for name in history if not name.startswith("kl/"))
        columns = {name.replace("/", "_"): history[name] for name in own}  # as xarray wants it
        bound, se = self._level()
        attrs = {
            "converged": int(self.converged),  # netCDF has no truth values
            "reason": self.reason,
            "steps": len(history),
            "bound": bound,
            "bound_se": se,
            "notes": "; ".join(self.notes),
        }
        return Course(columns, history.kl(), attrs)

    def plot(self) -> "Figure":
        """The course of the fit: bound with its running mean, KL per site, rate, gradient norm.

        Returns:
            A matplotlib figure, which nothing has shown yet: `fit.plot().savefig("fit.png")`. Needs
            the extra `pvi[plots]`.
        """
        from pvi.fit.plot import plot_fit

        return plot_fit(self.history)

    def report(self, path: Any = "report.html", **options: Any) -> Path:
        """Write a page that says whether to trust this posterior, and shows it: one HTML file.

        Verdict and reasons, key numbers, the course of the fit, KL by site, parameters, pictures,
        predictive checks, the model's sites, and what it takes to make the fit again.

        Args:
            path: of the page; it loads nothing from elsewhere.
            options: num_draws: for the verdict, as in `diagnose`; seed: of the draws; title; coords
                and dims: as in `to_arviz`.

        Returns:
            The path.

        Raises:
            PviError: matplotlib is missing: `pip install 'pvi[plots]'`.
        """
        from pvi.fit.report import make_report

        return make_report(self, **options).write(path)

    def _level(self) -> tuple[float, float]:
        """Mean bound of the last steps and its standard error, nats."""
        if not len(self.history):
            return math.nan, math.nan
        bounds = self.history["bound"]
        if "num_draws" in self.history:  # the last are of fresh draws
            bounds = bounds[np.isnan(self.history["num_draws"])]
        if not len(bounds):
            return math.nan, math.nan
        mean, se = smoothed(bounds, 2 * LAST)
        return float(mean[-1]), float(se[-1])

    def save(self, folder: Any) -> None:
        """Write parameters, history and verdict to a folder: safetensors and JSON, no code.

        `pvi.load(folder, model, guide, data)` gives it back. The folder is replaced if it holds a
        saved fit already.

        Raises:
            CheckpointError: the folder holds something else.
            OSError: it can't be written.
        """
        from pvi.fit.saved import save

        save(self, folder)

    def __repr__(self) -> str:
        state = "converged" if self.converged else f"not converged: {self.reason}"
        if self.reason.startswith("stopped early"):
            state = self.reason
        mean, se = self._level()
        spread = f" ± {se:.2g}" if math.isfinite(se) else ""
        bound = f"{mean:.2f}{spread} nats" if len(self.history) else "none"
        notes = f", {len(self.notes)} notes" if self.notes else ""
        return f"Fit({len(self.history)} steps, {state}, bound about {bound}{notes})"
