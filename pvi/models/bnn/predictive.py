"""What networks drawn from a posterior predict, before they are averaged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pvi.engine.params import Params
from pvi.engine.traces import preserved_rng
from pvi.posterior import Posterior

Latents = dict[str, Tensor]


def draw_networks(posterior: Posterior, num_draws: int, seed: int | None = None) -> Latents:
    """Weights and what else is shared by all data, `(num_draws, *site)` for each site.

    Args:
        posterior: of a model of `bayesianize`, with a guide of `pvi.guides`.
        num_draws: how many.
        seed: makes it repeatable, and leaves the caller's random state alone.
    """
    if seed is None:
        with evaluating(posterior.params):
            return posterior.guide.sample(num_draws)  # type: ignore[attr-defined]
    with preserved_rng():
        torch.manual_seed(seed)
        return draw_networks(posterior, num_draws)


def predicted(posterior: Posterior, networks: Latents, x: Any, model: Any = None) -> Any:
    r"""The distributions :math:`p(y \mid x_i, w_s)`.

    Args:
        posterior: whose networks they are.
        networks: of `draw_networks`, S of them.
        x: inputs of N rows.
        model: that predicts, by default the posterior's.

    Returns:
        A distribution of batch shape `(S, N)`, with copies `(S, N, copies)`.
    """
    with evaluating(posterior.params):
        return conditional(posterior.model if model is None else model, networks, x)


def conditional(model: Any, networks: Latents, x: Any) -> Any:
    """The same inside of `evaluating`, for a model with the parameters that are in force."""
    num = len(next(iter(networks.values())))
    depth = 3 if model.copies > 1 else 2
    given = {name: value.unsqueeze(1) for name, value in networks.items()}
    with preserved_rng(), pyro.plate("draws", num, dim=-depth):  # y is drawn too, for nobody
        conditioned = pyro.poutine.condition(model, data=given)
        return pyro.poutine.trace(conditioned).get_trace(x).nodes["y"]["fn"]


@contextmanager
def evaluating(params: Params) -> Iterator[None]:
    """Inside: these parameters, no gradients, modules in evaluation mode."""
    with params.scope(), params.evaluation(), torch.no_grad():
        yield


def members_first(values: Tensor, copies: int) -> Tensor:
    """Copies of a network as further draws of one: `(S, N, copies, ...)` to `(S copies, N, ...)`.

    Without copies nothing changes.
    """
    if copies == 1:
        return values
    return torch.cat(values.unbind(2))


def for_members(targets: Tensor, fn: Any) -> Tensor:
    """Targets `(N,)` in a shape that fits a distribution `(S, N)` or `(S, N, copies)`."""
    return targets if len(fn.batch_shape) == 2 else targets.unsqueeze(-1)


def as_numpy(values: Tensor) -> np.ndarray:
    """Values in double precision."""
    return values.double().numpy()
