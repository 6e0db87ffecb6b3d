"""A first look at two programs: which sites are enumerated, and do they run right that way?"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.ops import packed
from torch import Tensor

from pvi.engine.enumeration import Enumeration, marks, mixed, with_sites
from pvi.engine.joint import terms_of
from pvi.engine.summation import EnumeratedRun
from pvi.engine.traces import (
    Program,
    density,
    hidden,
    nesting_of,
    pass_by,
    run,
    run_hidden,
    sample_nodes,
    subset,
)
from pvi.errors import ModelError, PviError

HELP = (
    "Index with Vindex(x)[..., k], let operations broadcast, don't branch on it and don't mix its "
    "values (a mean over them, batch normalisation); or remove the mark and draw it in the guide."
)


def look(
    model: Program, guide: Program, args: tuple, kwargs: Mapping, *, average: bool = True
) -> tuple[Enumeration, Any, Any]:
    """What is enumerated, and the traces of both programs in a run with it.

    Args:
        average: whether the guide's marks count; where they don't, its sites are drawn.

    Raises:
        ObjectiveError, ModelError: a site can't be enumerated, or a program can't run on all of its
            values at once.
    """
    guide_trace = run_hidden(guide, args, kwargs)
    model_trace = run_hidden(model, args, kwargs, guide_trace)
    nesting = nesting_of(guide_trace, model_trace)
    found = marks(guide_trace, model_trace, nesting, average=average)
    if not found:
        return found, guide_trace, model_trace
    return _enumerate(found, model, guide, args, kwargs, (guide_trace, model_trace))


def _enumerate(
    found: Enumeration,
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping,
    plain: tuple[Any, Any],
) -> tuple[Enumeration, Any, Any]:
    """Run with all values of these sites, and compare with plain traces of both programs."""
    guide_trace, model_trace = plain
    plain = (with_sites(guide_trace, model_trace, found.summed), model_trace)
    names, programs = ", ".join(found.names), (found.model(model), found.guide(guide), args, kwargs)
    rest = [name for name in sample_nodes(guide_trace) if name not in found.averaged]
    try:
        traces, same = _both(*programs), _both(*programs, subset(guide_trace, rest))
        terms = terms_of(*traces, enumeration=found)
        other = _first_difference(found.run(*same), same, plain)
    except PviError:
        raise
    except Exception as error:  # whatever a program raises on shapes that it did not expect
        raise ModelError(
            f"'{names}' is enumerated: all values come at once, in a dimension left of the plates, "
            f"but the programs can't run on that ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}). {HELP}"
        ) from error
    if other and not _is_random(model, guide, args, kwargs, plain):
        raise ModelError(
            f"site '{other}' has another log density where all values of '{names}' come at "
            f"once, in a dimension left of the plates, than with one of them. {HELP}"
        )
    return replace(found, mixed=mixed(terms)), *traces


def _both(
    model: Program, guide: Program, args: tuple, kwargs: Mapping, given: Any = None
) -> tuple[Any, Any]:
    guide_trace = run_hidden(guide, args, kwargs, given)
    return guide_trace, run_hidden(model, args, kwargs, guide_trace)


def _first_difference(
    enumerated: EnumeratedRun, traces: tuple[Any, Any], plain: tuple[Any, Any]
) -> str:
    """The first site whose log density at the values of a plain run is not the one found there."""
    index = {
        symbol: enumerated.index(name, plain[0].nodes[name]["value"])
        for symbol, name in (enumerated.summed | enumerated.averaged).items()
    }
    for trace, one in zip(traces, plain, strict=True):
        for name, node in sample_nodes(trace).items():
            x = enumerated.pack(name, density(node).log_prob())
            for symbol in [s for s in x._pyro_dims if s in index]:
                x = packed.gather(x, index[symbol], symbol)
            y = enumerated.pack(name, density(one.nodes[name]).log_prob())
            if not agree(*packed.broadcast_all(x, y)):
                return name
    return ""


def _is_random(
    model: Program, guide: Program, args: tuple, kwargs: Mapping, plain: tuple[Any, Any]
) -> bool:
    """Whether densities differ between two runs on the same draws (dropout)."""
    with hidden():
        for node in sample_nodes(plain[1]).values():
            pass_by(node["value"].device)
        again = [run(program, args, kwargs, plain[0]) for program in (guide, model)]
    pairs = [
        (density(node).log_prob(), density(trace.nodes[name]).log_prob())
        for trace, before in zip(again, plain, strict=True)
        for name, node in sample_nodes(before).items()
        if name in trace.nodes
    ]
    return not all(agree(one, two) for one, two in pairs)


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two computations of the same numbers agree, up to rounding."""
    b = b.to(a.dtype)
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-4
    return bool(torch.isclose(a, b, rtol=tolerance, atol=tolerance * 10, equal_nan=True).all())
