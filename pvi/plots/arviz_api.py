"""The two arviz APIs behind one: 0.x draws on axes of ours, 1.x makes its own figure."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pvi.figures import check_matplotlib, new_figure
from pvi.posterior.arviz import load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PROBABILITY = 0.94
OBSERVED, PREDICTED = "#000000", "#1f77b4"
COLORS = tuple(f"C{i}" for i in range(10))  # of models side by side: both versions' own order
PANEL = (4.5, 3.2)  # inches


def forest(models: Mapping[str, Any], *, width: float, height: float) -> "Axes":
    """Intervals of each variable of datasets `(chain, draw)`: the axes, with names as y ticks.

    Args:
        models: name -> dataset; they share rows and draws and differ by colour (`COLORS`).
    """
    arviz = _arviz()
    names = list(dict.fromkeys(str(name) for rows in models.values() for name in rows.data_vars))
    if _is_old(arviz):
        axes = new_figure(width, height).subplots()
        arviz.plot_forest(
            list(models.values()),
            model_names=list(models) if len(models) > 1 else None,
            var_names=names,
            combined=True,
            hdi_prob=PROBABILITY,
            colors=list(COLORS[: len(models)]),
            ax=axes,
            textsize=10,
        )
        _plain(axes)
        return axes
    trees = {name: _tree(posterior=rows) for name, rows in models.items()}
    collection = arviz.plot_forest(
        trees if len(trees) > 1 else next(iter(trees.values())),
        var_names=names,
        combined=True,
        point_estimate="median",
        ci_kind="eti",
        ci_probs=(0.5, PROBABILITY),
        labels=[],  # names are ticks here, not texts in a panel of their own
        visuals={
            "remove_axis": False,
            "point_estimate": {"size": 14},
            "twig": {"width": 1.2},
            "trunk": {"width": 2.6},
        },
        backend="matplotlib",
        figure_kwargs=_layout(width, height),
    )
    figure, axes = _take_figure(collection), collection.get_viz("plot", column="forest")
    collection.get_viz("plot", column="labels").remove()
    axes.set_subplotspec(figure.add_gridspec(1, 1)[0])
    heights = collection.get_aes_as_dataset("y")
    axes.set_yticks([float(heights[name].mean()) for name in names], names)
    axes.tick_params(axis="y", left=False, labelleft=True)
    return axes


def ppc(
    predictive: Any, observed: Any, num_draws: int, *, cumulative: bool
) -> tuple["Figure", dict[str, "Axes"]]:
    """Distributions of the observed and the predicted values: the figure, and axes by site."""
    arviz = _arviz()
    names = [str(name) for name in observed.data_vars]
    tree = _tree(posterior_predictive=predictive, observed_data=observed)
    width, height = PANEL[0] * len(names), PANEL[1]
    if _is_old(arviz):
        figure = new_figure(width, height)
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        with _quiet():
            arviz.plot_ppc(
                arviz.InferenceData.from_datatree(tree),
                kind="cumulative" if cumulative else "kde",
                num_pp_samples=num_draws,
                random_seed=0,
                mean=False,
                legend=False,
                colors=[PREDICTED, OBSERVED, PREDICTED],
                ax=panels,
                textsize=10,
            )
        return figure, dict(zip(names, panels, strict=True))
    with _quiet():
        collection = arviz.plot_ppc_dist(
            tree,
            kind="ecdf" if cumulative else "kde",
            num_samples=num_draws,
            backend="matplotlib",
            visuals={
                "predictive_dist": {"color": PREDICTED},
                "observed_dist": {"color": OBSERVED},
                "remove_axis": False,
            },
            figure_kwargs=_layout(width, height),
        )
    return _take_figure(collection), {name: collection.get_viz("plot", name) for name in names}


def _plain(axes: "Axes") -> None:
    """Without the legend and the grey bars that arviz 0.x adds for several models."""
    for artist in [*axes.patches, *filter(None, [axes.get_legend()])]:
        artist.remove()


def legend_line(color: str) -> "Line2D":
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color)


def _arviz() -> Any:  # untyped: each version lacks what the other has
    check_matplotlib()
    return load()


def _is_old(arviz: Any) -> bool:
    return arviz.__version__.startswith("0.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without arviz's uses of old matplotlib and old xarray, and its advice on discrete data."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Passing a dict or None as alias_mapping")
        warnings.filterwarnings("ignore", message="Deleting a single level of a MultiIndex")
        warnings.filterwarnings("ignore", message=".*(binary|discrete).*")
        yield


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
