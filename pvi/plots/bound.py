"""The bound over the steps of a fit."""

from typing import TYPE_CHECKING

import numpy as np

from pvi.errors import PviError
from pvi.fit import History
from pvi.plots.figures import new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETTLING = 0.2  # the share of first steps that do not set the range of the axis


def plot_bound(history: History) -> "Figure":
    """The bound at every step with its running mean, and the learning rate below."""
    bound, lr = history["bound"], history["lr"]
    if not np.isfinite(bound).any():
        raise PviError("expected a history with finite bounds, got none: fit for at least one step")
    figure = new_figure(7.0, 4.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    _draw_bound(top, bound)
    _draw_rate(bottom, lr)
    bottom.set_xlabel("step")
    bottom.set_xlim(0, max(len(bound), 2))
    figure.align_ylabels()
    return figure


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred means over `window` entries, fewer at the ends.

    >>> running_mean(np.array([0.0, 3.0, 6.0, 9.0]), 3)
    array([1.5, 3. , 6. , 7.5])
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low = np.maximum(at - window // 2, 0)
    high = np.minimum(at + (window + 1) // 2, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _draw_bound(axes: "Axes", bound: np.ndarray) -> None:
    finite = np.isfinite(bound)
    steps, values = np.arange(1, len(bound) + 1)[finite], bound[finite]
    window = int(np.clip(len(values) // 25, 1, 200))
    mean = running_mean(values, window)
    axes.plot(steps, values, color="C0", alpha=0.35, linewidth=0.6, label="each step")
    label = f"mean of {window:,} steps" if window > 1 else "mean"
    axes.plot(steps, mean, color="C0", linewidth=1.8, label=label)
    axes.set_ylim(_range(values, mean))
    axes.set_ylabel("bound (nats)")
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)
    tidy(axes)


def _range(values: np.ndarray, mean: np.ndarray) -> tuple[float, float]:
    """Limits that show the steps after the first ones, without their rarest outliers."""
    start = int(SETTLING * len(values))
    low, high = np.quantile(values[start:], (0.005, 0.995))
    low, high = min(low, mean[start:].min()), max(high, mean[start:].max())
    margin = 0.08 * (high - low) or max(1.0, 0.01 * abs(high))
    return float(low - margin), float(high + margin)


def _draw_rate(axes: "Axes", lr: np.ndarray) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    positive = np.isfinite(lr) & (lr > 0)
    axes.set_yscale("log")
    axes.set_ylabel("learning\nrate")
    axes.grid(alpha=0.25)
    tidy(axes)
    if positive.any():
        axes.plot(np.arange(1, len(lr) + 1)[positive], lr[positive], color="C1", linewidth=1.2)
        # Whole decades, so that both ends of the strip carry a number.
        low, high = np.log10(lr[positive].min()), np.log10(lr[positive].max())
        axes.set_ylim(10.0 ** np.floor(low - 0.1), 10.0 ** np.ceil(high + 0.1))
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_minor_locator(NullLocator())
