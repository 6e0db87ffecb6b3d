"""A posterior and its predictions, drawn by arviz."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pvi.errors import PviError
from pvi.figures import check_matplotlib, tidy
from pvi.plots import arviz_api

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = {  # one look for both versions of arviz, in which a few draws can be seen too
    arviz_api.OBSERVED: {"linewidth": 1.8, "alpha": 1.0, "zorder": 3},
    arviz_api.PREDICTED: {"linewidth": 0.8, "alpha": 0.4, "zorder": 2},
}
MAX_ROWS = 60  # sites with more values are left out unless they are asked for
MAX_SPAN = 50  # of an axis, in widths of the narrowest intervals on it


def plot_forest(idata: Any, var_names: Sequence[str] | None = None) -> "Figure":
    """Median, 50 % and 94 % intervals of every value of the latent sites.

    Args:
        idata: from `to_arviz`; or a dict from a name to it, to compare posteriors of one model.
        var_names: the sites to draw; without it, all of at most 60 values.
    """
    many = dict(idata) if isinstance(idata, dict) else {"": idata}
    posteriors = {label: _group(each, "posterior") for label, each in many.items()}
    names = _names(next(iter(posteriors.values())), var_names)
    draws = min(p.sizes["chain"] * p.sizes["draw"] for p in posteriors.values())
    models = {label: _rows(p, names, draws) for label, p in posteriors.items()}
    count = len(next(iter(models.values())))
    height = 1.0 + (0.24 if len(models) == 1 else 0.2 * len(models)) * count
    axes = arviz_api.forest(models, width=7.0, height=height)
    axes.set_title("")
    axes.set_xlabel("value (median, 50 % and 94 % interval)", fontsize=10)
    axes.tick_params(labelsize=10)
    _fit_rows(axes)
    low, high = axes.get_xlim()
    if low < 0.0 < high:
        axes.axvline(0.0, color="grey", linewidth=0.8, zorder=0)
    axes.grid(visible=True, axis="x", alpha=0.25)
    tidy(axes, "left")
    figure: Any = axes.get_figure(root=True)
    if len(models) > 1:
        _legend(figure, dict(zip(models, arviz_api.COLORS, strict=False)))
    return figure


def _fit_rows(axes: "Axes") -> None:
    """Half a row of room above the first and below the last."""
    heights = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    ticks = axes.get_yticks()
    row = np.ptp(ticks) / (len(ticks) - 1) if len(ticks) > 1 else 2 * np.ptp(heights) or 1.0
    axes.set_ylim(heights.min() - 0.5 * row, heights.max() + 0.5 * row)


def scale_groups(idata: Any, var_names: Sequence[str] | None = None) -> list[list[str]]:
    """Sites in groups for one forest each, so that no interval shrinks to a point.

    Args:
        idata, var_names: as for `plot_forest`.
    """
    posterior = _group(idata, "posterior")
    names = _names(posterior, var_names)
    extents = {name: _extent(posterior[name]) for name in names}
    groups: list[list[str]] = []
    for name in names:
        fitting = (g for g in groups if _fit_together([extents[n] for n in (*g, name)]))
        group = next(fitting, None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return groups


def _extent(values: Any) -> tuple[float, float, float]:
    """Lowest and highest end, and the usual width, of a site's 94 % intervals."""
    low, high = np.quantile(values, (0.03, 0.97), axis=(0, 1))
    return float(low.min()), float(high.max()), float(np.median(high - low))


def _fit_together(extents: Sequence[tuple[float, float, float]]) -> bool:
    lows, highs, widths = zip(*extents, strict=True)
    return max(highs) - min(lows) <= MAX_SPAN * min(widths)


def plot_ppc(idata: Any, num_draws: int = 50, var_names: Sequence[str] | None = None) -> "Figure":
    """The observed values among those of `num_draws` data sets from the posterior predictive.

    As densities; as cumulative shares where a site has whole numbers only.

    Args:
        idata: from `to_arviz`.
        num_draws: data sets to draw, at most.
        var_names: the observed sites to draw; all of them without it.
    """
    check_matplotlib()
    from matplotlib.colors import to_hex

    predictive, observed = _group(idata, "posterior_predictive"), _group(idata, "observed_data")
    names = [name for name in observed.data_vars if name in predictive.data_vars]
    names = [name for name in names if var_names is None or name in var_names]
    count = min(num_draws, predictive.sizes["chain"] * predictive.sizes["draw"])
    if not names or count < 1:
        raise PviError("expected observed sites and at least one draw of them, got none")
    # Counts and labels, which models hold as floats, have no density.
    whole = [name for name in names if _is_whole(observed[name]) and _is_whole(predictive[name])]
    predictive, observed = (
        data[names].assign({name: data[name].astype(int) for name in whole})
        for data in (predictive, observed)
    )
    figure, panels = arviz_api.ppc(predictive, observed, count, cumulative=bool(whole))
    for name, axes in panels.items():
        axes.set_title("")
        axes.set_xlabel(name, fontsize=10)
        axes.set_ylabel("share of values up to here" if whole else "density", fontsize=10)
        axes.set_ylim(0.0, 1.02 if whole else None)
        axes.set_yticks([0.0, 0.5, 1.0] if whole else [])
        axes.tick_params(labelsize=10)
        tidy(axes, *([] if whole else ["left"]))
        for line in axes.lines:
            line.set(**LINES[to_hex(line.get_color())])
    draws = f"{count:,} draws of the predictive"
    _legend(figure, {"observed": arviz_api.OBSERVED, draws: arviz_api.PREDICTED})
    return figure


def _legend(figure: "Figure", colors: Mapping[str, str]) -> None:
    """A legend above the axes, from label to colour."""
    lines = [arviz_api.legend_line(color) for color in colors.values()]
    figure.legend(lines, list(colors), loc="outside upper center", ncols=len(lines), frameon=False)


def _names(posterior: Any, var_names: Sequence[str] | None) -> list[str]:
    """The sites to draw: those asked for, else all that are small enough."""
    sizes = {str(name): v[0, 0].size for name, v in posterior.data_vars.items()}
    names = list(var_names or [name for name, size in sizes.items() if size <= MAX_ROWS])
    unknown = [name for name in names if name not in sizes]
    if unknown or not names:
        got = f"{unknown}" if unknown else f"none, and all have more than {MAX_ROWS} values"
        raise PviError(f"var_names: expected some of {list(sizes)}, got {got}")
    return names


def _group(idata: Any, name: str) -> Any:
    """A group as an `xarray.Dataset`, of `InferenceData` and `DataTree` alike."""
    try:
        group = idata[name]
    except KeyError:
        raise PviError(f"expected arviz data with a group '{name}', got none") from None
    return getattr(group, "dataset", group)


def _rows(posterior: Any, names: Sequence[str], num_draws: int) -> Any:
    """A dataset with one scalar variable for each value: `beta[bmi]`, `beta[age]`, ...

    Chains are joined and thinned to `num_draws`, as arviz 1.x compares equal numbers only.
    """
    import xarray

    rows = {}
    for name in names:
        values = posterior[name].transpose("chain", "draw", ...)
        own = values.dims[2:]
        draws = values.values.reshape(1, -1, *values.shape[2:])
        draws = draws[:, np.linspace(0, draws.shape[1] - 1, num_draws).astype(int)]
        for index in np.ndindex(*values.shape[2:]):
            where = ", ".join(str(values[d].values[i]) for d, i in zip(own, index, strict=True))
            row = draws[(slice(None), slice(None), *index)]
            rows[f"{name}[{where}]" if own else name] = (("chain", "draw"), row)
    return xarray.Dataset(rows, {"chain": [0], "draw": np.arange(num_draws)})


def _is_whole(values: Any) -> bool:
    return bool((values == np.round(values)).all())
