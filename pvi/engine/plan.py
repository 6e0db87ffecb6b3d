"""What one look at a model and a guide decides: can particles be a batch dimension, what is
weighted together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvi.engine.bounds import Scope
from pvi.engine.terms import Terms, make_terms
from pvi.engine.traces import (
    Program,
    hidden,
    nesting_of,
    pair,
    particles,
    run,
    run_hidden,
    sample_nodes,
    subset,
)
from pvi.errors import ObjectiveError

PROBE = 3  # particles in the trial run: a size that plates of one or two elements don't have


@dataclass(frozen=True)
class Plan:
    """How to run a pair of programs for several particles.

    Args:
        nesting: number of plate dimensions, so that particles go left of them.
        vectorized: all particles in one run, or one run a particle.
        reason: why they are run one by one; empty if they are not.
        scope: which terms are weighted together where alpha != 1.
    """

    nesting: int
    vectorized: bool
    reason: str
    scope: Scope


def make_plan(model: Program, guide: Program, args: tuple, kwargs: Mapping, bound: str) -> Plan:
    """Run the pair a few times, without gradients or random side effects, and decide."""
    guide_trace = run_hidden(guide, args, kwargs)
    model_trace = run_hidden(model, args, kwargs, guide_trace)
    sites = pair(guide_trace, model_trace)
    nesting = nesting_of(guide_trace, model_trace)
    reason = why_not_vectorized(model, guide, args, kwargs, guide_trace, nesting)
    scope = _scope(make_terms(sites, {}, 1, None)) if bound != "joint" else Scope()
    if scope.plates and not _factorizes(model, guide, args, kwargs, guide_trace, scope):
        scope = Scope()
    if bound == "per_datum" and not scope.plates:
        raise ObjectiveError(
            "bound='per_datum' needs a plate that holds both a latent and an observed site, with "
            "no observation outside it that depends on those latents; this model has none. Use "
            "'auto'."
        )
    return Plan(nesting, not reason, reason, scope)


def _scope(terms: Terms) -> Scope:
    """The plates over which the weights can factorise, by looking at where the sites stand."""
    random = [t for t in terms if t.kind != "likelihood"]
    observed = {p.name for t in terms if t.kind == "likelihood" for p in t.plates}
    local = [t for t in random if any(p.name in observed for p in t.plates)]
    if not local:
        return Scope()
    shared = (
        frozenset.intersection(*(frozenset(p.name for p in t.plates) for t in local)) & observed
    )
    if not shared:
        return Scope()
    inner = {t.name for t in terms if shared <= {p.name for p in t.plates}}
    outer = frozenset(t.name for t in terms if t.name not in inner)
    if any(t.kind == "auxiliary" for t in terms if t.name in outer):
        return Scope()
    return Scope(shared, outer)


def _factorizes(
    model: Program, guide: Program, args: tuple, kwargs: Mapping, guide_trace: Any, scope: Scope
) -> bool:
    """Whether the outer terms stay the same when the inner latents are drawn again."""
    given = subset(guide_trace, scope.outer)
    runs = []
    with hidden():
        for _ in range(2):
            guide_run = run(guide, args, kwargs, given)
            model_run = run(model, args, kwargs, guide_run)
            runs.append(make_terms(pair(guide_run, model_run), {}, 1, None))
    return all(
        torch.equal(runs[0][name].per_particle(), runs[1][name].per_particle())
        for name in scope.outer
    )


def why_not_vectorized(
    model: Program, guide: Program, args: tuple, kwargs: Mapping, single: Any, nesting: int
) -> str:
    """Empty if a run with a particle dimension equals single runs particle by particle, else why
    not.
    """
    try:
        guide_trace = run_hidden(particles(guide, PROBE, nesting), args, kwargs)
        model_trace = run_hidden(particles(model, PROBE, nesting), args, kwargs, guide_trace)
        together = make_terms(pair(guide_trace, model_trace), {}, PROBE, nesting)
        for k in range(PROBE):
            given = particle_slice(guide_trace, single, k, nesting)
            guide_one = run_hidden(guide, args, kwargs, given)
            model_one = run_hidden(model, args, kwargs, given)
            alone = make_terms(pair(guide_one, model_one), {}, 1, None)
            for term in alone:
                if not _agree(together[term.name].per_particle()[k], term.per_particle()[0]):
                    return f"site '{term.name}' has another log density with a particle dimension"
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return (
            f"the programs cannot broadcast ({type(error).__name__}: {str(error).splitlines()[0]})"
        )
    return ""


def particle_slice(vectorized: Any, single: Any, k: int, nesting: int) -> Any:
    """Particle `k` of a vectorised trace, in the shapes of a single run."""
    part = subset(vectorized, ())
    for name, node in sample_nodes(vectorized).items():
        value, shape = node["value"], single.nodes[name]["value"].shape
        dim = -1 - nesting - node["fn"].event_dim
        if value.dim() >= -dim and value.shape[dim] > 1:
            value = value.select(dim, k)
        part.add_node(name, **{**node, "value": value.reshape(shape)})
    return part


def _agree(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-4
    return bool(torch.isclose(a, b, rtol=tolerance, atol=tolerance * 10, equal_nan=True))
