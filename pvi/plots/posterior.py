"""A posterior and its predictions, drawn by arviz."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pvi.errors import PviError
from pvi.plots import drawing
from pvi.plots.figures import tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 60  # sites with more values are left out unless they are asked for


def plot_forest(idata: Any, var_names: Sequence[str] | None = None) -> "Figure":
    """Median, 50 % and 94 % intervals of every value of the latent sites.

    Args:
        idata: from `to_arviz`.
        var_names: the sites to draw; without it, all of at most 60 values.
    """
    posterior = _group(idata, "posterior")
    sizes = {str(name): v[0, 0].size for name, v in posterior.data_vars.items()}
    names = list(var_names or [name for name, size in sizes.items() if size <= MAX_ROWS])
    unknown = [name for name in names if name not in sizes]
    if unknown or not names:
        got = f"{unknown}" if unknown else f"none, and all have more than {MAX_ROWS} values"
        raise PviError(f"var_names: expected some of {list(sizes)}, got {got}")
    rows = _rows(posterior, names)
    axes = drawing.forest(rows, width=7.0, height=1.0 + 0.24 * len(rows))
    axes.set_title("")
    axes.set_xlabel("value (median, 50 % and 94 % interval)")
    axes.axvline(0.0, color="grey", linewidth=0.8, zorder=0) if _spans_zero(axes) else None
    axes.grid(visible=True, axis="x", alpha=0.25)
    tidy(axes, "left")
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def plot_ppc(idata: Any, num_draws: int = 50) -> "Figure":
    """The observed values among those of `num_draws` data sets from the posterior predictive."""
    predictive, observed = _group(idata, "posterior_predictive"), _group(idata, "observed_data")
    names = [name for name in observed.data_vars if name in predictive.data_vars]
    count = min(num_draws, predictive.sizes["chain"] * predictive.sizes["draw"])
    if not names or count < 1:
        raise PviError("expected observed sites and at least one draw of them, got none")
    # Counts and labels that the model holds as floats want bars, not a smooth curve.
    whole = [name for name in names if _is_whole(observed[name]) and _is_whole(predictive[name])]
    predictive, observed = (
        data[names].assign({name: data[name].astype(int) for name in whole})
        for data in (predictive, observed)
    )
    figure, panels = drawing.ppc(predictive, observed, count)
    for name, axes in panels.items():
        axes.set_title("")
        axes.set_xlabel(str(name))
        axes.set_ylabel("share of values" if name in whole else "density")
        axes.set_yticks([])
        axes.set_ylim(bottom=0.0)
        tidy(axes)
    lines = [drawing.legend_line(color) for color in (drawing.OBSERVED, drawing.PREDICTED)]
    labels = ["observed", f"{count:,} draws of the predictive"]
    figure.legend(lines, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _group(idata: Any, name: str) -> Any:
    """A group as an `xarray.Dataset`, of `InferenceData` and `DataTree` alike."""
    try:
        group = idata[name]
    except KeyError:
        raise PviError(f"expected arviz data with a group '{name}', got none") from None
    return getattr(group, "dataset", group)


def _rows(posterior: Any, names: Sequence[str]) -> Any:
    """A dataset with one scalar variable for each value: `beta[bmi]`, `beta[age]`, ..."""
    import xarray

    rows = {}
    for name in names:
        values = posterior[name]
        own = values.dims[2:]
        for index in np.ndindex(*values.shape[2:]):
            row = values[(slice(None), slice(None), *index)]
            where = ", ".join(str(values[d].values[i]) for d, i in zip(own, index, strict=True))
            rows[f"{name}[{where}]" if own else name] = row.drop_vars(own, errors="ignore")
    return xarray.Dataset(rows)


def _is_whole(values: Any) -> bool:
    return bool((values == np.round(values)).all())


def _spans_zero(axes: Any) -> bool:
    low, high = axes.get_xlim()
    return low < 0.0 < high
