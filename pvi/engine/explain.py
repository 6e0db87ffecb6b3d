"""What an objective does at each site, as a table to print."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pvi.engine.bounds import common_scale
from pvi.engine.enumeration import EXACT_SUM
from pvi.engine.plan import Plan
from pvi.engine.schedules import Schedule
from pvi.engine.summation import summed
from pvi.engine.terms import Term, Terms
from pvi.engine.traces import Site
from pvi.text import table

HEADER = ("site", "kind", "plates", "KL", "gradient", "weight", "scale")


@dataclass(frozen=True)
class Explanation:
    """Rows of (site, kind, plates, KL, gradient, weight, scale), and what holds for all sites."""

    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([table(HEADER, self.rows), *self.notes])


def _particles(plan: Plan) -> str:
    if not plan.reason:
        return "batched"
    return f"{'mapped' if plan.mapped else 'looped'}: {plan.reason}"


def explain(terms: Terms, plan: Plan, objective: Any, more: Sequence[str] = ()) -> Explanation:
    """Describe terms that were just computed for an `Objective`.

    Args:
        more: notes of the model's.
    """
    o = objective
    notes = [f"bound: {_bound_name(o)}, {o.num_particles} particle(s)"]
    if o.is_weighted or callable(o.gradient):
        notes.append(f"weights: {plan.scope.name}")
        if plan.scope.outer:
            notes.append(f"drawn once per bound: {', '.join(sorted(plan.scope.outer))}")
    how = _particles(plan)
    notes.append(f"particles: {how if o.num_particles > 1 else f'one; several would be {how}'}")
    notes += _not_a_bound(terms, plan, o)
    if certain := ", ".join(t.name for t in terms if t.certain):
        notes.append(f"straight-through ({certain}): the guide's gradient is biased")
    if terms.penalties:
        names = ", ".join(t.name for t in terms.penalties)
        notes.append(f"penalties, in the loss but in no bound: {names}")
    notes += more
    weights = _weights(terms, o)
    rows = [_row(t, weights.get(t.name, "-"), o.gradient) for t in terms]
    sites = [site for t in terms if t.sites for site in summed(t.sites[0].members)]
    rows += [(s.name, "summed out", _plates(s), "-", "-", "-", "1") for s in sites]
    return Explanation(tuple(rows), tuple(notes))


def _not_a_bound(terms: Terms, plan: Plan, o: Any) -> Iterator[str]:
    """Why the loss, or even the value of `.bound()`, is no lower bound on the evidence."""
    if plan.points:
        names = ", ".join(sorted(plan.points))
        yield f"Delta in the guide ({names}): the log joint at a point, not a bound"
    inner = [t for t in terms if t.name not in plan.scope.outer]
    if o.is_weighted and common_scale(inner) is None:
        yield "scales differ, so they stay inside the weights: not a bound"
    if o.is_weighted and o.mean is not None:
        yield "a mean of your own: whether it is a bound is yours to know"
    if o.is_weighted and o.alpha < 0:
        yield (
            f"alpha < 0: an estimate, not a bound. With K draws this estimate of CUBO_"
            f"{1 - o.alpha:g}, an upper bound, is biased low; at K = 1 it is the ELBO"
        )
    if o.weighting is not None:
        yield f"{o.weighting}: the loss is not a bound; .bound() reports the ELBO"
    elif not o.is_plain:
        yield "a KL weight differs from 1: the loss is not a bound; .bound() reports weight 1"


def _weights(terms: Terms, o: Any) -> dict[str, str]:
    """What each KL is multiplied by, as text; a rule's name where it covers the site."""
    names = [t.name for t in terms if t.kind != "likelihood"]
    beta = o.beta if isinstance(o.beta, Mapping) else dict.fromkeys(names, o.beta)
    weights = {name: _number(beta.get(name, 1.0)) for name in names}
    if o.weighting is not None:
        weights |= {t.name: type(o.weighting).__name__ for t in o.weighting.covers(terms)}
    return weights


def _bound_name(o: Any) -> str:
    if o.mean is not None:
        return getattr(o.mean, "__name__", str(o.mean))
    return {1.0: "ELBO", 0.0: "IWAE"}.get(o.alpha, f"Renyi, alpha = {o.alpha:g}")


def _plates(item: Term | Site) -> str:
    names = [
        f"{p.name} ({p.size})" if p.scale == 1.0 else f"{p.name} ({p.size} of {p.full_size})"
        for p in item.plates
    ]
    return ", ".join(names) or "-"


def _row(term: Term, weight: str, gradient: Any) -> tuple[str, ...]:
    own = "reparam" if gradient == "auto" else gradient
    if callable(own):
        text = getattr(own, "__name__", str(own))
    else:
        text = own if term.reparameterized else "score"
        text = "straight-through" if term.certain else text
        text = "exact" if term.how == EXACT_SUM else text
    text = "" if term.kind in ("likelihood", "analytic") else text
    return (
        term.name,
        term.kind,
        _plates(term),
        term.how or "-",
        text or "-",
        weight,
        _scale(term),
    )


def _scale(term: Term) -> str:
    scales = {
        _number(s)
        for s, side in ((term.scale_p, term.log_p), (term.scale_q, term.log_q))
        if side is not None
    }
    return " / ".join(sorted(scales)) or "1"


def _number(scale: object) -> str:
    if isinstance(scale, Schedule):
        return str(scale)
    return f"{scale:g}" if isinstance(scale, float | int) else "tensor"
