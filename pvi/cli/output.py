"""What a fit leaves behind on the screen and on disk, the same for every command."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pvi.diagnostics import Diagnosis
from pvi.fit import Fit
from pvi.plots import plot_bound, plot_forest, plot_ppc
from pvi.report import Section


def heading(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}")


def summary(idata: Any, var_names: Sequence[str] | None = None) -> str:
    """arviz's table of means, sds and intervals, without statistics meant for Markov chains."""
    import arviz

    return str(arviz.summary(idata, var_names=list(var_names) if var_names else None, kind="stats"))


def write(
    fit: Fit,
    diagnosis: Diagnosis,
    idata: Any,
    out: Path,
    *,
    title: str,
    text: str,
    prefix: str = "",
    var_names: Sequence[str] | None = None,
    forest_names: Sequence[str] | None = None,
) -> Section:
    """Save draws and pictures under `out`, print the summary, and describe it all for the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # xarray's, on how netCDF will be encoded
        idata.to_netcdf(str(out / f"{prefix}posterior.nc"))
    figures = [("Bound during training, nats", "bound.png", plot_bound(fit.history))]
    forest = plot_forest(idata, forest_names or var_names)
    figures.append(("Posterior: medians and intervals", "forest.png", forest))
    if _has(idata, "posterior_predictive"):
        ppc = ("Data beside draws from the posterior predictive", "ppc.png", plot_ppc(idata))
        figures.append(ppc)
    for _, name, figure in figures:
        figure.savefig(out / f"{prefix}{name}", dpi=120)
    text_summary = summary(idata, var_names)
    print(text_summary)
    return Section(
        title,
        text,
        diagnosis.verdict,
        (("Diagnosis", str(diagnosis)), ("Summary", text_summary)),
        tuple((caption, out / f"{prefix}{name}") for caption, name, _ in figures),
    )


def _has(idata: Any, group: str) -> bool:
    children = getattr(idata, "children", None)
    return group in (idata.groups() if children is None else children)
