"""The sites of a model and a guide in words, for a table."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.distributions import constraints

from pvi.engine.traces import deterministic_nodes, plates_of, sample_nodes

COLUMNS = ("site", "kind", "distribution", "batch", "event", "plates", "support", "guide", "KL")


def site_rows(
    model_trace: Any, guide_trace: Any, kinds: Mapping[str, str], how: Mapping[str, str]
) -> Iterator[tuple[str, ...]]:
    """A row for each site of the model, then those of the guide alone.

    Args:
        kinds: what an objective makes of a site, where that says more than latent or observed.
        how: how its KL is computed.
    """
    theirs, computed = sample_nodes(guide_trace), deterministic_nodes(model_trace)
    for name, node in {**sample_nodes(model_trace), **computed}.items():
        kind = "observed" if node["is_observed"] else "latent"
        kind = "deterministic" if name in computed else kinds.get(name, kind)
        guide = distribution(theirs[name]["fn"]) if name in theirs else "-"
        yield _row(name, kind, node, guide, how.get(name, "-"))
    for name, node in theirs.items():
        if name not in model_trace.nodes:
            kind = "auxiliary" if node["infer"].get("is_auxiliary") else "guide only"
            yield _row(name, kind, node, distribution(node["fn"]), how.get(name, "-"))


def param_rows(trace: Any) -> Iterator[tuple[str, ...]]:
    """A row for each `pyro.param` of a program."""
    for name, node in trace.nodes.items():
        if node["type"] == "param" and "$$$" not in name:
            limits = support(node["kwargs"].get("constraint", constraints.real))
            shape = _shape(node["value"].shape)
            yield (name, "param", "-", shape, "-", _plates(node), limits, "-", "-")


def _row(name: str, kind: str, node: Mapping, guide: str, how: str) -> tuple[str, ...]:
    fn, plates = node["fn"], _plates(node)
    if kind == "deterministic":
        return (name, kind, "-", _shape(node["value"].shape), "-", plates, "-", "-", "-")
    shapes = _shape(fn.batch_shape), _shape(fn.event_shape)
    return (name, kind, distribution(fn), *shapes, plates, support(fn.support), guide, how or "-")


def _shape(shape: Any) -> str:
    return str(tuple(shape))


def _plates(node: Mapping) -> str:
    sizes = (
        f"{p.name} ({p.size})" if p.size == p.full_size else f"{p.name} ({p.size} of {p.full_size})"
        for p in plates_of(node)
    )
    return ", ".join(sizes) or "-"


def distribution(fn: Any) -> str:
    """The name of a distribution, and how many of its dimensions are one event."""
    events = 0
    while hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "MaskedDistribution"):
        events += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    name = type(fn).__name__
    if name == "TransformedDistribution":
        name = f"transformed {distribution(fn.base_dist)}"
    return f"{name}.to_event({events})" if events else name


def support(constraint: Any) -> str:
    """A constraint in a few characters: `> 0`, `[0, 1]`, `real`."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    text = str(constraint)
    numbers = {
        k: _number(x) for k, x in getattr(constraint, "__dict__", {}).items() if "bound" in k
    }
    low, high = numbers.get("lower_bound"), numbers.get("upper_bound")
    if isinstance(constraint, constraints.greater_than):
        return f"> {low}"
    if text.startswith("GreaterThanEq"):
        return f">= {low}"
    if text.startswith("LessThan"):
        return f"< {high}"
    if text.startswith("IntegerInterval"):
        return f"{low}..{high}"
    if text.startswith("IntegerGreaterThan"):
        return f"{low}, {int(float(low or 0)) + 1}, ..."
    if low is not None and high is not None:
        return f"[{low}, {high}]"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text.split("(")[0]).lower()
    return {"boolean": "0, 1"}.get(words, words)


def _number(x: Any) -> str:
    if isinstance(x, Tensor):
        if x.numel() != 1:
            return "..."
        x = x.item()
    return f"{x:g}" if isinstance(x, float) else str(x)
