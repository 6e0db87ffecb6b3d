"""Options of an objective that contradict each other, each with its message."""

import math
from collections.abc import Mapping
from typing import Any

from pvi.engine.gradients import check_reparameterized
from pvi.engine.plan import Plan
from pvi.engine.terms import Terms
from pvi.engine.weighting import check_numbers
from pvi.errors import ObjectiveError


def check_options(objective: Any) -> None:
    """Refuse an `Objective` whose options don't go together.

    Raises:
        ObjectiveError: what is wrong and what to use instead.
    """
    o = objective
    for name in ("num_particles", "num_outer"):
        value = getattr(o, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ObjectiveError(f"{name} must be a whole number >= 1, got {value!r}")
    _check_choice("kl", o.kl, ("sample", "exact"))
    if not callable(o.gradient):
        _check_choice("gradient", o.gradient, ("auto", "reparam", "path", "score"))
    _check_choice("bound", o.bound_scope, ("auto", "per_datum", "joint"))
    if not math.isfinite(o.alpha):
        raise ObjectiveError(f"alpha must be a finite number, got {o.alpha!r}")
    weights = o.beta if isinstance(o.beta, Mapping) else {"": o.beta}
    for name, weight in weights.items():
        check_numbers(**{f"beta['{name}']" if name else "beta": weight})
    _check_mean(o)
    _check_exact(o)
    _check_path(o)
    _check_rule(o)
    if callable(o.gradient):
        _check_gradient(o)


def _check_mean(o: Any) -> None:
    if o.mean is not None and (o.alpha != 1.0 or not callable(o.mean)):
        raise ObjectiveError(
            "mean= is a function from log weights (K, *plates) to (*plates), in the place of "
            f"alpha; got mean={o.mean!r} with alpha={o.alpha}"
        )


def _check_exact(o: Any) -> None:
    if o.kl == "exact" and (o.alpha != 1.0 or o.mean is not None):
        order = f"alpha = {o.alpha}" if o.mean is None else "a mean of your own"
        raise ObjectiveError(
            f"kl='exact' is a form of the ELBO (alpha = 1), got {order}: the "
            "weights of an importance-weighted bound need log q and log p at the draws. Use "
            "kl='sample'."
        )


def _check_path(o: Any) -> None:
    if o.gradient == "path" and o.kl == "exact":
        raise ObjectiveError(
            "gradient='path' holds the guide's density fixed, which would delete the gradient of "
            "an exact KL. Use kl='sample' with 'path', or gradient='reparam' with kl='exact'."
        )
    if o.gradient == "path" and isinstance(o.beta, Mapping):
        raise ObjectiveError(
            "gradient='path' needs one common beta: with a beta for each site its correction is "
            "not the same for all draws. Use gradient='reparam'."
        )


def _check_rule(o: Any) -> None:
    """Free bits, capacity and beta-TC."""
    if o.weighting is None:
        return
    name = type(o.weighting).__name__
    if o.alpha != 1.0 or o.mean is not None:
        raise ObjectiveError(f"{name} weights the KLs of an ELBO; use it with alpha = 1")
    if o.gradient == "path" or callable(o.gradient):
        raise ObjectiveError(f"{name} needs gradient='reparam' or 'auto', got {o.gradient!r}")
    if o.weighting.exact and o.kl != "exact":
        raise ObjectiveError(
            f"{name} needs exact KLs, because the floor of a noisy KL is biased. Use "
            "pvi.TraceMeanFieldELBO(weighting=...), that is kl='exact'."
        )
    if name == "BetaTC" and o.kl == "exact":
        raise ObjectiveError(
            "BetaTC takes the sampled KL apart, so that its parts add up for the same draws. Use "
            "kl='sample'."
        )


def _check_gradient(o: Any) -> None:
    """A gradient of the user's own, such as `Wake`."""
    if o.kl == "exact" or isinstance(o.beta, Mapping) or o.beta != 1.0:
        raise ObjectiveError(
            "a gradient of your own is given log p - log q at the draws: use kl='sample' and "
            "beta = 1"
        )


def check_score(objective: Any, sites: list[str]) -> None:
    """Refuse what a score gradient would be wrong for, given the sites that need one."""
    if not sites:
        return
    if objective.gradient in ("reparam", "path"):
        check_reparameterized(sites, objective.gradient)
    if objective.weighting is not None:
        raise ObjectiveError(
            f"{type(objective.weighting).__name__} weights means of KLs, for which there is no "
            f"score gradient, but site '{sites[0]}' needs one. Use a reparameterised distribution, "
            "or sum the site out."
        )


def check_deltas(objective: Any, terms: Terms, plan: Plan) -> None:
    """Refuse what is wrong where Deltas restate auxiliary draws, as in Pyro's automatic guides."""
    for name in sorted(plan.moving):
        if objective.gradient in ("path", "score"):
            raise ObjectiveError(
                f"guide site '{name}' is a Delta that restates a draw through a map with "
                f"parameters of its own, which gradient='{objective.gradient}' would miss. Use "
                "gradient='reparam', or a TransformedDistribution at the site."
            )
    weighted = set(objective.beta) if isinstance(objective.beta, Mapping) else set()
    if objective.weighting is not None:
        weighted |= {term.name for term in objective.weighting.covers(terms)}
    for term in terms:
        if term.point and term.name in weighted - plan.points:
            raise ObjectiveError(
                f"site '{term.name}' has no KL of its own: the guide puts a Delta there, and its "
                "log q at an auxiliary draw. Use one common beta, or a guide that samples the site "
                "itself, such as pvi.guides.MeanField."
            )


def check_penalties(objective: Any, terms: Any) -> None:
    """Refuse `path` where it would rescale the gradients of penalties too."""
    weighted = objective.num_particles > 1 and (objective.alpha != 1.0 or objective.mean)
    if objective.gradient == "path" and weighted:
        raise ObjectiveError(
            f"gradient='path' multiplies the gradient of each draw by its weight, and that of "
            f"pvi.penalty '{terms.penalties[0].name}' with it. Use gradient='reparam'."
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ObjectiveError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )
