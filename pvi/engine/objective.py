"""Objectives: which bound, how each KL is weighted, how gradients are taken: one frozen value.

`ELBO`, `TraceMeanFieldELBO`, `BetaELBO`, `IWAE` and `RenyiELBO` are constructors of `Objective`.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pvi.engine import bounds
from pvi.engine.custom import GradientRule, weighted
from pvi.engine.enumeration import check_drawn, check_objective, mode
from pvi.engine.explain import Explanation, explain
from pvi.engine.gradients import (
    Baseline,
    Gradient,
    control,
    elbo_score,
    inner_score,
    needs_score,
    outer_score,
    path_ratio,
    zero,
)
from pvi.engine.plan import Plan, make_plan, single_plan
from pvi.engine.refusals import (
    check_covered,
    check_deltas,
    check_options,
    check_own,
    check_penalties,
    check_score,
    named_losses,
)
from pvi.engine.sampling import Draw, Sampler
from pvi.engine.schedules import Schedule
from pvi.engine.terms import Terms, Weight, concatenate
from pvi.engine.traces import Program, run
from pvi.engine.weighting import Beta, Rule, check_beta, filled, schedules_in, site_weights
from pvi.errors import ObjectiveError


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of an objective.

    Args:
        loss: to minimise; carries the gradients.
        bound: at weight 1 for every KL and without penalties, nats.
        terms: of all draws.
        parts: what a rule or a gradient of several losses adds to the record.
    """

    loss: Tensor
    bound: Tensor
    terms: Terms
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def record(self) -> dict[str, float]:
        """Bound, loss, log likelihood, KL of each latent (`kl/name`), penalty and parts, nats."""
        names, numbers = self.stacked()
        return dict(zip(names, numbers.tolist(), strict=True))  # one transfer from the device

    def stacked(self) -> tuple[tuple[str, ...], Tensor]:
        """The names and the numbers of `record`, still on their device."""
        with torch.no_grad():
            values = {"bound": self.bound, "loss": self.loss}
            values["log_likelihood"] = self.terms.log_likelihood().mean()
            values |= {f"kl/{name}": kl for name, kl in self.terms.kl().items()}
            if self.terms.penalties:
                values["penalty"] = self.terms.penalty().mean()
            values |= self.parts
            return tuple(values), torch.stack([v.to(self.loss) for v in values.values()])


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
            "score" by log densities, for any guide; "auto" pathwise where possible, else score; or
            a function of `WeightedDraws` that returns a loss to differentiate.
        beta: weight of every KL, or a dict from site name to weight (1 for the others); a weight
            may be one of `pvi.schedules`.
        weighting: `FreeBits`, `Capacity` or `BetaTC` in place of the KLs that they cover.
        mean: in place of alpha, a function of your own from log weights `(K, *plates)` to
            `(*plates)`, nats; it decides by itself whether the value is a bound.
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
    gradient: Gradient | GradientRule = "auto"
    beta: Beta = field(default=1.0, hash=False)
    weighting: Rule | None = field(default=None, hash=False)
    mean: bounds.Mean | None = None
    bound_scope: Literal["auto", "per_datum", "joint"] = "auto"
    num_outer: int = 1
    vectorize_particles: bool | None = None
    _cache: dict = field(default_factory=dict, init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        check_options(self)

    # The three things a user asks of an objective.

    def bound(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """One Monte Carlo value of the bound at beta = 1, in nats (higher is better)."""
        with torch.no_grad():
            return float(self.at(0, 0.0).evaluate(model, guide, args, kwargs).bound)

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """The terms of one evaluation with `num_particles` draws."""
        plan = self._plan(model, guide, args, kwargs)
        return self._sampler(model, guide, args, kwargs, plan).draw().terms

    def explain(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Explanation:
        """A printable table: per site its plates, how its KL is computed, gradient and weight."""
        plan = make_plan(model, guide, args, kwargs, self.bound_scope)
        with torch.no_grad():
            draw = self._sampler(model, guide, args, kwargs, plan).draw()
        return explain(draw.terms, plan, self, draw.notes)

    def evaluate(
        self, model: Program, guide: Program, args: tuple = (), kwargs: Mapping | None = None
    ) -> Evaluation:
        """Loss, bound and terms of one evaluation; what a training loop needs in one pass.

        Only the loss carries gradients; score terms have the value 0 and a gradient.
        """
        programs = (model, guide, args, kwargs or {})
        plan = self._plan(*programs)
        sampler = self._sampler(*programs, plan)
        draws = [sampler.draw() for _ in range(self.num_outer)]
        weight = self._weight(draws[0].terms)
        check_deltas(self, draws[0].terms, plan)
        parts = [self._trained(draw, plan, weight) for draw in draws]
        values = parts[0].value if len(parts) == 1 else torch.stack([p.value for p in parts])
        terms = draws[0].terms if len(draws) == 1 else concatenate([d.terms for d in draws])
        recorded = _mean(part.recorded for part in parts)
        loss = -values.mean()
        if torch.is_grad_enabled() and self._rule is not None:
            losses = self._losses(draws, parts, plan, programs)
            loss = loss.detach() + sum(zero(x) for x in losses.values())
            recorded = recorded | losses
            if self._detaches and terms.penalties:
                loss = loss - self._penalty_score(draws, plan, weight, (model, guide))
        elif torch.is_grad_enabled():
            loss = loss - self._score(draws, parts, plan, weight, (model, guide))
        if terms.penalties:
            check_penalties(self, terms)
            loss = loss + terms.penalty().mean()
        if not self.is_plain:
            with torch.no_grad():
                parts = [self._parts(draw.terms, plan, lambda term: 1.0) for draw in draws]
            values = parts[0].value if len(parts) == 1 else torch.stack([p.value for p in parts])
        return Evaluation(loss, values.detach().mean(), terms, recorded)

    def at(self, step: int | None = None, epoch: float | None = None) -> "Objective":
        """The objective after so many steps and epochs: schedules replaced by their values.

        Raises:
            ObjectiveError: a schedule counts in what was not given.
        """
        found = list(self.schedules())
        if not found:
            return self
        for schedule in found:
            if schedule.length and {"step": step, "epoch": epoch}[schedule.unit] is None:
                raise ObjectiveError(f"the schedule '{schedule}' needs at({schedule.unit}=...)")
        return self.with_weights([s.at(step or 0, epoch or 0.0) for s in found])

    def with_weights(self, values: Sequence[float | Tensor]) -> "Objective":
        """The objective with numbers, or 0-dim tensors, in the place of its `schedules()`."""
        given = iter(values)
        now = copy(self)  # not checked again; plans and baselines are shared
        for name in ("beta", "weighting"):
            object.__setattr__(now, name, filled(getattr(self, name), lambda _: next(given)))
        check_beta(now.beta)
        return now

    def schedules(self) -> Iterator[Schedule]:
        """The schedules among the weights."""
        yield from schedules_in(self.beta)
        yield from schedules_in(self.weighting)

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

    def baseline(self, model: Program, guide: Program) -> Baseline:
        """The moving averages that score gradients of this pair subtract."""
        return self._kept(((model, guide), "baseline"), Baseline)

    @property
    def is_plain(self) -> bool:
        """Whether every KL has weight 1, so that the target is the model's own posterior."""
        weights = self.beta.values() if isinstance(self.beta, Mapping) else [self.beta]
        if self.weighting is not None or any(isinstance(w, Tensor) for w in weights):
            return False
        return all(weight == 1.0 for weight in weights)

    @property
    def is_weighted(self) -> bool:
        """Whether draws are weighted against each other."""
        return self.num_particles > 1 and (self.alpha != 1.0 or self.mean is not None)

    # Inside.

    @property
    def _order(self) -> bounds.Order:
        return self.mean or self.alpha

    @property
    def _rule(self) -> GradientRule | None:
        return self.gradient if callable(self.gradient) else None

    @property
    def _detaches(self) -> bool:
        """Whether a gradient of the user's own wants draws cut from their parameters."""
        return getattr(self._rule, "detach_draws", False)

    @property
    def _nested(self) -> bool:
        """Whether log weights are formed: a mean of the log weights does not need them."""
        return self._rule is not None or self.mean is not None or self.is_weighted

    def _plan(self, model: Program, guide: Program, args: tuple, kwargs: Mapping) -> Plan:
        """The plan of this pair, made once and kept; for one particle from a single look."""
        programs, key = (model, guide, args, kwargs), (model, guide, mode(args, kwargs))
        if self.num_particles == 1 and not self._nested:
            score = self.gradient == "score"
            return self._kept(key, lambda: single_plan(*programs, score=score))
        return self._kept(key, lambda: make_plan(*programs, self.bound_scope))

    def _kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A small cache: what was made for the last few pairs of programs."""
        if key not in self._cache:
            while len(self._cache) >= 8:
                del self._cache[next(iter(self._cache))]
            self._cache[key] = make()
        return self._cache[key]

    def _sampler(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping, plan: Plan
    ) -> Sampler:
        check_objective(self, plan.enumeration)
        batched = self.vectorize_particles
        gradient: Gradient = "auto" if callable(self.gradient) else self.gradient
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
            gradient=gradient,
            detached=gradient == "score" or self._detaches,
        )

    def _trained(self, draw: Draw, plan: Plan, weight: Weight) -> bounds.Parts:
        """The bound to train on: with a rule for its KLs, or the gradient of `path`."""
        if self.weighting is not None:
            found = self.weighting.covers(draw.terms)
            check_covered(self.weighting, found, weight)
            covered = {term.name for term in found}
            rest = draw.terms.log_weights(lambda t: 0.0 if t.name in covered else weight(t))
            cost, recorded = self.weighting.cost(found)
            return bounds.Parts(rest.mean() - cost, recorded=recorded)
        parts = self._parts(draw.terms, plan, weight)
        inner = parts.inner
        if inner is None or not draw.taps:
            return parts
        beta: Any = 1.0 if isinstance(self.beta, Mapping) else self.beta
        draw.set_ratio(path_ratio(inner.log_w, self._order, beta), inner.scaled)
        if draw.control is None:
            return parts
        correction = control(draw.control, plan.scope, inner.size * beta)
        return replace(parts, value=parts.value - correction)

    def _parts(self, terms: Terms, plan: Plan, weight: Weight) -> bounds.Parts:
        """The bound with any weights of the KLs."""
        if not self._nested:
            return bounds.Parts(terms.log_weights(weight).mean())
        outer, inner = bounds.split(terms, weight, plan.scope)
        value = outer if inner is None else outer + inner.value(self._order)
        return bounds.Parts(value, inner, outer)

    def _losses(
        self, draws: list[Draw], parts: list[bounds.Parts], plan: Plan, programs: tuple
    ) -> dict[str, Tensor]:
        """The losses of a gradient of the user's own, each averaged over the outer draws."""
        found = []
        for draw, part in zip(draws, parts, strict=True):
            if part.inner is None or self._rule is None:
                raise ObjectiveError("a gradient of your own needs a latent that is weighted")
            if not self._detaches:
                check_own(needs_score(draw.terms))
            given = weighted(draw.terms, part.inner, part.outer, plan.scope, programs)
            found.append(named_losses(self._rule(given)))
        return _mean(found)

    def _score(
        self,
        draws: list[Draw],
        parts: list[bounds.Parts],
        plan: Plan,
        weight: Weight,
        key: Any,
    ) -> Tensor:
        """The score part of the gradient as a term of value 0; its mean over the outer draws."""
        found = needs_score(draws[0].terms, everywhere=self.gradient == "score")
        sites = [site.name for site in found if site.name not in plan.points]
        check_score(self, sites)
        check_drawn(draws[0].guide_trace, sites)
        total = torch.zeros(())
        if not sites:
            return total
        baseline = self.baseline(*key)
        shared = (weight, baseline, plan.scope.plates)
        gains = [p.value - d.terms.penalty().mean() for p, d in zip(parts, draws, strict=True)]
        for i, (draw, part) in enumerate(zip(draws, parts, strict=True)):
            terms, penalties = draw.terms, draw.terms.penalties
            for site in (terms[name] for name in sites):
                if not self._nested:
                    total = total + elbo_score(site, (*terms, *penalties), *shared)
                elif part.inner is None or site.name in plan.scope.outer:
                    others = [gain for j, gain in enumerate(gains) if j != i]
                    total = total + outer_score(site, gains[i], others, baseline)
                else:
                    total = total + inner_score(site, part.inner, plan.scope, self._order)
                    if penalties:
                        total = total + elbo_score(site, penalties, *shared)
        return total / len(draws)

    def _penalty_score(self, draws: list[Draw], plan: Plan, weight: Weight, key: Any) -> Tensor:
        """The score part of the penalties' gradient where a gradient of one's own detaches."""
        total = torch.zeros(())
        shared = (weight, self.baseline(*key), plan.scope.plates)
        for terms in (draw.terms for draw in draws):
            for site in needs_score(terms, everywhere=True):
                if site.name not in plan.points | plan.scope.outer:
                    total = total + elbo_score(site, terms.penalties, *shared)
        return total / len(draws)

    def _weight(self, terms: Terms) -> Weight:
        weights = site_weights(self.beta, terms)
        return lambda term: weights.get(term.name, 1.0)


def _mean(records: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Entry by entry; one that a record lacks counts as 0 there."""
    records = list(records)
    means: dict[str, Tensor] = {}
    for name, x in (entry for record in records for entry in record.items()):
        means[name] = means.get(name, torch.zeros(())) + x / len(records)
    return means
