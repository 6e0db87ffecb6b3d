"""Functions drawn from the prior: what a choice of weights' priors means."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvi.engine.traces import deterministic_nodes, nesting_of, particles, preserved_rng, run
from pvi.errors import DataError
from pvi.figures import new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def prior_draws(
    model: Callable[..., Any], x: Any, num_draws: int = 100, *, seed: int | None = None
) -> Tensor:
    """Functions under the prior at given inputs.

    Args:
        model: of `bayesianize`.
        x: inputs as the model takes them, `(N, ...)`.
        seed: makes it repeatable.

    Returns:
        `(num_draws, N, outputs)`; with copies `(num_draws, N, copies, outputs)`.
    """
    with torch.no_grad(), preserved_rng():
        nesting = nesting_of(run(model, (x,), {}))
    with torch.no_grad():
        if seed is None:
            return _draw(model, x, num_draws, nesting)
        with preserved_rng():
            torch.manual_seed(seed)
            return _draw(model, x, num_draws, nesting)


def _draw(model: Callable[..., Any], x: Any, num_draws: int, nesting: int) -> Tensor:
    trace = run(particles(model, num_draws, nesting), (x,), {})
    f = deterministic_nodes(trace)["f"]["value"]
    return f.unsqueeze(0) if num_draws == 1 else f


def plot_prior(
    model: Callable[..., Any], x: Tensor, num_draws: int = 20, *, seed: int | None = 0
) -> "Figure":
    """The first output of functions drawn from the prior, over inputs of one dimension.

    Args:
        model: of `bayesianize`, without copies.
        x: `(N, 1)`, in order.
        num_draws, seed: as of `prior_draws`.
    """
    if x.dim() != 2 or x.shape[1] != 1:
        raise DataError(f"plot_prior needs x of shape (N, 1), got {tuple(x.shape)}")
    draws = prior_draws(model, x, 10 * num_draws, seed=seed)[..., 0]
    low, mid, high = draws.quantile(draws.new_tensor([0.05, 0.5, 0.95]), dim=0)
    figure = new_figure(6.0, 3.2)
    axes = figure.subplots()
    inputs = x[:, 0].cpu()
    axes.fill_between(inputs, low.cpu(), high.cpu(), color="0.9", label="90 % of functions")
    axes.plot(inputs, draws[:num_draws].T.cpu(), color="C0", lw=0.7, alpha=0.7)
    axes.plot(inputs, mid.cpu(), color="k", lw=1.2, label="median")
    axes.set(xlabel="x", ylabel="f(x)")
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    tidy(axes)
    return figure
