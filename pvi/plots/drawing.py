"""The two arviz APIs behind one: 0.x draws on axes of ours, 1.x makes its own figure."""

import warnings
from typing import TYPE_CHECKING, Any

from pvi.plots.figures import check_matplotlib, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PROBABILITY = 0.94
OBSERVED, PREDICTED = "black", "C0"
FAINT = 0.25
PANEL = (4.5, 3.2)  # inches


def forest(rows: Any, *, width: float, height: float) -> "Axes":
    """Intervals of each variable of a dataset `(chain, draw)`: the axes that hold the values."""
    import arviz

    if is_old(arviz):
        axes = new_figure(width, height).subplots()
        arviz.plot_forest(rows, combined=True, hdi_prob=PROBABILITY, ax=axes, textsize=10)
        return axes
    check_matplotlib()
    collection = arviz.plot_forest(
        _tree(posterior=rows),
        combined=True,
        point_estimate="median",
        ci_kind="hdi",
        ci_probs=(0.5, PROBABILITY),
        backend="matplotlib",
        figure_kwargs=_layout(width, height),
    )
    _take_figure(collection)
    return collection.get_viz("plot", column="forest")


def ppc(predictive: Any, observed: Any, num_draws: int) -> tuple["Figure", dict[str, "Axes"]]:
    """Distributions of the observed and the predicted values: the figure, and axes by site."""
    import arviz

    names = [str(name) for name in observed.data_vars]
    tree = _tree(posterior_predictive=predictive, observed_data=observed)
    width, height = PANEL[0] * len(names), PANEL[1]
    if is_old(arviz):
        figure = new_figure(width, height)
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        arviz.plot_ppc(
            arviz.InferenceData.from_datatree(tree),
            num_pp_samples=num_draws,
            random_seed=0,
            mean=False,
            legend=False,
            alpha=FAINT,
            colors=[PREDICTED, OBSERVED, PREDICTED],
            ax=panels,
            textsize=10,
        )
        return figure, dict(zip(names, panels, strict=True))
    check_matplotlib()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(binary|discrete).*")
        collection = arviz.plot_ppc_dist(
            tree,
            num_samples=num_draws,
            kind="auto",
            backend="matplotlib",
            visuals={
                "predictive_dist": {"color": PREDICTED, "alpha": FAINT},
                "observed_dist": {"color": OBSERVED},
            },
            figure_kwargs=_layout(width, height),
        )
    return _take_figure(collection), {name: collection.get_viz("plot", name) for name in names}


def legend_line(color: str) -> "Line2D":
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color)


def is_old(arviz: Any) -> bool:
    return arviz.__version__.startswith("0.")


def _tree(**groups: Any) -> Any:
    import xarray

    return xarray.DataTree.from_dict(groups)


def _layout(width: float, height: float) -> dict[str, Any]:
    size = {"figsize": (width, height), "figsize_units": "inches"}
    return {**size, "dpi": 120, "layout": "constrained"}


def _take_figure(collection: Any) -> "Figure":
    """The figure of an arviz 1.x plot, which pyplot then forgets."""
    from matplotlib import pyplot

    figure = collection.get_viz("figure")
    pyplot.close(figure)
    return figure
