"""A first run of model and guide that turns every silent mistake into one clear error."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pvi.engine.enumeration import marks, reduced
from pvi.engine.look import look
from pvi.engine.traces import (
    Density,
    Program,
    Site,
    hidden,
    is_delta,
    masked,
    nesting_of,
    pair,
    sample_nodes,
)
from pvi.errors import DataError, GuideError, ModelError, PviError

MISSING = "Drop those rows, impute them, or leave those entries out with obs_mask= or poutine.mask."


def check_finite(named: Mapping[str, Any]) -> None:
    """Refuse infinite values in the data.

    Raises:
        DataError: naming the argument, how many values, and the first row.
    """
    for name, value in named.items():
        if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isinf().any()):
            raise DataError(
                f"argument '{name}' {_where(value.isinf(), 'inf')}. Remove or clip them."
            )


def check(
    model: Program, guide: Program, args: tuple, kwargs: Mapping, named: Mapping[str, Any]
) -> dict[str, Any]:
    """Run guide and model once and refuse what could only give a wrong posterior.

    Args:
        named: the data arguments by name, to point at the one that holds NaN.

    Returns:
        The model's sample statements in that run.

    Raises:
        DataError: wrong arguments; missing or infinite values.
        ModelError: a site twice, no observations, or one outside its support.
        GuideError: a site missing, extra, with another shape or outside the prior's support.
    """
    _check_signature("model", model, args, kwargs)
    _check_signature("guide", guide, args, kwargs)
    with hidden(), pyro.validation_enabled(True):
        guide_trace = _run("guide", guide, args, kwargs, named)
        model_trace = _run("model", poutine.replay(model, trace=guide_trace), args, kwargs, named)
        nodes, nesting = sample_nodes(model_trace), nesting_of(guide_trace, model_trace)
        enumeration = marks(guide_trace, model_trace, nesting, average=False)
        if enumeration:
            _, guide_trace, model_trace = look(model, guide, args, kwargs, average=False)
        sites = pair(guide_trace, model_trace)
        if not any(site.observed for site in sites):
            raise ModelError(
                "the model has no observed site, so there is nothing to learn from. Give the data "
                f"to pyro.sample(..., obs=...); its sites are {[s.name for s in sites]}."
            )
        for site in sites:
            if site.observed:
                _check_observation(site, named)
            elif site.p is not None and site.q is not None:
                _check_support(site.name, site.p, site.q)
        if enumeration:
            sites = reduced(sites, guide_trace, model_trace, enumeration)
        for site in sites:
            of_p = "likelihood" if site.observed else "prior"
            for role, side in ((of_p, site.p), ("guide", site.q)):
                if side is not None:
                    _check_density(site.name, role, side, named)
    return nodes


def _check_signature(role: str, program: Program, args: tuple, kwargs: Mapping) -> None:
    target = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise DataError(
            f"the {role} takes {signature} but is called with {len(args)} positional argument(s) "
            f"and keywords {sorted(kwargs)}: {error}. Guides take the same arguments as their "
            "model; data= gives the rows, args= and kwargs= the rest."
        ) from error


def _run(role: str, program: Program, args: tuple, kwargs: Mapping, named: Mapping) -> Any:
    tracer = poutine.trace(program)
    try:
        return tracer.get_trace(*args, **kwargs)
    except PviError as error:  # Pyro adds the shapes of its trace to the message
        cause = error.__cause__
        raise (cause if isinstance(cause, PviError) else error) from None
    except (RuntimeError, ValueError) as error:
        duplicate = re.search(r"Multiple (\w+) sites named '(.+?)'", str(error))
        if duplicate:
            raise ModelError(
                f"the {role} has two sites named '{duplicate[2]}'. Give each pyro.sample its own "
                "name."
            ) from error
        _check_missing(named, error)
        last = [name for name, n in tracer.trace.nodes.items() if n["type"] == "sample"]
        error.add_note(
            f"pvi: raised in the {role}, after its site '{last[-1] if last else '(none)'}'"
        )
        raise


def _check_missing(named: Mapping[str, Any], cause: Exception | None) -> None:
    for name, value in named.items():
        if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()):
            raise DataError(
                f"argument '{name}' {_where(value.isnan(), 'NaN')}, which made the model fail. "
                f"{MISSING}"
            ) from cause


def _check_observation(site: Site, named: Mapping[str, Any]) -> None:
    p = _side(site.p)
    bad = _select(p, p.value.isnan()) if p.value.is_floating_point() else None
    if bad is not None and bool(bad.any()):
        raise DataError(f"observed site '{site.name}' {_where(bad, 'NaN')}. {MISSING}")
    _check_shape(site.name, p)
    bad = _outside(p)
    if bad is not None and bool(bad.any()):
        raise DataError(
            f"observed site '{site.name}' "
            f"{_where(bad, f'values outside the support {p.fn.support}')} of its {_name(p.fn)} "
            "likelihood. Check the data's coding, or use another distribution."
        )


def _check_shape(name: str, p: Density) -> None:
    """The observations must not blow up the plate's shape, as a column `(N, 1)` does."""
    expected = p.fn.shape()
    try:
        together = torch.broadcast_shapes(p.value.shape, expected)
    except RuntimeError:
        together = None
    if together != expected:
        raise DataError(
            f"observed site '{name}' has values of shape {tuple(p.value.shape)} where its plates "
            f"and distribution have {tuple(expected)}. Reshape the data (a column of N rows needs "
            ".squeeze(-1)), or the likelihood."
        )


def _check_support(name: str, p: Density, q: Density) -> None:
    mismatch = _covers_reals(q.fn) and not _has_real_support(p.fn) and not p.fn.support.is_discrete
    bad = _outside(p)
    if mismatch or (bad is not None and bool(bad.any())):
        raise GuideError(
            f"site '{name}': the guide's {_name(q.fn)} can leave the support {p.fn.support} of the "
            f"prior {_name(p.fn)}. Use a distribution on that support, such as a "
            "TransformedDistribution of a Normal, or pvi.guides.MeanField, which does so by itself."
        )


def _check_density(name: str, role: str, side: Density, named: Mapping[str, Any]) -> None:
    bad = ~side.log_prob().isfinite()
    if bool(bad.any()):
        _check_missing(named, None)
        raise ModelError(
            f"the {role} of site '{name}' {_where(bad, 'a log density that is not finite')} at the "
            "first draw. Check the scale of the data and the start of the guide (init_loc_fn, "
            "init_scale)."
        )


def _outside(side: Density) -> Tensor | None:
    """Where a value is outside the support, per event; `None` where that can't be told."""
    try:
        inside = side.fn.support.check(side.value)
    except (NotImplementedError, AttributeError):
        return None
    return _select(side, ~inside)


def _select(side: Density, bad: Tensor) -> Tensor:
    """Of the bad values those that count: not masked out."""
    mask = side.mask
    if isinstance(mask, Tensor):
        extra = bad.dim() - len(side.fn.batch_shape)
        mask = mask.reshape(mask.shape + (1,) * max(extra, 0))
    return masked(bad, mask)


def _covers_reals(fn: Any) -> bool:
    """Whether a guide's distribution surely puts mass on all of R^n."""
    if hasattr(fn, "transforms") or is_delta(fn):  # reported too wide: only draws can tell
        return False
    return _has_real_support(fn)


def _has_real_support(fn: Any) -> bool:
    try:
        return is_real(fn.support)
    except NotImplementedError:
        return False


def is_real(support: Any) -> bool:
    """Whether a support is all of R^n."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


def _where(bad: Tensor, what: str) -> str:
    """How many entries are bad, and where the first is."""
    if bad.dim() == 0:
        return f"has {what}"
    first = bad.nonzero()[0].tolist()
    return f"has {what} in {int(bad.sum())} of {bad.numel()} entries (the first at index {first})"


def _side(side: Density | None) -> Density:
    if side is None:
        raise ModelError("an observed site has no likelihood")
    return side


def _name(fn: Any) -> str:
    while hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "MaskedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__
