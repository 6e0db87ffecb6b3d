"""Draw the sites that were summed out, given everything else."""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.discrete import _sample_posterior_from_trace
from torch import Tensor

from pvi.engine.enumeration import Enumeration
from pvi.engine.pairing import pair
from pvi.engine.rings import added
from pvi.engine.summation import EnumeratedRun, listed, summed
from pvi.engine.traces import Site, sample_nodes, subset
from pvi.errors import DataError


def draw_summed(guide_trace: Any, model_trace: Any, enumeration: Enumeration) -> dict[str, Tensor]:
    """Draws of the summed sites from $p(k \\mid z, x)$, `(K or none, *shape)`.

    By forward filtering and backward sampling: `pyro.infer.infer_discrete`, on indices in place of
    values, so that a value may be a vector.

    Args:
        guide_trace, model_trace: an enumerated run.
    """
    run = enumeration.run(guide_trace, model_trace)
    order = list(sample_nodes(model_trace))
    known = [n for n in order if _is_known(model_trace.nodes[n], guide_trace, enumeration)]
    trace: Any = poutine.Trace()
    trace.plate_to_symbol, trace.symbol_to_dim = run.plates, model_trace.symbol_to_dim
    for members in run.components(pair(guide_trace, subset(model_trace, known))):
        _check_open(order, known, members)
        for node in _nodes(run, members):
            trace.add_node(node["name"], **node)

    def indices() -> dict[str, Tensor]:
        marked: Any = {"enumerate": "parallel"}
        return {n: pyro.sample(n, run.nodes[n]["fn"], infer=marked) for n in run.summed.values()}

    with poutine.block():
        found = _sample_posterior_from_trace(indices, trace, 1, False)
    return {name: _values(run, name, index) for name, index in found.items()}


def _is_known(node: Mapping, guide_trace: Any, enumeration: Enumeration) -> bool:
    """Whether a site counts: not an outcome that new data leave open, whose mean is 1."""
    inside = node["name"] in guide_trace.nodes or node["name"] in enumeration.summed
    return node["is_observed"] or inside


def _check_open(order: list[str], known: list[str], members: list[Site]) -> None:
    """Refuse observations that may depend on an open outcome: its mean is not taken."""
    opened = next((i for i, name in enumerate(order) if name not in known), len(order))
    late = [s.name for s in members if s.observed and order.index(s.name) > opened]
    if late:
        raise DataError(
            f"'{listed(summed(members))}' can't be drawn given site '{late[0]}' of the new data, "
            f"because site '{order[opened]}' before it has no data and may change it. Give both, "
            "or neither."
        )


def _nodes(run: EnumeratedRun, members: list[Site]) -> list[dict[str, Any]]:
    """The sum as nodes of a trace whose latents are the indices of enumerated values.

    A factor that fits into the one of a summed site is added there, as in `summation`.
    """
    over = {site.name for site in summed(members)}
    nodes: list[dict[str, Any]] = []
    for site in sorted(members, key=lambda site: site.name not in over):
        x: Any = run.log_p(site)
        for host in nodes:
            y = host["packed"]["masked_log_prob"]
            same = frozenset(host["cond_indep_stack"]) == run.frames(site.name)
            if site.name not in over and same and set(x._pyro_dims) <= set(y._pyro_dims):
                host["packed"]["masked_log_prob"] = added([y, x])
                break
        else:
            nodes.append(_node(run, site.name, x, site.name in over))
    return nodes


def _node(run: EnumeratedRun, name: str, log_prob: Tensor, latent: bool) -> dict[str, Any]:
    node, value = run.nodes[name], torch.zeros(())
    if latent:
        indices = torch.arange(len(run.support(name)), device=log_prob.device)
        value = indices.reshape(-1, *[1] * (-1 - node["infer"]["_enumerate_dim"]))
    kept = {key: node[key] for key in ("type", "name", "infer", "cond_indep_stack")}
    packed = {"masked_log_prob": log_prob}
    return {**kept, "is_observed": not latent, "value": value, "packed": packed}


def _values(run: EnumeratedRun, name: str, index: Tensor) -> Tensor:
    """The values of an enumerated site at these indices, in the shape of a draw."""
    index = index.reshape(()) if index.numel() == 1 else index
    return run.support(name)[index.expand(run.sizes(name))]
