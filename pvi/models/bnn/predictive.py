"""What networks drawn from a posterior predict, before they are averaged."""

from typing import Any

import pyro
import torch
from torch import Tensor

from pvi.engine.traces import preserved_rng
from pvi.posterior import Posterior

Latents = dict[str, Tensor]


def draw_networks(posterior: Posterior, num_draws: int, seed: int | None = None) -> Latents:
    """Weights and what else is shared by all data, `(num_draws, *site)` for each site.

    Args:
        posterior: of a model of `bayesianize`.
        num_draws: how many.
        seed: makes it repeatable.
    """
    (x, y), _ = posterior.data.probe()
    few = tuple(part[:1] for part in x) if isinstance(x, tuple | list) else x[:1]
    draws = posterior.on((few, y[:1])).sample(num_draws, seed=seed)
    return {name: value for name, value in draws.items() if name != "f"}


def predicted(posterior: Posterior, networks: Latents, x: Any) -> Any:
    r"""The distributions :math:`p(y \mid x_i, w_s)`.

    Args:
        posterior: whose networks they are.
        networks: of `draw_networks`, S of them.
        x: inputs of N rows.

    Returns:
        A distribution of batch shape `(S, N)`, with copies `(S, N, copies)`.
    """
    model: Any = posterior.model
    num = len(next(iter(networks.values())))
    depth = 3 if model.copies > 1 else 2
    given = {name: value.unsqueeze(1) for name, value in networks.items()}
    # y is drawn on the way, for nobody
    with preserved_rng(), posterior.drawing(None), pyro.plate("draws", num, dim=-depth):
        conditioned = pyro.poutine.condition(model, data=given)
        return pyro.poutine.trace(conditioned).get_trace(x).nodes["y"]["fn"]


def members_first(values: Tensor, copies: int) -> Tensor:
    """Copies of a network as further draws of one: `(S, N, copies, ...)` to `(S copies, N, ...)`.

    Without copies nothing changes.
    """
    if copies == 1:
        return values
    return torch.cat(values.unbind(2))
