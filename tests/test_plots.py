"""Figures show what they are given, and pyplot never hears of them."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pvi.errors import PviError
from pvi.fit import History
from pvi.fit.plot import plot_fit, running_mean
from pvi.page import Bar, Code, Items, Numbers, Picture, Section, Table, write_page
from pvi.plots import (
    arviz_api,
    plot_forest,
    plot_images,
    plot_pairs,
    plot_ppc,
    plot_weights,
    scale_groups,
)

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_pyplot_figures() -> Iterator[None]:
    yield
    assert pyplot.get_fignums() == []


@pytest.fixture(scope="module")
def idata() -> Any:
    """`sigma` is small and narrow, `nu` large, `beta` named, `counts` whole, `many` too long."""
    import arviz
    import xarray

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return scale * RNG.normal(size=(1, 50, *shape))

    draws = ("chain", "draw")
    coords = {"chain": [0], "draw": np.arange(50)}
    posterior = {
        "sigma": (draws, 0.5 + normal(scale=0.01)),
        "beta": ((*draws, "feature"), normal(3, scale=0.2)),
        "nu": (draws, 40 + normal(scale=10.0)),
        "many": ((*draws, "row"), normal(200)),
    }
    predicted = {
        "y": ((*draws, "row"), normal(200)),
        "counts": ((*draws, "row"), RNG.poisson(3.0, (1, 50, 200)).astype(float)),
    }
    observed = {name: (dims[2:], values[0, 0]) for name, (dims, values) in predicted.items()}
    groups = {
        "posterior": xarray.Dataset(posterior, {**coords, "feature": ["age", "bmi", "bp"]}),
        "posterior_predictive": xarray.Dataset(predicted, coords),
        "observed_data": xarray.Dataset(observed),
    }
    tree = xarray.DataTree.from_dict(groups)
    old = arviz.__version__.startswith("0.")
    return arviz.InferenceData.from_datatree(tree) if old else tree


def history(bound: np.ndarray) -> History:
    result = History()
    for i, value in enumerate(bound):
        result.add({"bound": value, "loss": -value, "lr": 0.05 * 0.999**i, "grad_norm": 1.0})
    return result


def texts(figure: Figure) -> list[str]:
    """What a reader can read: labels of axes and ticks, and texts, also in legends."""
    from matplotlib.text import Text

    figure.canvas.draw()
    found = [artist.get_text() for artist in figure.findobj(Text)]  # type: ignore[attr-defined]
    return [text for text in found if text]


def intervals(axes: Any) -> list[np.ndarray]:
    """Ends `(2, 2)` of every drawn interval: lines in arviz 1.x, collections in 0.x."""
    ends = [np.asarray(line.get_xydata(), float) for line in axes.lines]
    ends += [np.asarray(part) for group in axes.collections for part in _segments(group)]
    return [each for each in ends if each.shape == (2, 2) and each[0, 1] == each[1, 1]]


def _segments(group: Any) -> list:
    return group.get_segments() if hasattr(group, "get_segments") else []


def test_bound_shows_the_end_not_the_start() -> None:
    noise = RNG.normal(size=2_000)
    bound = -100.0 - 1e6 * np.exp(-np.arange(2_000) / 20) + noise
    top, rate, bottom = plot_fit(history(bound)).axes
    low, high = top.get_ylim()
    assert -120 < low < noise.min() - 100 + 2
    assert high > -100 + noise[400:].mean()
    assert top.get_ylabel() == "bound (nats)"
    assert (bottom.get_xlabel(), rate.get_yscale()) == ("step", "log")


@pytest.mark.parametrize("bound", [[-3.0], [-3.0] * 10, [np.nan, -3.0, np.inf, -2.0]])
def test_bound_of_odd_histories(bound: list[float], tmp_path: Path) -> None:
    plot_fit(history(np.array(bound))).savefig(tmp_path / "bound.png")


@pytest.mark.parametrize("bound", [[], [np.nan, np.nan]])
def test_bound_needs_a_bound(bound: list[float]) -> None:
    with pytest.raises(PviError, match="finite bounds"):
        plot_fit(history(np.array(bound)))


def test_running_mean_is_one_of_neighbours() -> None:
    values = RNG.normal(size=30)
    expected = [values[max(i - 2, 0) : i + 3].mean() for i in range(30)]
    np.testing.assert_allclose(running_mean(values, 5), expected)


def test_forest_names_each_value(idata: Any) -> None:
    shown = texts(plot_forest(idata, ["beta", "sigma"]))
    assert {"beta[age]", "beta[bmi]", "beta[bp]", "sigma"} <= set(shown)
    assert any("94 %" in text for text in shown)
    assert "nu" not in shown


def test_forest_leaves_out_what_is_too_long(idata: Any) -> None:
    assert not any("many" in text for text in texts(plot_forest(idata)))


def test_forest_compares_posteriors(idata: Any) -> None:
    figure = plot_forest({"first": idata, "second": idata}, ["beta"])
    shown = texts(figure)
    assert shown.count("first") == shown.count("second") == 1  # in the legend only
    assert "beta[age]" in shown


@pytest.mark.parametrize("names", [["sigma"], ["beta", "sigma"]])
@pytest.mark.parametrize("count", [1, 2])
def test_forest_shows_every_row(idata: Any, names: list[str], count: int) -> None:
    models = {f"model {i}": idata for i in range(count)}
    axes = next(a for a in plot_forest(models, names).axes if a.get_xlabel())
    low, high = axes.get_ylim()
    heights = [ends[0, 1] for ends in intervals(axes)]
    assert len(heights) == 2 * count * len(axes.get_yticks())
    assert low < min(heights) and max(heights) < high
    assert len(axes.get_yticks()) == (1 if names == ["sigma"] else 4)


def test_forest_compares_unequal_numbers_of_draws(idata: Any) -> None:
    import xarray

    posterior = getattr(idata["posterior"], "dataset", idata["posterior"])
    few = xarray.DataTree.from_dict({"posterior": posterior.isel(draw=slice(20))})
    axes = next(a for a in plot_forest({"all": idata, "few": few}, ["beta"]).axes if a.get_xlabel())
    drawn = intervals(axes)
    assert len(drawn) == 2 * 3 * 2  # models, values, intervals
    assert np.isfinite(drawn).all()


@pytest.mark.parametrize(("names", "message"), [(["gamma"], "gamma"), (["beta", "delta"], "delta")])
def test_forest_of_unknown_sites(idata: Any, names: list[str], message: str) -> None:
    with pytest.raises(PviError, match=message):
        plot_forest(idata, names)


def test_scale_groups_keep_intervals_visible(idata: Any) -> None:
    groups = scale_groups(idata)
    assert sorted(name for group in groups for name in group) == ["beta", "nu", "sigma"]
    together = {name: group for group in groups for name in group}
    assert "nu" not in together["sigma"]  # 40 +- 10 would make 0.5 +- 0.01 a point
    assert scale_groups(idata, ["beta"]) == [["beta"]]


def test_ppc_has_a_panel_for_each_site(idata: Any, tmp_path: Path) -> None:
    figure = plot_ppc(idata, 20)
    figure.savefig(tmp_path / "ppc.png")
    shown = texts(figure)
    assert {"y", "counts", "share of values up to here", "observed"} <= set(shown)
    assert "20 draws of the predictive" in shown


def test_ppc_of_measurements_is_a_density(idata: Any) -> None:
    import xarray

    groups = {name: idata[name] for name in ("posterior_predictive", "observed_data")}
    only = {name: getattr(group, "dataset", group)[["y"]] for name, group in groups.items()}
    (axes,) = plot_ppc(xarray.DataTree.from_dict(only), 20).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("y", "density")
    drawn = [to_hex(line.get_color()) for line in axes.lines if len(line.get_xdata())]
    assert drawn.count(arviz_api.OBSERVED) == 1
    assert drawn.count(arviz_api.PREDICTED) == 20


def test_ppc_of_labels_shows_their_shares() -> None:
    import xarray

    ones = np.zeros((1, 8, 100))
    ones[..., :30] = 1.0
    dims = ("chain", "draw", "row")
    tree = {
        "posterior_predictive": xarray.Dataset({"label": (dims, ones)}),
        "observed_data": xarray.Dataset({"label": ("row", ones[0, 0])}),
    }
    (axes,) = plot_ppc(xarray.DataTree.from_dict(tree)).axes
    for line in axes.lines:
        shares = np.asarray(line.get_ydata())
        assert not len(shares) or np.abs(shares - 0.7).min() < 0.011  # zeros: 70 of 100
    assert axes.get_ylim()[0] == 0.0


def test_ppc_needs_predictions(idata: Any) -> None:
    import xarray

    only = xarray.DataTree.from_dict(
        {"posterior": xarray.Dataset({"a": (("chain", "draw"), [[1.0]])})}
    )
    with pytest.raises(PviError, match="posterior_predictive"):
        plot_ppc(only)


def test_without_matplotlib_the_extra_is_named(idata: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    calls = (
        lambda: plot_fit(history(np.zeros(3))),
        lambda: plot_forest(idata),
        lambda: plot_ppc(idata),
        lambda: plot_images({"data": np.zeros((1, 8, 8))}),
    )
    for call in calls:
        with pytest.raises(PviError, match=r"pip install 'pvi\[plots\]'"):
            call()


def test_images_share_one_grey_scale() -> None:
    dark, bright = np.zeros((3, 8, 8)), np.full((5, 8, 8), 16.0)
    figure = plot_images({"data": bright, "mean": dark}, num_columns=4)
    pictures = [image for axes in figure.axes for image in axes.images]
    assert len(pictures) == 3 + 4
    assert {image.get_clim() for image in pictures} == {(0.0, 16.0)}
    assert {"data", "mean"} <= set(texts(figure))


@pytest.mark.parametrize("rows", [{}, {"flat": np.zeros((3, 64))}, {"none": np.zeros((0, 8, 8))}])
def test_images_of_wrong_shape(rows: dict) -> None:
    with pytest.raises(PviError, match="expected"):
        plot_images(rows)


def test_colours_are_those_of_arviz(idata: Any) -> None:
    """The legend of a comparison is ours, so the order of colours must be arviz's."""
    many = {"first": idata, "second": plus_one(idata)}
    axes = next(a for a in plot_forest(many, ["sigma"]).axes if a.get_xlabel())
    middles = {to_hex(line.get_color()): np.mean(line.get_xdata()) for line in axes.lines}
    first, second = (middles[to_hex(color)] for color in arviz_api.COLORS[:2])
    assert (first, second) == pytest.approx((0.5, 1.5), abs=0.05)


def plus_one(idata: Any) -> Any:
    import xarray

    posterior = getattr(idata["posterior"], "dataset", idata["posterior"])
    return xarray.DataTree.from_dict({"posterior": posterior + 1.0})


def test_pages_are_one_escaped_file(tmp_path: Path) -> None:
    figure = Figure(figsize=(1, 1))
    picture = Picture.of(figure, "a.png", 'say "hi"')
    table = Table(("<site>", "n"), [["a < b & c", 2], ["d", math.nan], ["e", Bar(2.0)]], "Table")
    sections = [
        Section("<script>", ["One.\n\nTwo $x.", table, picture], "unreliable"),
        Section("Plain", [Items(["<i>"]), Numbers([("a", "<1", "b")]), Code("x < y")]),
        Section("Odd", verdict="not assessed"),
    ]
    page = tmp_path / "index.html"
    write_page(page, "A & B", "lead", sections)
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "a &lt; b &amp; c" in text and "A &amp; B" in text and "&lt;site&gt;" in text
    assert "<li>&lt;i&gt;</li>" in text and "&lt;1" in text and "x &lt; y" in text
    assert '<td class="number">2</td>' in text and '<td class="number"></td>' in text
    assert 'style="width: 100.0%"' in text
    assert 'alt="say &quot;hi&quot;"' in text and "data:image/png;base64," in text
    assert '<span class="badge bad">unreliable</span>' in text
    assert '<span class="badge none">not assessed</span>' in text
    assert text.count('class="badge') == 2
    assert "<p>One.</p>\n<p>Two $x.</p>" in text
    assert "http" not in text  # nothing to load
    picture.save(tmp_path)
    assert (tmp_path / "a.png").read_bytes() == picture.png


def test_pairs_show_regions_of_both(tmp_path: Path) -> None:
    """The weighted region is where the weights say, and the guide's where its draws are."""
    x, y = RNG.normal(size=(2, 4000))
    weights = np.exp(x)  # moves x by one sd
    figure = plot_pairs({"x": x, "y": y, "z<": x + y}, weights / weights.sum())
    assert {"x", "y", "z<", "draws of the guide", "weighted"} <= set(texts(figure))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 6
    pair = next(a for a in panels if a.get_ylabel() == "y")
    regions = [c for c in pair.collections if len(c.get_paths())]
    centers = [c.get_paths()[0].vertices[:, 0].mean() for c in regions]  # of the 94 % lines
    assert centers == pytest.approx([0.0, 1.0], abs=0.3)
    with pytest.raises(PviError, match="at least two"):
        plot_pairs({"x": x})


def test_weights_fall_as_khat_says() -> None:
    """Weights of a Pareto tail k = 0.5 fall by half a decade a decade of ranks."""
    ratios = 0.5 * RNG.exponential(size=20_000)
    (axes,) = plot_weights(ratios).axes
    rank, share = (np.log10(v) for v in axes.lines[0].get_data())
    slope = np.polyfit(rank[30:], share[30:], 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.05)
    assert axes.lines[2].get_ydata()[0] == pytest.approx(1 / 20_000)
