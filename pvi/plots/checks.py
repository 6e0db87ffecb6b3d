"""Pictures of a predictive check and of what latents know."""

from typing import TYPE_CHECKING, Any

import numpy as np

from pvi.errors import PviError
from pvi.figures import new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREY = "#1f77b4", "#dddddd"


def plot_pit(check: Any) -> "Figure":
    """ECDF of the PITs minus that of uniform ones, with the simultaneous 95 % band.

    Above 0 on the left and below on the right: too narrow predictions. All above: too high ones.

    Args:
        check: from `pvi.check_predictive`.
    """
    figure, panels = _panels(check, "band")
    for site, axes in panels:
        band = site.band
        axes.fill_between(band.x, band.low - band.x, band.high - band.x, color=GREY, step="mid")
        axes.step(band.x, band.ecdf - band.x, where="mid", color=BLUE)
        axes.axhline(0.0, color="grey", linewidth=0.8)
        axes.set(xlabel=f"PIT of {site.name}", ylabel="ECDF - uniform", xlim=(0, 1))
    return figure


def plot_coverage(check: Any) -> "Figure":
    """Share of data inside the central intervals, two standard errors around, by their level.

    Args:
        check: from `pvi.check_predictive`.
    """
    figure, panels = _panels(check, "coverage")
    for site, axes in panels:
        level, share, se = np.array(site.coverage).T
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.errorbar(level, share, 2 * se, fmt="o", color=BLUE, capsize=3)
        axes.set(xlabel=f"level of intervals of {site.name}", ylabel="share of data inside")
        axes.set(xlim=(0.4, 1), ylim=(min(0.4, float(share.min()) - 0.1), 1.02))
    return figure


def plot_reliability(check: Any) -> "Figure":
    """How often what was predicted with a probability happened; grey: where calibrated ones are.

    Args:
        check: from `pvi.check_predictive`, with a binary or categorical site.
    """
    figure, panels = _panels(check, "reliability")
    for site, axes in panels:
        draw_reliability(axes, site.reliability)
        what = "P(1)" if site.kind == "binary" else "P(most probable class)"
        axes.set(xlabel=f"{what} of {site.name}", ylabel="share")
    return figure


def draw_reliability(axes: "Axes", r: Any) -> None:
    """One reliability diagram.

    Args:
        r: a `pvi.diagnostics.scores.Reliability`.
    """
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.vlines(r.confidence, r.low, r.high, color=GREY, linewidth=6)
    axes.plot(r.confidence, r.frequency, "o", color=BLUE)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"ECE {r.ece:.3f}, calibrated {r.ece_calibrated:.3f}", fontsize=10)


def plot_latents(latents: Any) -> "Figure":
    """KL of each number of each latent site, the largest first; inactive ones in grey.

    Args:
        latents: from `pvi.latents`.
    """
    figure = new_figure(6.0, 2.6 * len(latents.sites))
    for site, axes in zip(latents.sites, _column(figure, len(latents.sites)), strict=True):
        heights, label = site.kl_dims.numpy(), "KL, nats"
        if np.isnan(heights).any():
            heights, label = site.variance.numpy(), "variance of the mean"
        order = np.argsort(-heights)
        colors = [BLUE if site.active[i] else "#bbbbbb" for i in order]
        axes.bar(np.arange(len(order)), heights[order], color=colors)
        if len(order) <= 40:
            axes.set_xticks(np.arange(len(order)), [str(i) for i in order], fontsize=8)
        active = int(site.active.sum())
        axes.set(xlabel=f"{site.name} ({active} of {len(order)} active, blue)", ylabel=label)
        tidy(axes)
    return figure


def _panels(check: Any, what: str) -> tuple["Figure", list[tuple[Any, "Axes"]]]:
    sites = [site for site in check.sites if getattr(site, what)]
    if not sites:
        kinds = {site.name: site.kind for site in check.sites}
        raise PviError(f"no observed site has a {what} here; their kinds are {kinds}")
    figure = new_figure(4.5, 3.2 * len(sites))
    axes = _column(figure, len(sites))
    for each in axes:
        tidy(each)
    return figure, list(zip(sites, axes, strict=True))


def _column(figure: "Figure", count: int) -> list["Axes"]:
    return list(figure.subplots(count, 1, squeeze=False)[:, 0])
