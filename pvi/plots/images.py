"""Rows of small images, to compare data with what a model makes of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pvi.errors import PviError
from pvi.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_images(
    rows: Mapping[str, Any], num_columns: int = 10, titles: Sequence[str] = ()
) -> "Figure":
    """One labelled row of grey-scale images for each entry, all on one scale of grey.

    Args:
        rows: label -> images `(n, h, w)`, of which the first `num_columns` are drawn; NaN stays
            blank.
        titles: above the columns.
    """
    images = {label: _images(label, values)[:num_columns] for label, values in rows.items()}
    if not images or num_columns < 1:
        raise PviError("expected at least one row and one column of images, got none")
    low = min(float(np.nanmin(values)) for values in images.values())
    high = max(float(np.nanmax(values)) for values in images.values())
    columns = max(map(len, images.values()))
    figure = new_figure(1.4 + 0.75 * columns, 0.3 + 0.75 * len(images))
    grid = figure.subplots(len(images), columns, squeeze=False)
    for axes_row, (label, values) in zip(grid, images.items(), strict=True):
        for axes in axes_row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, image in zip(axes_row, values, strict=False):
            axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        axes_row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for axes, title in zip(grid[0], titles, strict=False):
        axes.set_title(title, fontsize=8)
    return figure


def _images(label: str, values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 3 or 0 in array.shape:
        raise PviError(
            f"row '{label}': expected images of shape (n, height, width), got {array.shape}"
        )
    return array
