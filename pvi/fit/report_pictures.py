"""The sections of a report that are pictures."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pvi.fit.plot import plot_fit
from pvi.fit.report_tables import scalars
from pvi.page import Part, Picture, Section, Table
from pvi.plots import plot_forest, plot_pairs, plot_ppc, plot_weights, scale_groups
from pvi.posterior.psis import khat_threshold, psis

if TYPE_CHECKING:
    from pvi.fit.report import Material

FORESTS, FOREST_ROWS = 4, 60  # pictures, and rows in all of them
PAIRED, COMPARED = 5, 200  # scalars in the picture of pairs, of how many
SEVERAL, DRAWN = 5, 50  # observed values that have a distribution, predicted data sets beside it
PPC_SITES, PPC_ROWS = 6, 20_000  # observed sites, and values of each, in the predictive checks


def course(m: "Material") -> Section:
    """The bound at each step; the modes, if the fit has looked for some."""
    history, fit = m.fit.history, m.fit
    state = "The fit has converged." if fit.converged else f"Not converged: {fit.reason}."
    parts: list[Part | str] = [state]
    if len(history):
        alt = f"Bound of {len(history):,} steps, with KLs, rate or number of draws, and gradient"
        parts.append(_drawn(lambda: plot_fit(history), "bound.png", "Bound and KLs, nats", alt))
    if fit.modes:
        rows = [[str(i), x.bound, x.share, _words(x.mean)] for i, x in enumerate(fit.modes, 1)]
        header = ("mode", "bound (nats)", "share of the mass", "means")
        parts.append(Table(header, rows, "Modes that restarts have found; the guide is at mode 1"))
    return Section("Course of the fit", parts)


def _words(mean: Mapping[str, Tensor]) -> str:
    """The first numbers of a mode."""
    flat = {name: x.reshape(-1).tolist() for name, x in list(mean.items())[:6]}
    texts = [
        f"{name} {', '.join(f'{v:.3g}' for v in xs[:4])}{', ...' if len(xs) > 4 else ''}"
        for name, xs in flat.items()
    ]
    return "; ".join([*texts, *["..."] * (len(mean) > 6)])


def _drawn(draw: Callable[[], Any], name: str, caption: str, alt: str = "") -> Part | str:
    """A picture; where it can't be drawn, a sentence that says why: the verdict is worth more."""
    try:
        return Picture.of(draw(), name, caption, alt)
    except Exception as error:
        return f"{caption}: this picture could not be drawn ({type(error).__name__}: {error})."


def posterior(m: "Material") -> Section:
    """Intervals of the small sites, and the scalars that move or correlate most in pairs."""
    parts = [*_forests(m), *_pairs(m)]
    return Section("Posterior", parts or ["There are too few scalars to draw."])


def _forests(m: "Material") -> list[Part | str]:
    if m.tree is None or "posterior" not in m.tree.children:
        return []
    shapes = {str(n): v[0, 0].size for n, v in m.tree["posterior"].data_vars.items()}
    names, rows = [], 0
    for name, size in sorted(shapes.items(), key=lambda item: item[1]):
        rows += size
        if rows > FOREST_ROWS:
            break
        names.append(name)
    if not names:
        return [f"No site has at most {FOREST_ROWS} values, so their intervals are not drawn."]
    models = {"guide": m.tree}
    if m.diagnosis.verdict == "correctable":
        models["weighted"] = _resampled(m.tree)
    groups = scale_groups(m.tree, [name for name in shapes if name in names])
    parts: list[Part | str] = []
    for i, group in enumerate(groups[:FORESTS]):
        file = "forest.png" if i == 0 else f"forest-{i + 1}.png"
        given = models if len(models) > 1 else m.tree
        alt = f"Median, 50 % and 94 % interval of every value of {', '.join(group)}"
        caption = f"Posterior: {', '.join(group)}"
        parts.append(_drawn(lambda x=given, g=group: plot_forest(x, g), file, caption, alt))
    hidden = [name for name in shapes if not any(name in group for group in groups[:FORESTS])]
    return [*parts, *_not_drawn(hidden)]


def _not_drawn(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return [f"Intervals not drawn, for lack of room: {', '.join(names[:10])}{more}."]


def _resampled(tree: Any) -> Any:
    """Draws from the draws, by their smoothed weights."""
    import torch
    import xarray

    stats = tree["sample_stats"]
    ratios = torch.as_tensor((stats["log_p"] - stats["log_q"]).values[0].astype(float))
    weights = psis(ratios).log_weights.exp().numpy()
    chosen = np.random.default_rng(0).choice(len(weights), len(weights), p=weights)
    draws = tree["posterior"].dataset.isel(draw=chosen)
    draws = draws.assign_coords(draw=np.arange(len(chosen)))
    return xarray.DataTree.from_dict({"posterior": draws})


def _pairs(m: "Material") -> list[Part | str]:
    draws = {name: x.numpy() for name, x in list(scalars(m).items())[:COMPARED]}
    size = max((len(x) for x in draws.values()), default=0)
    draws = {name: x for name, x in draws.items() if len(x) == size and _is_continuous(x)}
    if len(draws) < 2:
        return []
    weights = None
    if m.ratios is not None and m.diagnosis.verdict in ("good", "correctable"):
        weights = psis(m.ratios).log_weights.exp().numpy()
    names = _most_telling(m, draws, weights)
    caption = "Pairs of scalars: regions that hold 50 % and 94 %, and single draws"
    alt = f"Draws of {', '.join(names)} against each other"
    chosen = {name: draws[name] for name in names}
    return [_drawn(lambda: plot_pairs(chosen, weights), "pairs.png", caption, alt)]


def _is_continuous(x: np.ndarray) -> bool:
    return bool(
        np.isfinite(x).all() and np.ptp(x) > 1e-10 * abs(x.mean()) and (x != x.round()).any()
    )


def _most_telling(m: "Material", draws: Mapping[str, np.ndarray], weights: Any) -> list[str]:
    """The scalars that the weights move most or that correlate most, in the model's order."""
    names = list(draws)
    correlation = np.cov(np.stack(list(draws.values())), aweights=weights)
    sd = np.sqrt(np.diag(correlation))
    correlation = np.abs(correlation / np.outer(sd, sd))
    np.fill_diagonal(correlation, 0.0)
    score = dict(zip(names, np.nan_to_num(correlation.max(0)), strict=True))
    for row in m.diagnosis.table:
        if row.name in score and not math.isnan(row.shift):
            score[row.name] = max(score[row.name], abs(row.shift), abs(row.sd_ratio - 1.0))
    best = sorted(names, key=lambda name: -score[name])[:PAIRED]
    return [name for name in names if name in best]


def predictive(m: "Material") -> Section:
    """The observed values among predicted ones, site by site."""
    title = "Does the model predict data like these?"
    if m.tree is None:
        return Section(title, ["Not checked here: the data are not in memory."])
    if "observed_data" not in m.tree.children:
        return Section(title, ["The model has no observed site to compare predictions with."])
    if "posterior_predictive" not in m.tree.children:
        return Section(title, ["The data are too many to predict all of them here."])
    thinned, note = _thinned(m.tree)
    names = [str(name) for name in m.tree["observed_data"].data_vars]
    parts: list[Part | str] = [
        "The verdict is about the posterior of this model; here the model itself is on trial: data "
        "sets that it predicts should look like the one that was observed."
    ]
    single = [name for name in names if thinned["observed_data"][name].size < SEVERAL]
    if single:
        header = ("observed value", "observed", "predicted: 3 %", "median", "97 %")
        parts.append(Table(header, [row for name in single for row in _values(thinned, name)]))
    names = [name for name in names if name not in single]
    for i, name in enumerate(names[:PPC_SITES]):
        file = "ppc.png" if i == 0 else f"ppc-{i + 1}.png"
        caption = f"Posterior predictive check: {name}"
        alt = f"Distribution of the observed {name} among those of predicted data sets"
        parts.append(_drawn(lambda n=name: plot_ppc(thinned, DRAWN, [n]), file, caption, alt))
    if len(names) > PPC_SITES:
        parts.append(f"Sites not drawn: {', '.join(names[PPC_SITES:])}.")
    return Section(title, [*parts, *note])


def _values(tree: Any, name: str) -> list[list[Any]]:
    """Single observed values, which have no distribution, among the predicted ones."""
    observed, predicted = tree["observed_data"][name].values, tree["posterior_predictive"][name]
    ends = np.quantile(predicted.values.astype(float), (0.03, 0.5, 0.97), axis=(0, 1))
    return [
        [f"{name}[{i}]" if len(observed) > 1 else name, float(x), *map(float, ends[:, i])]
        for i, x in enumerate(observed)
    ]


def _thinned(tree: Any) -> tuple[Any, list[str]]:
    """Observed and predicted values, flat, at most 20,000 of each site, evenly spread."""
    import xarray

    groups: dict[str, dict] = {"observed_data": {}, "posterior_predictive": {}}
    thinned = []
    for name, observed in tree["observed_data"].data_vars.items():
        predicted = tree["posterior_predictive"][name].values
        flat = observed.values.reshape(-1)
        kept = np.flatnonzero(np.isfinite(flat))
        if len(kept) > PPC_ROWS:
            kept = kept[np.linspace(0, len(kept) - 1, PPC_ROWS).astype(int)]
            thinned.append(f"{name} ({len(flat):,})")
        dim = f"{name}_value"
        groups["observed_data"][name] = (dim, flat[kept])
        draws = predicted.reshape(*predicted.shape[:2], -1)
        draws = draws[..., kept] if len(kept) < SEVERAL else draws[:, :DRAWN, kept]
        groups["posterior_predictive"][name] = (("chain", "draw", dim), draws)
    datasets = {name: xarray.Dataset(group) for name, group in groups.items()}
    note = (
        [f"Of {', '.join(thinned)} values {PPC_ROWS:,} are drawn, evenly spread."]
        if thinned
        else []
    )
    return xarray.DataTree.from_dict(datasets), note


def diagnostics(m: "Material") -> Section:
    """The tail of the weights, and what the check can't see."""
    d, ratios = m.diagnosis, m.ratios
    parts: list[Part | str] = []
    if ratios is None or math.isnan(d.khat):
        parts.append("There are no importance weights: the reasons above say why.")
    else:
        limit = khat_threshold(d.num_draws)
        parts.append(
            f"khat {d.khat:.2f} is the index of the weights' upper tail: below {limit:.2f} the "
            f"{d.num_draws:,} draws can be weighted. Their effective number is {d.ess:,.0f}; the "
            f"heaviest draw carries {_heaviest(ratios):.2%} of the weight, where "
            f"{1 / d.num_draws:.2%} would be even."
        )
        alt = "The largest importance weights by rank, raw and smoothed"
        parts.append(_drawn(lambda: plot_weights(ratios), "weights.png", "Largest weights", alt))
    return Section("Importance weights", parts)


def _heaviest(ratios: Tensor) -> float:
    return float((ratios - ratios.logsumexp(0)).exp().max())
