"""A model that can't broadcast particles, run for all of them at once by `torch.func.vmap`.

The guide draws as ever, with particles as a batch dimension. The model sees one particle's values,
in the shapes of a single run; what it says of each site comes back with the particles in front.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pvi.engine.traces import PARTICLES, Program, density, is_subsample, replaced, run
from pvi.errors import ModelError

Tensors = dict[str, dict[str, Tensor]]


class Evaluated(dist.TorchDistribution):
    """A distribution of which only the density of one value is known, `(K, *batch)`."""

    def __init__(self, log_prob: Tensor, event_shape: torch.Size, like: Any):
        self._known, self._support, self.has_rsample = log_prob, like.support, like.has_rsample
        super().__init__(log_prob.shape, event_shape, validate_args=False)

    @property
    def arg_constraints(self) -> dict:
        return {}

    @property
    def support(self) -> Any:
        return self._support

    def log_prob(self, value: Tensor) -> Tensor:
        return self._known

    def expand(self, batch_shape: Any, _instance: object = None) -> "Evaluated":
        return Evaluated(self._known.expand(batch_shape), self.event_shape, self)


def run_mapped(
    model: Program, args: tuple, kwargs: Mapping, guide_trace: Any, num: int, nesting: int
) -> Any:
    """The trace of the model on `num` particles of the guide, its distributions as `Evaluated`.

    Raises:
        ModelError: the model has effects (`pvi.kl`, `pvi.penalty`), which need their plates.
    """
    drawn = {
        name: node
        for name, node in guide_trace.nodes.items()
        if node["type"] == "sample" and not is_subsample(node)
    }
    seen: dict[str, Any] = {}

    def single(values: dict[str, Tensor]) -> Tensors:
        trace = run(model, args, kwargs, replaced(guide_trace, values))
        if trace.effects:
            raise ModelError("pvi.kl and pvi.penalty can't be mapped over particles")
        seen.update(trace.nodes)
        return {n: _told(x) for n, x in trace.nodes.items() if x["type"] == "sample"}

    with nullcontext() if _can_validate() else pyro.validation_enabled(False):
        told = torch.func.vmap(single)({n: _front(x, num) for n, x in drawn.items()})
    trace: Any = poutine.Trace()
    frame = CondIndepStackFrame(PARTICLES, -1 - nesting, num, 0, num)
    for name, tensors in told.items():
        node = {**seen[name], **_lifted(seen[name], tensors, num, nesting)}
        if "log_prob" in tensors:
            node["cond_indep_stack"] = (frame, *seen[name]["cond_indep_stack"])
        trace.add_node(name, **node)
    trace.effects, trace.requests = [], []
    return trace


@cache
def _can_validate() -> bool:
    """Whether this torch can check the parameters of distributions under `vmap`; 2.6 can't."""
    try:
        torch.func.vmap(lambda x: dist.Normal(x, 1.0, validate_args=True).loc)(torch.zeros(2))
    except RuntimeError:
        return False
    return True


def _front(node: Mapping, num: int) -> Tensor:
    """A guide's value with the particles in front of the shape of a single run."""
    dims = [-f.dim for f in node["cond_indep_stack"] if f.name != PARTICLES and f.vectorized]
    value, depth = node["value"], max(dims, default=0) + node["fn"].event_dim
    shape = value.shape[max(0, value.dim() - depth) :] if depth else torch.Size()
    if value.numel() == num * shape.numel():
        return value.reshape(num, *shape)
    return value.reshape(shape).expand(num, *shape)


def _told(node: Mapping) -> dict[str, Tensor]:
    """What a site says of one particle."""
    found = {"value": node["value"]}
    if is_subsample(node) or node["infer"].get("_deterministic", False):
        return found
    found["log_prob"] = density(node).fn.log_prob(density(node).value)
    found |= {key: node[key] for key in ("mask", "scale") if isinstance(node[key], Tensor)}
    return found


def _lifted(node: Mapping, tensors: dict[str, Tensor], num: int, nesting: int) -> dict[str, Any]:
    """The same with the particles left of all plates."""
    if is_subsample(node):
        return {"value": tensors["value"][0]}
    lift: Callable[..., Tensor] = partial(_lift, num=num, nesting=nesting)
    event_dim, event_shape = node["fn"].event_dim, node["fn"].event_shape
    found: dict[str, Any] = {"value": lift(tensors["value"], event_dim)}
    found |= {key: lift(tensors[key]) for key in ("mask", "scale") if key in tensors}
    if "log_prob" in tensors:
        log_prob = lift(tensors["log_prob"])
        same = _is_same(node["fn"])  # for all particles, so that it is known as a whole
        known = node["fn"].expand(log_prob.shape) if same else None
        found["fn"] = known or Evaluated(log_prob, event_shape, node["fn"])
    return found


def _is_same(fn: Any) -> bool:
    """Whether no parameter of a distribution depends on the particle."""
    if hasattr(fn, "base_dist"):
        return _is_same(fn.base_dist) and not getattr(fn, "transforms", ())
    values = vars(fn).values()
    tensors = [x for x in values if isinstance(x, Tensor)]
    plain = all(isinstance(x, Tensor | bool | int | float | torch.Size | None) for x in values)
    is_batched: Any = getattr(torch._C, "_functorch").is_batchedtensor  # noqa: B009
    return plain and not any(is_batched(x) for x in tensors)


def _lift(x: Tensor, event_dim: int = 0, *, num: int, nesting: int) -> Tensor:
    missing = nesting - (x.dim() - 1 - event_dim)
    return x.reshape(num, *(1,) * missing, *x.shape[1:])
