"""How figures are made here, without pyplot."""

from typing import TYPE_CHECKING

from pvi.errors import PviError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure (inches) that lays itself out and that no pyplot window knows of."""
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PviError("plots need matplotlib: pip install 'pvi[plots]'") from error


def tidy(axes: "Axes", *hidden: str) -> None:
    """A light look: no frame at the top, the right and the `hidden` sides."""
    axes.spines[["top", "right", *hidden]].set_visible(False)
    axes.set_axisbelow(True)
