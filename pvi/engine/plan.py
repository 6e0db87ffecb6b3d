"""What one look at a model and a guide decides: can particles be a batch dimension, what is
weighted together.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pvi.engine.bounds import Scope, fold
from pvi.engine.enumeration import Enumeration, with_sites
from pvi.engine.gradients import Detached
from pvi.engine.independence import local_sites
from pvi.engine.joint import NONE, terms_of
from pvi.engine.look import agree, look
from pvi.engine.mapped import run_mapped
from pvi.engine.terms import Term, Terms
from pvi.engine.traces import (
    Program,
    deterministic_nodes,
    hidden,
    is_delta,
    pass_by,
    plates_of,
    replaced,
    requires_grad,
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
        reason: why the model can't broadcast them; empty if it can.
        scope: which terms are weighted together where alpha != 1.
        enumeration: which discrete sites are summed over.
        mapped: the model is run once for all particles by `torch.func.vmap`, since it can't
            broadcast them; then no closed form of a KL is known.
        points: sites of the guide that are always the same, as in a MAP estimate.
        moving: Delta sites that restate a draw through a map with parameters of its own.
        local: how weights may be drawn for which the model has asked, see `local_sites`.
    """

    nesting: int
    vectorized: bool
    reason: str
    scope: Scope
    enumeration: Enumeration = NONE
    points: frozenset[str] = frozenset()
    moving: frozenset[str] = frozenset()
    mapped: bool = False
    local: Mapping[str, str] = field(default_factory=dict)

    def run_model(
        self,
        model: Program,
        args: tuple,
        kwargs: Mapping,
        guide_trace: Any,
        num: int,
        *,
        local: bool = False,
    ) -> Any:
        """The model's trace on `num` particles of the guide.

        Args:
            local: activations may be drawn in the place of weights.
        """
        if self.mapped and num > 1:
            return run_mapped(model, args, kwargs, guide_trace, num, self.nesting)
        answers = self.local if local else None
        model = self.enumeration.model(model, num)
        return run(model, args, kwargs, guide_trace, answers=answers)

    def depth(self, num: int) -> int | None:
        """Plate dimensions under the particle plate of a run of `num`; `None` if it has none."""
        return self.nesting if num > 1 else None


def make_plan(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping,
    bound: str,
    *,
    average: bool = True,
) -> Plan:
    """Run the pair a few times, without gradients or random side effects, and decide.

    Args:
        average: sum over the guide's marked sites too; else they are drawn, and those that the
            model sums out must also run with drawn values.
    """
    programs = (model, guide, args, kwargs)
    enumeration, guide_trace, model_trace = look(*programs, average=average)
    terms = terms_of(guide_trace, model_trace, enumeration=enumeration)
    reason = why_not_vectorized(*programs, enumeration)
    mapped = bool(reason) and not why_not_vectorized(*programs, enumeration, mapped=True)
    if enumeration.summed and not average and not reason:
        drawn = Enumeration(nesting=enumeration.nesting)
        reason = why_not_vectorized(*programs, drawn, enumeration.summed)
    scope = Scope()
    if bound != "joint":
        scope = _checked_scope(*programs, guide_trace, terms, enumeration)
    if bound == "per_datum" and not scope.plates:
        raise ObjectiveError(
            "bound='per_datum' needs a plate that holds both a latent and an observed site, with "
            "no observation outside it that depends on those latents; this model has none. Use "
            "'auto'."
        )
    deltas = _deltas(enumeration.guide(guide), args, kwargs, guide_trace)
    local = local_sites(guide, args, kwargs, guide_trace, model_trace)
    vectorized = mapped or not reason
    return Plan(enumeration.nesting, vectorized, reason, scope, enumeration, *deltas, mapped, local)


def single_plan(
    model: Program, guide: Program, args: tuple, kwargs: Mapping, *, score: bool
) -> Plan:
    """The plan for one particle, which only needs to know how its sites are drawn.

    Args:
        score: every site will have a score gradient, not only those that need one.
    """
    programs = (model, guide, args, kwargs)
    enumeration, guide_trace, model_trace = look(*programs)
    terms = terms_of(guide_trace, model_trace, enumeration=enumeration)
    deltas = _deltas(enumeration.guide(guide), args, kwargs, guide_trace)
    scope = Scope()
    if score or not all(term.reparameterized for term in terms):
        scope = _checked_scope(*programs, guide_trace, terms, enumeration)
    local = local_sites(guide, args, kwargs, guide_trace, model_trace)
    return Plan(enumeration.nesting, False, "", scope, enumeration, *deltas, local=local)


def _deltas(
    guide: Program, args: tuple, kwargs: Mapping, guide_trace: Any
) -> tuple[frozenset[str], frozenset[str]]:
    """The Delta sites that are points, and of those that restate a draw the ones that move.

    Raises:
        ObjectiveError: an auxiliary draw that no Delta restates.
    """
    nodes = sample_nodes(guide_trace)
    deltas = [name for name, node in nodes.items() if is_delta(node["fn"])]
    points, moving = frozenset(), frozenset()
    if deltas:
        with hidden():
            pass_by()  # the trace was drawn from this random state
            other = sample_nodes(run(guide, args, kwargs))
        with hidden(), torch.enable_grad(), Detached():
            still = sample_nodes(run(guide, args, kwargs))
        points = frozenset(n for n in deltas if torch.equal(nodes[n]["value"], other[n]["value"]))
        moving = frozenset(n for n in deltas if requires_grad(still[n]["fn"])) - points
    auxiliary = {n: x for n, x in nodes.items() if x["infer"].get("is_auxiliary")}
    free = [name for name, node in auxiliary.items() if node["mask"] is not False]
    if free and not deltas:
        raise ObjectiveError(
            f"auxiliary site '{free[0]}' of the guide is restated by no Delta at a site of the "
            "model: its entropy would be added to the bound, which could exceed the evidence. "
            "Build a Delta site from it, or put it under poutine.mask(mask=False)."
        )
    return points, moving


def _scope(terms: Terms) -> Scope:
    """The plates over which the weights can factorise, by looking at where the sites stand."""
    plates = {t.name: frozenset(p.name for p in t.plates if p.dim is not None) for t in terms}
    random = [t for t in terms if t.kind in ("latent", "auxiliary")]
    observed = frozenset().union(*(plates[t.name] for t in terms if t.kind == "likelihood"))
    local = [plates[t.name] for t in random if plates[t.name] & observed]
    shared = frozenset.intersection(observed, *local) if local else frozenset()
    inner = {t.name for t in terms if shared and shared <= plates[t.name]}
    drawn = {t.name for t in random if not t.point}
    if not inner or (drawn and not drawn & inner):
        return Scope()  # nothing is drawn inside: points that restate one joint draw, for example
    return Scope(shared, frozenset(t.name for t in terms if t.name not in inner))


def _checked_scope(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping,
    guide_trace: Any,
    terms: Terms,
    enumeration: Enumeration,
) -> Scope:
    """`_scope`, if the elements of its plates prove not to depend on each other's draws."""
    scope = _scope(terms)
    programs = (model, guide, args, kwargs)
    if scope.plates and not _factorizes(*programs, guide_trace, scope, enumeration):
        return Scope()
    return scope


def _factorizes(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping,
    guide_trace: Any,
    scope: Scope,
    enumeration: Enumeration,
) -> bool:
    """Whether every element of the scope's plates depends on its own inner draws only.

    Draw twice, then take the first draw for some elements and the second for the others: terms
    must be those of the element's own draw, and outer terms must not change at all.
    """
    given = subset(guide_trace, scope.outer)

    def draw(values: Any) -> tuple[Any, Terms]:
        drawn = run(enumeration.guide(guide), args, kwargs, values)
        model_trace = run(enumeration.model(model), args, kwargs, drawn)
        return drawn, terms_of(drawn, model_trace, enumeration=enumeration)

    with hidden():
        (one, first), (two, second) = draw(given), draw(given)
        _, mixed = draw(_mixed(one, two, scope))
    for term in mixed:
        a, b, m = (_elements(t[term.name], scope) for t in (first, second, mixed))
        if term.name in scope.outer:
            same = torch.equal(a, b) and torch.equal(a, m)
        else:
            rows = _pattern(m.shape, range(1 - m.dim(), 0), m.device)
            same = bool(torch.isclose(m, torch.where(rows, a, b), equal_nan=True).all())
        if not same:
            return False
    return True


def _mixed(one: Any, two: Any, scope: Scope) -> Any:
    """A trace whose inner draws come from `one` and `two` in turn along the scope's plates."""
    values = {}
    for name, node in sample_nodes(one).items():
        dims = [p.dim for p in plates_of(node) if p.name in scope.plates and p.dim is not None]
        if name in scope.outer or not dims or node["is_observed"]:
            continue
        a, b = node["value"], two.nodes[name]["value"]
        shift = node["fn"].event_dim
        rows = _pattern(a.shape, [d - shift for d in dims], a.device)
        values[name] = torch.where(rows, a, b)
    return replaced(one, values)


def _pattern(shape: torch.Size, dims: Iterable[int], device: Any) -> Tensor:
    """A fixed random choice between two draws, one for each element along some dimensions."""
    sizes = [shape[dim] for dim in range(-len(shape), 0)]
    wanted = set(dims)
    sizes = [n if d in wanted else 1 for n, d in zip(sizes, range(-len(shape), 0), strict=True)]
    generator = torch.Generator().manual_seed(0)
    count = math.prod(sizes)
    return (torch.rand(count, generator=generator) < 0.5).reshape(sizes).to(device)


def _elements(term: Term, scope: Scope) -> Tensor:
    return fold(term.log_ratio(), term, scope)


def why_not_vectorized(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping,
    enumeration: Enumeration,
    drawn: tuple[str, ...] = (),
    *,
    mapped: bool = False,
) -> str:
    """Empty if a run with a particle dimension equals single runs one by one, else why not.

    Args:
        drawn: sites that the model draws, as if they were the guide's.
        mapped: run the model by `torch.func.vmap`, not with a particle dimension.
    """
    nesting = enumeration.nesting
    if mapped and enumeration:
        return "sites are summed out"

    def traces(num: int, given: Any = None) -> tuple[Any, Any]:
        guide_trace = run_hidden(enumeration.guide(guide, num), args, kwargs, given)
        given = guide_trace if given is None else given
        if mapped and num > 1:
            with hidden():
                return guide_trace, run_mapped(model, args, kwargs, given, num, nesting)
        model_trace = run_hidden(enumeration.model(model, num), args, kwargs, given)
        return with_sites(guide_trace, model_trace, drawn), model_trace

    try:
        (single, _), (guide_trace, model_trace) = traces(1), traces(PROBE)
        together = terms_of(guide_trace, model_trace, PROBE, nesting, enumeration=enumeration)
        for k in range(PROBE):
            given = particle_slice(guide_trace, single, k, nesting)
            guide_one, model_one = traces(1, given)
            alone = terms_of(guide_one, model_one, enumeration=enumeration)
            other = "" if enumeration else _mixed_up(model_trace, model_one, k)
            if other:
                return f"'{other}' has another value with a particle dimension"
            both = zip([*together, *together.penalties], [*alone, *alone.penalties], strict=True)
            for batched, one in both:
                if not agree(batched.per_particle()[k], one.per_particle()[0]):
                    return f"site '{one.name}' has another log density with a particle dimension"
    except Exception as error:  # whatever a program raises on shapes that it did not expect
        return (
            f"the programs cannot broadcast ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]})"
        )
    return ""


def _mixed_up(together: Any, alone: Any, k: int) -> str:
    """The first deterministic site whose batched value is not particle `k`'s own, or ""."""
    for name, node in deterministic_nodes(alone).items():
        both, own = together.nodes[name]["value"], node["value"]
        if both.numel() not in (own.numel(), PROBE * own.numel()):
            return name
        rows = both.reshape(-1, *own.shape)
        if not agree(rows[k if len(rows) > 1 else 0], own):
            return name
    return ""


def particle_slice(vectorized: Any, single: Any, k: int, nesting: int, num: int = 1) -> Any:
    """Particle `k` of a vectorised trace, in the shapes of a single run, or `num` from `k` on."""
    part = subset(vectorized, ())
    for name, node in sample_nodes(vectorized).items():
        value, shape = node["value"], single.nodes[name]["value"].shape
        dim = -1 - nesting - node["fn"].event_dim
        if value.dim() >= -dim and value.shape[dim] > 1:
            value = value.narrow(dim, k, num)
        part.add_node(name, **{**node, "value": value.reshape(shape) if num == 1 else value})
    return part
