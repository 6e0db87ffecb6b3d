"""Options of an objective that contradict each other, each with its message."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvi.engine.gradients import check_reparameterized, derivatives
from pvi.engine.plan import Plan
from pvi.engine.terms import Term, Terms, Weight
from pvi.engine.weighting import check_beta
from pvi.errors import ObjectiveError

RESERVED = {"bound", "loss", "log_likelihood", "penalty", "lr", "grad_norm"}
RESERVED |= {"bound_se", "validation_bound", "seconds"}


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
    if isinstance(o.gradient, type):
        raise ObjectiveError(f"gradient is the class {o.gradient.__name__}; pass an instance of it")
    if not callable(o.gradient):
        _check_choice("gradient", o.gradient, ("auto", "reparam", "path", "score"))
    _check_choice("bound", o.bound_scope, ("auto", "per_datum", "joint"))
    if not math.isfinite(o.alpha):
        raise ObjectiveError(f"alpha must be a finite number, got {o.alpha!r}")
    check_beta(o.beta)
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
    if o.mean is not None and o.gradient == "path" and not _is_smooth(o.mean, o.num_particles):
        raise ObjectiveError(
            "gradient='path' needs a mean= with continuous second derivatives, but this one has a "
            "kink (a max, a clamp), at which autograd sees none. Use 'reparam' or 'score'."
        )


def _is_smooth(mean: Any, count: int) -> bool:
    """Whether second derivatives by autograd add up to the change of the first, on a probe."""
    start = 3.0 * torch.randn(count, 64, generator=torch.Generator().manual_seed(0)).double()
    step = torch.zeros(count, 1, dtype=start.dtype)
    step[0] = 1.0
    grid = torch.linspace(-4.0, 4.0, 81, dtype=start.dtype)
    slopes, curvatures = zip(*(derivatives(start + t * step, mean) for t in grid), strict=True)
    change = slopes[-1][0] - slopes[0][0]
    area = torch.trapezoid(torch.stack([c[0] for c in curvatures]), grid, dim=0)
    return bool(torch.allclose(change, area, atol=0.02))


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
    if isinstance(o.weighting, type) or not hasattr(o.weighting, "covers"):
        raise ObjectiveError(
            "weighting must be a rule such as pvi.FreeBits(0.5), pvi.Capacity(25.0) or "
            f"pvi.BetaTC(6.0), got {o.weighting!r}"
        )
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
    if o.weighting.sampled and o.kl == "exact":
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
    for term in terms:
        if objective.gradient not in ("auto", "reparam") and term.certain:
            raise ObjectiveError(
                f"guide site '{term.name}' has but one value, whose density has no gradient: only "
                f"the straight-through one reaches the guide. Use gradient='reparam', not "
                f"{objective.gradient!r}."
            )
        if term.point and term.name in weighted - plan.points:
            raise ObjectiveError(
                f"site '{term.name}' has no KL of its own: the guide puts a Delta there, and its "
                "log q at an auxiliary draw. Use one common beta, or a guide that samples the site "
                "itself, such as pvi.guides.MeanField."
            )


def check_covered(rule: Any, found: list[Term], weight: Weight) -> None:
    """Refuse a beta for sites whose KL a rule replaces."""
    for term in found:
        if weight(term) != 1.0:
            raise ObjectiveError(
                f"site '{term.name}' has beta = {weight(term):g}, but {type(rule).__name__} takes "
                "the place of its weighted KL. Give the rule a schedule, or name other sites."
            )


def check_own(sites: list[Any]) -> None:
    """Refuse a gradient of one's own that would miss draws without reparameterisation."""
    if sites:
        raise ObjectiveError(
            f"guide site '{sites[0].name}' has no reparameterised sampler, so the gradient of your "
            "own would silently miss it. Give the function detach_draws = True and use "
            "draws.log_q, or take gradient='auto'."
        )


def named_losses(losses: Any) -> dict[str, Tensor]:
    """What a gradient of one's own returned, by name: scalars, under names of their own."""
    named = {"surrogate": losses} if isinstance(losses, Tensor) else losses
    scalars = isinstance(named, Mapping) and all(
        isinstance(x, Tensor) and x.dim() == 0 for x in named.values()
    )
    if not scalars or not named:
        raise ObjectiveError(
            "a gradient of your own must return a scalar tensor, or a dict of them; got "
            f"{getattr(losses, 'shape', losses)!r}"
        )
    for name in named:
        if name in RESERVED or name.startswith("kl/"):
            raise ObjectiveError(f"a loss can't be named '{name}', which the history holds already")
    return dict(named)


def check_penalties(objective: Any, terms: Any) -> None:
    """Refuse `path` where it would rescale the gradients of penalties too."""
    if objective.gradient == "path" and objective.is_weighted:
        raise ObjectiveError(
            f"gradient='path' multiplies the gradient of each draw by its weight, and that of "
            f"pvi.penalty '{terms.penalties[0].name}' with it. Use gradient='reparam'."
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ObjectiveError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )
