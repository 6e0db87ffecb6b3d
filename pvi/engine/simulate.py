"""Data simulated from the model itself, with the latents that made them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Unit
from torch import Tensor

from pvi.engine.traces import (
    Program,
    conditioned,
    density,
    free,
    run,
    run_hidden,
    sample_nodes,
    subset,
)
from pvi.errors import ModelError, ObjectiveError


@dataclass(frozen=True)
class Simulated:
    """One draw of latents and data.

    Args:
        trace: of the model, its observations drawn as well: (z, x) ~ p, so z ~ p(z | x) exactly.
        args, kwargs: the arguments with each observation replaced by the simulated one.
        model: the model, conditioned on simulated observations that are no argument.
        hidden: names of these.
    """

    trace: Any
    args: tuple
    kwargs: dict[str, Any]
    model: Program
    hidden: tuple[str, ...]


def simulate(model: Program, args: tuple, kwargs: Mapping[str, Any]) -> Simulated:
    """Draw latents and observations from the model.

    Observations that a mask leaves out keep their old values, so that a mask which the model reads
    off missing data stays the same.

    Args:
        args, kwargs: a tensor among them (or in a tuple, list or dict among them) that holds the
            value of an observed site, whole or as a slice, or equals it, is given the simulated
            one.

    Raises:
        ObjectiveError: `pyro.factor` or `obs_mask`, which tell no distribution of the data.
    """
    nodes = sample_nodes(run_hidden(model, args, kwargs))
    old = {name: node for name, node in nodes.items() if node["is_observed"]}
    _check_sampled(old)
    trace = run(free(model), args, kwargs)
    drawn: dict[str, Any] = {name: trace.nodes[name]["value"] for name in old}
    new = {name: _where_kept(drawn[name], node) for name, node in old.items()}
    pairs = {name: (node["value"], new[name]) for name, node in old.items()}
    found: set[str] = set()

    def swap(value: Any, pairs: Mapping[str, Any], exactly: bool) -> Any:
        if isinstance(value, Tensor):
            return _refilled(value, pairs, found, exactly)
        if isinstance(value, tuple | list):
            return type(value)(swap(v, pairs, exactly) for v in value)
        if isinstance(value, dict):
            return {k: swap(v, pairs, exactly) for k, v in value.items()}
        return value

    arguments = swap((tuple(args), dict(kwargs)), pairs, True)
    # copies, but only of what was not found itself: columns may be equal by chance
    rest = {name: pair for name, pair in pairs.items() if name not in found}
    new_args, new_kwargs = swap(arguments, rest, False)
    hidden = tuple(name for name in old if name not in found)
    model = conditioned(model, {name: new[name] for name in hidden})
    return Simulated(trace, new_args, new_kwargs, model, hidden)


def replayed(made: Simulated) -> Any:
    """The model's trace on its own draws, now that the arguments hold the simulated observations.

    Raises:
        ModelError: a site has another density there, so the draws are not from the joint one.
    """
    drawn = sample_nodes(made.trace)
    latents = [n for n, node in drawn.items() if not node["infer"].get("was_observed")]
    trace = run(made.model, made.args, made.kwargs, subset(made.trace, latents))
    again = sample_nodes(trace)
    for name, node in drawn.items():
        before, after = (density(n).log_prob().sum() for n in (node, again[name]))
        if not torch.isclose(before, after, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ModelError(
                f"site '{name}' has another density once the arguments hold the simulated "
                f"observations ({float(before):.6g} nats before, {float(after):.6g} after): the "
                "model reads them elsewhere too (earlier values of a series, a mean of y), so its "
                "draws are not from its joint distribution. Draw the observations from one "
                "another: in pvi.sbc by simulator=, a program with the same sites; pvi.sandwich "
                "needs that in the model."
            )
    return trace


def _check_sampled(observed: Mapping[str, Any]) -> None:
    for name, node in observed.items():
        if isinstance(node["fn"], Unit) or name.endswith("_observed"):
            what = "pyro.factor" if isinstance(node["fn"], Unit) else "obs_mask"
            raise ObjectiveError(
                f"site '{name}' comes from {what}, so data can't be simulated from the model. "
                "Write it as a pyro.sample of all the data."
            )


def _where_kept(drawn: Tensor, node: Mapping) -> Tensor:
    """The simulated observation, with the old values where the site's mask drops them."""
    mask, old = node["mask"], node["value"]
    if mask is None or mask is True or drawn.shape != old.shape:
        return drawn
    mask = torch.as_tensor(mask, device=drawn.device)
    return torch.where(mask.reshape(mask.shape + (1,) * node["fn"].event_dim), drawn, old)


def _refilled(argument: Tensor, pairs: Mapping[str, Any], found: set[str], exactly: bool) -> Tensor:
    """The argument with each new value where it held the old one; `found` gets their names.

    Args:
        exactly: look for the same memory, or for equal values.
    """
    result = argument
    for name, (old, new) in pairs.items():
        if new.shape != old.shape:
            continue
        equal = not exactly and argument.shape == old.shape and _equal(argument, old)
        if argument is old or equal:
            result = new.to(argument.dtype)
        elif exactly and _is_view(old, argument):
            result = argument.clone() if result is argument else result
            offset = old.storage_offset() - argument.storage_offset()
            torch.as_strided(result, old.shape, old.stride(), offset).copy_(new)
        else:
            continue
        found.add(name)
    return result


def _is_view(part: Tensor, whole: Tensor) -> bool:
    """Whether `part` is memory of `whole`: the a slice, another shape of it."""
    same = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    sizes = [(n, step) for n, step in zip(part.shape, part.stride(), strict=True) if n > 1]
    repeats = any(step == 0 for _, step in sizes)
    if not same or part.dtype != whole.dtype or repeats or not whole.is_contiguous():
        return False
    first = part.storage_offset() - whole.storage_offset()
    return first >= 0 and first + sum((n - 1) * step for n, step in sizes) < whole.numel()


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
