"""The course of a fit as figures: nothing is shown, and matplotlib is imported only here."""

from typing import TYPE_CHECKING

import numpy as np

from pvi.errors import PviError
from pvi.figures import new_figure, tidy
from pvi.fit.history import History, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETTLING = 0.2  # the share of first steps that do not set the range of the axis
SITES = 8  # lines in the panel of the KLs


def plot_fit(history: History) -> "Figure":
    """Bound with its running mean and validation, KL of each site, rate and norm of the gradient.

    Args:
        history: of a fit.

    Raises:
        PviError: there is nothing to draw, or matplotlib is missing.
    """
    _check(history)
    kl = {name: x for name, x in history.kl().items() if np.isfinite(x).any()}
    heights = (4, 2.4, 1.4, 1.4) if kl else (4, 1.4, 1.4)
    figure = new_figure(7.5, 1.0 + 0.85 * sum(heights))
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_bound(axes[0], history)
    if kl:
        _draw_kl(axes[1], kl)
    _draw_rate(axes[-2], history)
    _draw_norm(axes[-1], history["grad_norm"])
    _finish(figure, axes[-1], len(history))
    return figure


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred means over `window` entries, fewer at the ends; others than numbers are left out.

    Args:
        values: one a step.
        window: how many steps.

    >>> running_mean(np.array([0.0, 3.0, 6.0, 9.0]), 3)
    array([1.5, 3. , 6. , 7.5])
    """
    return smoothed(values, window)[0]


def _check(history: History) -> None:
    if not np.isfinite(history["bound"]).any():
        raise PviError("expected a history with finite bounds, got none: fit for at least one step")


def _window(steps: int) -> int:
    return int(np.clip(steps // 25, 1, 200))


def _finish(figure: "Figure", bottom: "Axes", steps: int) -> None:
    bottom.set_xlabel("step")
    bottom.set_xlim(0, max(steps, 2))
    figure.align_ylabels()


def _draw_bound(axes: "Axes", history: History) -> None:
    bound = history["bound"]
    finite = np.isfinite(bound)
    steps, values = np.arange(1, len(bound) + 1)[finite], bound[finite]
    window = _window(len(values))
    mean, se = smoothed(values, window)
    axes.plot(steps, values, color="C0", alpha=0.35, linewidth=0.6, label="each step")
    label = f"mean of {window:,} steps" if window > 1 else "mean"
    axes.plot(steps, mean, color="C0", linewidth=1.8, label=label)
    if np.isfinite(se).any():
        low, high = mean - 2 * se, mean + 2 * se
        axes.fill_between(steps, low, high, color="C0", alpha=0.3, linewidth=0)
    axes.set_ylim(_range(values, mean))
    axes.set_ylabel("bound (nats)")
    axes.ticklabel_format(axis="y", useOffset=False)
    lines = axes.get_lines()
    if "validation_bound" in history:
        lines = [*lines, _draw_validation(axes, history["validation_bound"])]
    axes.grid(alpha=0.25)
    axes.legend(handles=lines, loc="lower right", frameon=False)
    tidy(axes)


def _draw_validation(axes: "Axes", bound: np.ndarray):
    """On an axis of its own: other data, another number of rows."""
    twin = axes.twinx()
    known = np.isfinite(bound)
    steps, values = np.arange(1, len(bound) + 1)[known], bound[known]
    style = {"color": "C3", "linewidth": 1.0, "marker": "o", "markersize": 3.0}
    (line,) = twin.plot(steps, values, label="validation (right axis)", **style)
    if len(values):
        best = int(values.argmax())
        ring = {"markerfacecolor": "none", "markeredgecolor": "C3", "markersize": 9.0}
        twin.plot(steps[best], values[best], marker="o", linestyle="none", **ring)
        low, high = _range(values, values)
        twin.set_ylim(low, max(high, values[best] + 0.05 * (values[best] - low)))
    twin.set_ylabel("validation bound (nats)", color="C3")
    twin.tick_params(axis="y", colors="C3")
    twin.ticklabel_format(axis="y", useOffset=False)
    twin.spines[["top"]].set_visible(False)
    return line


def _range(values: np.ndarray, mean: np.ndarray) -> tuple[float, float]:
    """Limits that show the steps after the first ones, without their rarest outliers."""
    start = int(SETTLING * len(values))
    low, high = np.quantile(values[start:], (0.005, 0.995))
    low, high = min(low, mean[start:].min()), max(high, mean[start:].max())
    margin = 0.08 * (high - low) or max(1.0, 0.01 * abs(high))
    return float(low - margin), float(high + margin)


def _draw_kl(axes: "Axes", kl: dict[str, np.ndarray]) -> None:
    """The sites with the largest KLs at the end, and the sum of the others."""
    window = _window(len(next(iter(kl.values()))))
    means = {name: running_mean(x, window) for name, x in kl.items()}
    order = sorted(means, key=lambda name: -np.nan_to_num(means[name][-1]))
    shown = order if len(order) <= SITES else order[: SITES - 1]
    lines = {name: means[name] for name in shown}
    if len(shown) < len(order):
        lines[f"{len(order) - len(shown)} others"] = np.sum(
            [means[n] for n in order[len(shown) :]], 0
        )
    for i, (name, mean) in enumerate(lines.items()):
        label = name if len(name) <= 24 else f"{name[:22]}..."
        axes.plot(np.arange(1, len(mean) + 1), mean, color=f"C{i}", linewidth=1.4, label=label)
    ends = np.array([mean[int(SETTLING * len(mean)) :] for mean in lines.values()])
    if np.isfinite(ends).any():
        axes.set_ylim(_range(*(ends[np.isfinite(ends)],) * 2))
    axes.set_ylabel("KL (nats)")
    axes.grid(alpha=0.25)
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axes.legend(frameon=False, fontsize="small", **place)
    tidy(axes)


def _draw_rate(axes: "Axes", history: History) -> None:
    """The learning rate, or on the deterministic route the number of fixed draws."""
    if "num_draws" in history:
        _draw_log(axes, history["num_draws"], "fixed\ndraws", "C1")
    else:
        _draw_log(axes, history["lr"], "learning\nrate", "C1")


def _draw_norm(axes: "Axes", norm: np.ndarray) -> None:
    positive = np.isfinite(norm) & (norm > 0)
    steps = np.arange(1, len(norm) + 1)[positive]
    axes.plot(steps, norm[positive], color="C2", alpha=0.35, linewidth=0.6)
    logs = running_mean(np.log(np.where(positive, norm, np.nan)), _window(len(norm)))
    _draw_log(axes, np.exp(logs), "gradient\nnorm", "C2")


def _draw_log(axes: "Axes", values: np.ndarray, label: str, color: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    positive = np.isfinite(values) & (values > 0)
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    tidy(axes)
    if positive.any():
        steps = np.arange(1, len(values) + 1)[positive]
        axes.plot(steps, values[positive], color=color, linewidth=1.2)
        # Whole decades, so that both ends of the strip carry a number.
        low, high = np.log10(values[positive].min()), np.log10(values[positive].max())
        axes.set_ylim(10.0 ** np.floor(low - 0.1), 10.0 ** np.ceil(high + 0.1))
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_minor_locator(NullLocator())
