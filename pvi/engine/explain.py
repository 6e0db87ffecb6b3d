"""What an objective does at each site, as a table to print."""

from collections.abc import Mapping
from dataclasses import dataclass

from pvi.engine.bounds import common_scale
from pvi.engine.plan import Plan
from pvi.engine.terms import Term, Terms
from pvi.text import table

HEADER = ("site", "kind", "plates", "KL", "gradient", "weight", "scale")


@dataclass(frozen=True)
class Explanation:
    """Rows of (site, kind, plates, KL, gradient, weight, scale), and what holds for all sites."""

    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([table(HEADER, self.rows), *self.notes])


def explain(
    terms: Terms,
    plan: Plan,
    num_particles: int,
    alpha: float,
    weights: Mapping[str, float],
    gradient: str,
) -> Explanation:
    """Describe terms that were just computed."""
    notes = [f"bound: {_bound_name(alpha)}, {num_particles} particle(s)"]
    if alpha != 1.0 and num_particles > 1:
        notes.append(f"weights: {plan.scope.name}")
        if plan.scope.outer:
            notes.append(f"drawn once per bound: {', '.join(sorted(plan.scope.outer))}")
        if common_scale([t for t in terms if t.name not in plan.scope.outer]) is None:
            notes.append("scales differ, so they stay inside the weights: not a bound")
        if alpha < 0:
            notes.append("alpha < 0: an estimate, not a bound")
    if num_particles > 1:
        notes.append(f"particles: {'batched' if plan.vectorized else 'looped: ' + plan.reason}")
    if any(w != 1.0 for w in weights.values()):
        notes.append(
            "a KL weight differs from 1: the loss is not a bound; .bound() reports weight 1"
        )
    return Explanation(tuple(_row(t, weights.get(t.name), gradient) for t in terms), tuple(notes))


def _bound_name(alpha: float) -> str:
    return {1.0: "ELBO", 0.0: "IWAE"}.get(alpha, f"Renyi, alpha = {alpha:g}")


def _row(term: Term, weight: float | None, gradient: str) -> tuple[str, ...]:
    plates = [
        f"{p.name} ({p.size})" if p.scale == 1.0 else f"{p.name} ({p.size} of {p.full_size})"
        for p in term.plates
    ]
    own = "reparam" if gradient == "auto" else gradient
    gradient = "" if term.kind == "likelihood" else own if term.reparameterized else "score"
    return (
        term.name,
        term.kind,
        ", ".join(plates) or "-",
        term.how or "-",
        gradient or "-",
        "-" if weight is None else f"{weight:g}",
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
    return f"{scale:g}" if isinstance(scale, float | int) else "tensor"
