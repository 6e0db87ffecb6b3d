"""A first run of model and guide that turns every silent mistake into one clear error."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import LogNormal, biject_to, constraints

from pvi.engine.enumeration import marks, reduced
from pvi.engine.failures import MISSING, explained, missing_values, where
from pvi.engine.look import look
from pvi.engine.pairing import mismatches, observed_sites, pair
from pvi.engine.traces import (
    Density,
    Program,
    Site,
    hidden,
    is_delta,
    masked,
    nesting_of,
    run,
    sample_nodes,
)
from pvi.errors import DataError, GuideError, ModelError, PviError

CLONED = 1_000_000  # numbers in an argument up to which it is put back after a model has changed it


@dataclass
class Look:
    """A first run of guide and model: their traces and all that is wrong with them."""

    guide_trace: Any
    model_trace: Any
    nodes: dict[str, Any]
    problems: list[PviError] = field(default_factory=list)


def check_values(named: Mapping[str, Any]) -> None:
    """Refuse data that no model can use.

    Raises:
        DataError: naming the argument, how many values, and the first row.
    """
    raise_first(value_problems(named))


def value_problems(named: Mapping[str, Any]) -> Iterator[DataError]:
    """What is wrong with the data whatever the model: infinite or complex, or not constant."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            continue
        if value.is_complex():
            yield DataError(
                f"argument '{name}' is complex ({value.dtype}), where real numbers are needed. "
                "Pass its real and imaginary parts (torch.view_as_real)."
            )
        elif value.is_floating_point() and bool(value.isinf().any()):
            yield DataError(
                f"argument '{name}' {where(value.isinf(), 'inf')}. Remove or clip them."
            )
        if value.requires_grad:
            yield DataError(
                f"argument '{name}' requires gradients, but data are constants of a fit: pass "
                f"{name}.detach(). What is to be fitted belongs in pyro.param or a module."
            )


def raise_first(problems: Iterable[PviError]) -> None:
    """Raise the first problem, if there is one, with the others as notes."""
    found = list(problems)
    if found:
        for other in found[1:]:
            found[0].add_note(f"pvi: besides: {other}")
        raise found[0]


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
    found = examine(model, guide, args, kwargs, named)
    raise_first(found.problems)
    return found.nodes


def examine(
    model: Program, guide: Program, args: tuple, kwargs: Mapping, named: Mapping[str, Any]
) -> Look:
    """`check` that collects what is wrong, as far as both programs can be run."""
    raise_first(
        [
            *signature_problems("model", model, args, kwargs),
            *signature_problems("guide", guide, args, kwargs),
        ]
    )
    roles = {"model": model, "guide": guide}
    with hidden(), pyro.validation_enabled(True), explained(roles, lambda: named), _kept(named):
        guide_trace = run(guide, args, kwargs)
        try:
            model_trace = run(model, args, kwargs, guide_trace)
        except (RuntimeError, ValueError):
            raise_first(mismatches(guide_trace, run(model, args, kwargs)))  # the cause, if it runs
            raise
        result = Look(guide_trace, model_trace, sample_nodes(model_trace))
        result.problems = list(_problems(result, (model, guide, args, kwargs), named))
    return result


def _problems(found: Look, programs: tuple, named: Mapping[str, Any]) -> Iterator[PviError]:
    """What is wrong with the sites."""
    guide_trace, model_trace = found.guide_trace, found.model_trace
    if not any(node["is_observed"] for node in found.nodes.values()):
        yield _unobserved(guide_trace, list(found.nodes))
    nesting = nesting_of(guide_trace, model_trace)
    enumeration = marks(guide_trace, model_trace, nesting, average=False)
    if enumeration:
        _, guide_trace, model_trace = look(*programs, average=False)
        found.guide_trace, found.model_trace = guide_trace, model_trace
    unpaired = list(mismatches(guide_trace, model_trace))
    yield from unpaired
    sites = observed_sites(model_trace) if unpaired else pair(guide_trace, model_trace)
    wrong = [problem for site in sites if (problem := _site_problem(site)) is not None]
    yield from wrong
    if not (wrong or unpaired):
        if enumeration:
            sites = reduced(sites, guide_trace, model_trace, enumeration)
        yield from _densities(sites, named)


def _site_problem(site: Site) -> PviError | None:
    try:
        if site.observed:
            _check_observation(site)
        elif site.p is not None and site.q is not None:
            _check_support(site.name, site.p, site.q)
    except PviError as error:
        return error
    return None


def _unobserved(guide_trace: Any, names: list[str]) -> ModelError:
    seen = [name for name, node in sample_nodes(guide_trace).items() if node["is_observed"]]
    swapped = f" The guide observes '{seen[0]}': are they in each other's place?" if seen else ""
    return ModelError(
        "the model has no observed site, so there is nothing to learn from. Give the data "
        f"to pyro.sample(..., obs=...); its sites are {names}.{swapped}"
    )


def _densities(sites: list[Site], named: Mapping[str, Any]) -> Iterator[PviError]:
    for site in sites:
        for role, side in (("likelihood" if site.observed else "prior", site.p), ("guide", site.q)):
            if side is not None and not bool(side.log_prob().isfinite().all()):
                yield missing_values(named) or ModelError(
                    f"the {role} of site '{site.name}' "
                    f"{where(~side.log_prob().isfinite(), 'a log density that is not finite')} at "
                    "the first draw. Check the scale of the data and the start of the guide "
                    "(init_loc_fn, init_scale)."
                )
                return


@contextmanager
def _kept(named: Mapping[str, Any]) -> Iterator[None]:
    """Notice a model that writes into its data, and put them back.

    Raises:
        ModelError: naming the argument.
    """
    tensors = {n: x for n, x in named.items() if isinstance(x, Tensor) and not x.is_inference()}
    copies = {n: x.clone() for n, x in tensors.items() if x.numel() <= CLONED}
    versions = {n: x._version for n, x in tensors.items()}
    changed: list[str] = []
    try:
        yield
    finally:
        changed += [n for n, x in tensors.items() if x._version != versions[n]]
        for name in set(changed) & copies.keys():
            tensors[name].copy_(copies[name])
    if changed:
        name = changed[0]
        raise ModelError(
            f"the model or the guide changes its argument '{name}' in place, so that every call "
            f"sees other data. Make a new tensor ({name} = {name} - 1 in the place of "
            f"{name} -= 1), or work on {name}.clone()."
        )


def signature_problems(
    role: str, program: Program, args: tuple, kwargs: Mapping
) -> Iterator[DataError]:
    """An error where a program can't be called with these arguments."""
    target = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        yield DataError(
            f"the {role} takes {signature} but is called with {len(args)} positional argument(s) "
            f"and keywords {sorted(kwargs)}: {error}. Guides take the same arguments as their "
            "model; data= gives the rows, args= and kwargs= the rest."
        )


def _check_observation(site: Site) -> None:
    p = _side(site.p)
    bad = _select(p, p.value.isnan()) if p.value.is_floating_point() else None
    if bad is not None and bool(bad.any()):
        raise DataError(f"observed site '{site.name}' {where(bad, 'NaN')}. {MISSING}")
    _check_shape(site, p)
    bad = _outside(p)
    if bad is not None and bool(bad.any()):
        raise DataError(
            f"observed site '{site.name}' "
            f"{where(bad, f'values outside the support {p.fn.support}')} of its {_name(p.fn)} "
            "likelihood. Check the data's coding, or use another distribution."
        )


def _check_shape(site: Site, p: Density) -> None:
    """The observations must be one for each element of the plates: not a column `(N, 1)`, which
    blows up the plate's shape, nor one value for all.
    """
    name, expected = site.name, p.fn.shape()
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
    for plate in site.plates:
        dim = 0 if plate.dim is None else plate.dim - p.fn.event_dim
        alone = p.value.dim() < -dim or p.value.shape[dim] == 1
        if dim < 0 and alone and plate.size > 1 and p.value.numel() > 0:
            raise DataError(
                f"observed site '{name}' has one value for all {plate.size} elements of plate "
                f"'{plate.name}', where it would count {plate.size} times. Pass one value for each "
                f"(.expand({plate.size}) if they are meant to be equal), or move the site out of "
                "the plate."
            )


def _check_support(name: str, p: Density, q: Density) -> None:
    bad = _outside(p)
    if _leaves(q.fn, p.fn) or (bad is not None and bool(bad.any())):
        raise GuideError(
            f"site '{name}': the guide's {_name(q.fn)} can leave the support {p.fn.support} of the "
            f"prior {_name(p.fn)}. Use a distribution on that support, such as a "
            "TransformedDistribution of a Normal, or pvi.guides.MeanField, which does so by itself."
        )


def _leaves(q: Any, p: Any) -> bool:
    """Whether a guide's distribution surely puts mass outside the prior's support.

    Told from far points of the support that it says it has; with transforms, that may be too wide,
    and only draws can tell.
    """
    if is_delta(q) or (hasattr(q, "transforms") and not isinstance(q, LogNormal)):
        return False
    try:
        if p.support.is_discrete or is_real(p.support):
            return False
        onto = biject_to(q.support)
        shape = onto.inverse_shape(q.batch_shape + q.event_shape)
        far = [onto(torch.full(shape, x, device=_device(q))) for x in (-3.0, 3.0)]
        return not all(bool(p.support.check(x).all()) for x in far)
    except (NotImplementedError, AttributeError, RuntimeError):
        return False


def _device(fn: Any) -> Any:
    return next((x.device for x in vars(fn).values() if isinstance(x, Tensor)), None)


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


def is_real(support: Any) -> bool:
    """Whether a support is all of R^n."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


def _side(side: Density | None) -> Density:
    if side is None:
        raise ModelError("an observed site has no likelihood")
    return side


def _name(fn: Any) -> str:
    while hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "MaskedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__
