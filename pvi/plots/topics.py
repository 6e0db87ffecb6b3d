"""Topics as pictures: a map, their words, heat maps, courses over time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pvi.errors import PviError
from pvi.figures import new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOR, COLUMNS = "C0", 4
PLAIN: dict[str, Any] = {"parse_math": False}  # names may have dollar signs
LONGEST = 36  # letters of a name
SMALLEST, LARGEST = 40.0, 1500.0  # areas of circles, points squared


def topic_distances(components: Any) -> np.ndarray:
    """Square roots of the Jensen-Shannon divergences of topics `(K, K)`, from 0 to 1 (base 2).

    Args:
        components: p(word | topic) `(K, V)`.

    Reference:
        Endres and Schindelin (2003): these are distances.
    """
    beta = np.asarray(components, dtype=float)
    beta = beta / beta.sum(1, keepdims=True)
    squared = np.zeros((len(beta), len(beta)))
    for k, row in enumerate(beta):
        middle = (beta + row) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = [np.where(p > 0, p * np.log2(p / middle), 0.0) for p in (beta, row)]
        squared[k] = sum(part.sum(1) for part in parts) / 2
    return np.sqrt(squared.clip(0, 1))


def topic_positions(components: Any) -> np.ndarray:
    """Topics in the plane `(K, 2)`, whose distances are like those of their words.

    Classical scaling of `topic_distances`, as in LDAvis.

    Args:
        components: p(word | topic) `(K, V)`.
    """
    squared = topic_distances(components) ** 2
    centre = np.eye(len(squared)) - 1 / len(squared)
    values, vectors = np.linalg.eigh(-centre @ squared @ centre / 2)
    found = np.zeros((len(squared), 2))
    kept = vectors[:, ::-1][:, :2]
    found[:, : kept.shape[1]] = kept * np.sqrt(values[::-1][:2].clip(0))
    largest = np.abs(found).argmax(0)  # the sign of an eigenvector is arbitrary
    return found * np.sign(found[largest, [0, 1]] + (found[largest, [0, 1]] == 0))


def plot_topic_map(components: Any, shares: Any, labels: Sequence[str] = ()) -> "Figure":
    """Topics as circles: similar ones are close, their areas are shares of the corpus.

    Args:
        components: p(word | topic) `(K, V)`.
        shares: of each topic `(K,)`.
        labels: of each topic; by default its number.
    """
    places, sizes = topic_positions(components), np.asarray(shares, dtype=float)
    if sizes.shape != (len(places),):
        raise PviError(f"shares: expected one for each of {len(places)} topics, got {sizes.shape}")
    figure = new_figure(8.0, 6.5)
    axes = figure.subplots()
    area = SMALLEST + (LARGEST - SMALLEST) * sizes / sizes.max()
    axes.scatter(*places.T, s=area, color=COLOR, alpha=0.35, edgecolor=COLOR)
    names = list(labels) or [str(k) for k in range(len(places))]
    _label(axes, places, names, sizes)
    axes.axhline(0, color="grey", linewidth=0.5, zorder=0)
    axes.axvline(0, color="grey", linewidth=0.5, zorder=0)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.14)
    tidy(axes, "left", "bottom")
    return figure


def plot_topic_words(
    words: Sequence[Sequence[str]], weights: Any, titles: Sequence[str] = ()
) -> "Figure":
    """Top words of some topics with their probabilities, a panel a topic.

    Args:
        words: of each topic, best first.
        weights: probabilities, of the same shape.
        titles: of each topic; by default its number.
    """
    values = np.asarray(weights, dtype=float)
    if (
        values.ndim != 2
        or not values.size
        or [len(w) for w in words] != [values.shape[1]] * len(values)
    ):
        raise PviError(f"expected words for weights of shape {values.shape}, one list a topic")
    columns = min(COLUMNS, len(values))
    rows = -(-len(values) // columns)
    figure = new_figure(2.4 * columns, rows * (0.55 + 0.19 * values.shape[1]))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(values) :]:
        axes.set_visible(False)
    for k, (axes, row) in enumerate(zip(grid, values, strict=False)):
        places = np.arange(len(row))[::-1]
        axes.barh(places, row, color=COLOR, alpha=0.7)
        axes.set_yticks(places, _names(words[k]), fontsize=8, **PLAIN)
        axes.set_title(titles[k] if titles else f"topic {k}", fontsize=9, loc="left", **PLAIN)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=7)
        axes.locator_params(axis="x", nbins=3)
        tidy(axes, "left")
    return figure


def plot_topic_heatmap(
    values: Any,
    rows: Sequence[Any],
    columns: Sequence[Any],
    label: str = "mean share",
    lowest: float | None = 0.0,
) -> "Figure":
    """A matrix as colours, such as shares of topics by label.

    Args:
        values: `(R, C)`.
        rows, columns: their names.
        label: of the colours.
        lowest: value of the lightest colour; by default 0, None for the least that there is.
    """
    matrix = np.asarray(values, dtype=float)
    if matrix.shape != (len(rows), len(columns)) or not matrix.size:
        raise PviError(f"expected values ({len(rows)}, {len(columns)}), got {matrix.shape}")
    height = 1.2 + 0.22 * len(rows)
    figure = new_figure(min(14.0, 2.5 + 0.24 * len(columns)), height)
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="Blues", aspect="auto", interpolation="nearest", vmin=lowest)
    axes.set_xticks(range(len(columns)), _names(columns), rotation=90, fontsize=7, **PLAIN)
    axes.set_yticks(range(len(rows)), _names(rows), fontsize=8, **PLAIN)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def plot_topic_similarity(components: Any) -> "Figure":
    """How alike topics are, 1 less their distance, with like topics side by side.

    Args:
        components: p(word | topic) `(K, V)`.
    """
    distances = topic_distances(components)
    order = _chained(distances)
    likeness = 1 - distances[np.ix_(order, order)]
    np.fill_diagonal(likeness, np.nan)  # else nothing but the diagonal is seen
    names = [str(k) for k in order]
    return plot_topic_heatmap(likeness, names, names, "1 - Jensen-Shannon distance", None)


def plot_topics_over_time(
    times: Any, mean: Any, se: Any = None, titles: Sequence[str] = ()
) -> "Figure":
    """The share of each topic in the course of time, a panel a topic, on one scale.

    Args:
        times: numbers or dates `(T,)`.
        mean: shares `(T, K)`.
        se: standard errors, drawn twice on either side.
        titles: of each topic; by default its number.
    """
    values, when = np.asarray(mean, dtype=float), np.asarray(times)
    if values.ndim != 2 or when.shape != (len(values),) or not values.size:
        raise PviError(f"expected mean (T, K) at times (T,), got {values.shape} and {when.shape}")
    number = values.shape[1]
    columns = min(COLUMNS, number)
    rows = -(-number // columns)
    figure = new_figure(2.4 * columns, 0.4 + 1.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in grid[number:]:
        axes.set_visible(False)
    for k in range(number):
        axes = grid[k]
        axes.plot(when, values[:, k], color=COLOR, marker="o", markersize=2.5, linewidth=1)
        if se is not None:
            width = 2 * np.nan_to_num(np.asarray(se, dtype=float)[:, k])
            axes.fill_between(when, values[:, k] - width, values[:, k] + width, alpha=0.2)
        axes.set_title(titles[k] if titles else f"topic {k}", fontsize=8, loc="left", **PLAIN)
        axes.tick_params(labelsize=7)
        _few_dates(axes, when)
        tidy(axes)
    grid[0].set_ylim(bottom=0)
    return figure


def plot_topic_search(
    numbers: Sequence[int], curves: dict[str, Any], chosen: int | None = None
) -> "Figure":
    """Measures against the number of topics, a panel a measure.

    Args:
        numbers: of topics, one a run.
        curves: name of a measure -> its values, one a run; runs of one number are averaged by the
            line, and are points.
        chosen: a number to mark.
    """
    figure = new_figure(3.2 * len(curves), 2.8)
    each = np.asarray(numbers)
    known = np.unique(each)
    for axes, (name, values) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        found = np.asarray(values, dtype=float)
        axes.plot(known, [found[each == k].mean() for k in known], color=COLOR)
        axes.plot(each, found, "o", color=COLOR, markersize=4)
        if chosen is not None:
            axes.axvline(chosen, color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel="number of topics", title=name, xticks=known)
        axes.grid(visible=True, axis="y", alpha=0.25)
        tidy(axes)
    return figure


def _names(given: Sequence[Any]) -> list[str]:
    """Names that leave room for the picture."""
    names = [str(name) for name in given]
    return [
        n if len(n) <= LONGEST else f"{n[: LONGEST // 2]} … {n[-LONGEST // 3 :]}" for n in names
    ]


def _label(axes: "Axes", places: np.ndarray, names: Sequence[str], sizes: np.ndarray) -> None:
    """Names of the largest topics first; where one would lie on another, its number alone."""
    span = np.ptp(places, axis=0).clip(1e-9)
    taken: list[tuple[float, float, int]] = []
    for k in np.argsort(-sizes).tolist():
        x, y = places[k].tolist()
        across, up = places[k] / span
        for name in (str(names[k]), str(k)):
            clear = all(
                abs(across - a) > 0.0068 * (len(name) + length) or abs(up - b) > 0.035
                for a, b, length in taken
            )
            if clear:
                axes.text(x, y, name, ha="center", va="center", fontsize=8, **PLAIN)
                taken.append((across, up, len(name)))
                break


def _chained(distances: np.ndarray) -> list[int]:
    """An order in which neighbours are alike: leaves of a tree of average linkage."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(distances) < 3:
        return list(range(len(distances)))
    return leaves_list(linkage(squareform(distances, checks=False), "average")).tolist()


def _few_dates(axes: "Axes", when: np.ndarray) -> None:
    if when.dtype.kind != "M":
        axes.locator_params(axis="x", nbins=4)
        return
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=2, maxticks=4)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
