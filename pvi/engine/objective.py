"""Objectives: which bound, how each KL is weighted, how gradients are taken: one frozen value.

`ELBO`, `TraceMeanFieldELBO`, `BetaELBO`, `IWAE` and `RenyiELBO` are constructors of `Objective`.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pvi.engine import bounds
from pvi.engine.explain import Explanation, explain
from pvi.engine.gradients import (
    Baseline,
    Gradient,
    check_reparameterized,
    control,
    elbo_score,
    inner_score,
    needs_score,
    outer_score,
    path_ratio,
)
from pvi.engine.plan import Plan, make_plan
from pvi.engine.sampling import Draw, Sampler
from pvi.engine.terms import Terms
from pvi.engine.traces import Program, run
from pvi.errors import ObjectiveError

Beta = float | Mapping[str, float]
SINGLE = Plan(nesting=0, vectorized=False, reason="", scope=bounds.Scope())


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of an objective: `loss` to minimise, `bound` at beta = 1 in nats, and the
    terms.
    """

    loss: Tensor
    bound: Tensor
    terms: Terms


@dataclass(frozen=True)
class Objective(PyroELBO):
    """A variational bound as a value: equal options, equal objective.

    $$L = \\frac{1}{1-\\alpha} \\log \\frac1K \\sum_k \\exp\\{(1-\\alpha)
    [\\log p(x|z_k) - \\beta (\\log q(z_k) - \\log p(z_k))]\\}$$
    and $-L$ is the loss; alpha = 1 is its limit, the mean of the log weights.

    Args:
        num_particles: K, draws from the guide inside one bound.
        alpha: order of the bound: 1 ELBO, 0 IWAE, else Renyi.
        kl: "sample" for log q - log p at the draws, "exact" for closed forms where they are right
            and exist (needs alpha = 1; `explain` shows which sites fell back).
        gradient: "reparam" pathwise; "path" without the score part (less noise near the optimum);
            "score" by log densities, for any guide; "auto" pathwise where possible, else score.
        beta: weight of every KL, or a dict from site name to weight (1 for the others).
        bound_scope: "auto" weights datum by datum where latents are local to a plate, "per_datum"
            insists on it, "joint" weights whole draws (`bound=` of the constructors). Matters for
            alpha != 1 only.
        num_outer: bounds averaged; with global latents each has its own draw of them.
        vectorize_particles: one batched run for all particles, or a loop; `None` tries and
            compares.

    Raises:
        ObjectiveError: options that contradict each other.
    """

    num_particles: int = 1
    alpha: float = 1.0
    kl: Literal["sample", "exact"] = "sample"
    gradient: Gradient = "auto"
    beta: Beta = field(default=1.0, hash=False)
    bound_scope: Literal["auto", "per_datum", "joint"] = "auto"
    num_outer: int = 1
    vectorize_particles: bool | None = None
    _cache: dict = field(default_factory=dict, init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        for name in ("num_particles", "num_outer"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ObjectiveError(f"{name} must be a whole number >= 1, got {value!r}")
        _check_choice("kl", self.kl, ("sample", "exact"))
        _check_choice("gradient", self.gradient, ("auto", "reparam", "path", "score"))
        _check_choice("bound", self.bound_scope, ("auto", "per_datum", "joint"))
        if not math.isfinite(self.alpha):
            raise ObjectiveError(f"alpha must be a finite number, got {self.alpha!r}")
        if self.kl == "exact" and self.alpha != 1.0:
            raise ObjectiveError(
                f"kl='exact' is a form of the ELBO (alpha = 1), got alpha = {self.alpha}: the "
                "weights of an importance-weighted bound need log q and log p at the draws. Use "
                "kl='sample'."
            )
        if self.gradient == "path" and self.kl == "exact":
            raise ObjectiveError(
                "gradient='path' holds the guide's density fixed, which would delete the gradient "
                "of an exact KL. Use kl='sample' with 'path', or gradient='reparam' with "
                "kl='exact'."
            )
        if self.gradient == "path" and isinstance(self.beta, Mapping):
            raise ObjectiveError(
                "gradient='path' needs one common beta: with a beta for each site its correction "
                "is not the same for all draws. Use gradient='reparam'."
            )
        weights = self.beta.values() if isinstance(self.beta, Mapping) else [self.beta]
        if any(not w >= 0 for w in weights):
            raise ObjectiveError(f"beta must be >= 0, got {self.beta!r}")

    # The three things a user asks of an objective.

    def bound(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """One Monte Carlo value of the bound at beta = 1, in nats (higher is better)."""
        with torch.no_grad():
            return float(self.evaluate(model, guide, args, kwargs).bound)

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """The terms of one evaluation with `num_particles` draws."""
        plan = self._plan(model, guide, args, kwargs)
        return self._sampler(model, guide, args, kwargs, plan).draw().terms

    def explain(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Explanation:
        """A printable table: per site its plates, how its KL is computed, gradient and weight."""
        plan = make_plan(model, guide, args, kwargs, self.bound_scope)
        with torch.no_grad():
            terms = self._sampler(model, guide, args, kwargs, plan).draw().terms
        weights = self._weights(terms)
        return explain(terms, plan, self.num_particles, self.alpha, weights, self.gradient)

    def evaluate(
        self, model: Program, guide: Program, args: tuple = (), kwargs: Mapping | None = None
    ) -> Evaluation:
        """Loss, bound and terms of one evaluation; what a training loop needs in one pass.

        Only the loss carries gradients; score terms have the value 0 and a gradient.
        """
        plan = self._plan(model, guide, args, kwargs or {})
        sampler = self._sampler(model, guide, args, kwargs or {}, plan)
        draws = [sampler.draw() for _ in range(self.num_outer)]
        parts = [self._parts(draw, plan) for draw in draws]
        values = torch.stack([part.value for part in parts])
        loss = -values.mean()
        if torch.is_grad_enabled():
            loss = loss - self._score(draws, parts, plan, (model, guide))
        plain = all(w == 1.0 for w in self._weights(draws[0].terms).values())
        bound = values if plain else torch.stack([self._plain(d, plan) for d in draws])
        return Evaluation(loss, bound.detach().mean(), draws[-1].terms)

    # The interface of pyro.infer.ELBO: `loss=` of SVI, and `objective(model, guide)` as a module.

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        return self.evaluate(model, guide, args, kwargs).loss

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return float(self.evaluate(model, guide, args, kwargs).loss)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        loss = self.evaluate(model, guide, args, kwargs).loss
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: Mapping) -> Any:
        guide_trace = run(guide, args, kwargs)
        return run(model, args, kwargs, guide_trace), guide_trace

    @property
    def is_plain(self) -> bool:
        """Whether every KL has weight 1, so that the target is the model's own posterior."""
        weights = self.beta.values() if isinstance(self.beta, Mapping) else [self.beta]
        return all(weight == 1.0 for weight in weights)

    # Inside.

    def _plan(self, model: Program, guide: Program, args: tuple, kwargs: Mapping) -> Plan:
        """The plan of this pair: trivial for one particle, else made once and kept."""
        if self.num_particles == 1:
            return SINGLE
        return self._kept((model, guide), lambda: self._make_plan(model, guide, args, kwargs))

    def _kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A small cache: what was made for the last few pairs of programs."""
        if key not in self._cache:
            while len(self._cache) >= 8:
                del self._cache[next(iter(self._cache))]
            self._cache[key] = make()
        return self._cache[key]

    def _make_plan(self, model: Program, guide: Program, args: tuple, kwargs: Mapping) -> Plan:
        return make_plan(model, guide, args, kwargs, self.bound_scope)

    @property
    def _nested(self) -> bool:
        return self.alpha != 1.0 and self.num_particles > 1

    def _sampler(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping, plan: Plan
    ) -> Sampler:
        batched = self.vectorize_particles
        return Sampler(
            model,
            guide,
            args,
            kwargs,
            plan,
            self.num_particles,
            vectorized=plan.vectorized if batched is None else batched,
            nested=self._nested,
            exact=self.kl == "exact",
            gradient=self.gradient,
        )

    def _parts(self, draw: Draw, plan: Plan) -> bounds.Parts:
        """The bound's value, with the pathwise gradient of `path` arranged for."""
        weight = self._weight(draw.terms)
        if not self._nested:
            return bounds.Parts(bounds.elbo(draw.terms, weight), None)
        outer, inner = bounds.split(draw.terms, weight, plan.scope)
        if inner is None:
            return bounds.Parts(outer, None)
        value = outer + inner.value(self.alpha)
        if draw.taps:
            beta = self.beta if isinstance(self.beta, float | int) else 1.0
            draw.set_ratio(path_ratio(inner.log_w, self.alpha, beta))
            if draw.control is not None:
                value = value - control(draw.control, plan.scope, inner.size * beta)
        return bounds.Parts(value, inner)

    def _plain(self, draw: Draw, plan: Plan) -> Tensor:
        """The bound's value with every KL weight 1."""
        if not self._nested:
            return bounds.elbo(draw.terms, lambda term: 1.0)
        outer, inner = bounds.split(draw.terms, lambda term: 1.0, plan.scope)
        return outer if inner is None else outer + inner.value(self.alpha)

    def _score(self, draws: list[Draw], parts: list[bounds.Parts], plan: Plan, key: Any) -> Tensor:
        """The score part of the gradient as a term of value 0; its mean over the outer draws."""
        sites = needs_score(draws[0].terms, everywhere=self.gradient == "score")
        if self.gradient in ("reparam", "path"):
            check_reparameterized([site.name for site in sites], self.gradient)
        total = torch.zeros(())
        baseline = self._kept((key, "baseline"), Baseline)
        for i, (draw, part) in enumerate(zip(draws, parts, strict=True)):
            weight = self._weight(draw.terms)
            for site in (draw.terms[site.name] for site in sites):
                if not self._nested:
                    total = total + elbo_score(site, draw.terms, weight, baseline)
                elif part.inner is not None and site.name not in plan.scope.outer:
                    inner = part.inner
                    total = total + inner_score(site, inner, plan.scope, self.alpha)
                else:
                    others = [p.value for j, p in enumerate(parts) if j != i]
                    total = total + outer_score(site, part.value, others, baseline)
        return total / len(draws)

    def _weights(self, terms: Terms) -> dict[str, float]:
        """Each site's beta."""
        names = [t.name for t in terms if t.kind != "likelihood"]
        if not isinstance(self.beta, Mapping):
            return {name: float(self.beta) for name in names}
        unknown = set(self.beta) - set(names)
        if unknown:
            raise ObjectiveError(
                f"beta names {sorted(unknown)}, which are no latent sites. The latents are {names}."
            )
        return {name: float(self.beta.get(name, 1.0)) for name in names}

    def _weight(self, terms: Terms) -> bounds.Weight:
        weights = self._weights(terms)
        return lambda term: weights.get(term.name, 1.0)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ObjectiveError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )
