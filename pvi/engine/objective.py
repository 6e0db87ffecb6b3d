"""Objectives: which bound, how each KL is weighted, how gradients are taken: one frozen value.

`ELBO`, `TraceMeanFieldELBO`, `BetaELBO`, `IWAE` and `RenyiELBO` are constructors of `Objective`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pvi.engine import bounds
from pvi.engine.explain import Explanation, explain
from pvi.engine.plan import Plan, make_plan
from pvi.engine.terms import Term, Terms, concatenate, make_terms
from pvi.engine.traces import Program, Site, pair, particles, run, subset
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
        gradient: "auto" or "reparam": pathwise through reparameterised guide sites.
        beta: weight of every KL, or a dict from site name to weight (1 for the others).
        bound: "auto" weights datum by datum where latents are local to a plate, "per_datum" insists
            on it, "joint" weights whole draws. Matters for alpha != 1 only.
        num_outer: bounds averaged; with global latents each has its own draw of them.
        vectorize_particles: one batched run for all particles, or a loop; `None` tries and
            compares.

    Raises:
        ObjectiveError: options that contradict each other.
    """

    num_particles: int = 1
    alpha: float = 1.0
    kl: Literal["sample", "exact"] = "sample"
    gradient: Literal["auto", "reparam"] = "auto"
    beta: Beta = 1.0
    bound_scope: Literal["auto", "per_datum", "joint"] = "auto"
    num_outer: int = 1
    vectorize_particles: bool | None = None
    _plans: dict = field(default_factory=dict, init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        for name in ("num_particles", "num_outer"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ObjectiveError(f"{name} must be a whole number >= 1, got {value!r}")
        _check_choice("kl", self.kl, ("sample", "exact"))
        _check_choice("gradient", self.gradient, ("auto", "reparam"))
        _check_choice("bound", self.bound_scope, ("auto", "per_datum", "joint"))
        if self.kl == "exact" and self.alpha != 1.0:
            raise ObjectiveError(
                f"kl='exact' is a form of the ELBO (alpha = 1), got alpha = {self.alpha}: the "
                "weights of an importance-weighted bound need log q and log p at the draws. Use "
                "kl='sample'."
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
        return next(self._draws(model, guide, args, kwargs, self._plan(model, guide, args, kwargs)))

    def explain(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Explanation:
        """A printable table: per site its plates, how its KL is computed, gradient and weight."""
        plan = make_plan(model, guide, args, kwargs, self.bound_scope)
        with torch.no_grad():
            terms = next(self._draws(model, guide, args, kwargs, plan))
        return explain(terms, plan, self.num_particles, self.alpha, self._weights(terms))

    def evaluate(
        self, model: Program, guide: Program, args: tuple = (), kwargs: Mapping | None = None
    ) -> Evaluation:
        """Loss, bound and terms of one evaluation; what a training loop needs in one pass."""
        kwargs = kwargs or {}
        plan = self._plan(model, guide, args, kwargs)
        losses, values, terms = [], [], None
        for terms in self._draws(model, guide, args, kwargs, plan):
            weights = self._weights(terms)
            value = self._value(terms, plan, weights)
            losses.append(-value)
            plain = all(w == 1.0 for w in weights.values())
            values.append(value.detach() if plain else self._value(terms, plan, {}).detach())
        if terms is None:
            raise ObjectiveError("num_outer must be >= 1")
        return Evaluation(torch.stack(losses).mean(), torch.stack(values).mean(), terms)

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

    # Inside.

    def _plan(self, model: Program, guide: Program, args: tuple, kwargs: Mapping) -> Plan:
        """The plan of this pair: trivial for one particle, else made once and kept."""
        if self.num_particles == 1:
            return SINGLE
        key = (model, guide)
        if key not in self._plans:
            while len(self._plans) >= 8:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = make_plan(model, guide, args, kwargs, self.bound_scope)
        return self._plans[key]

    def _draws(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping, plan: Plan
    ) -> Iterator[Terms]:
        """`num_outer` independent sets of terms, each with `num_particles` particles."""
        nested = self.alpha != 1.0 and self.num_particles > 1
        vectorized = (
            plan.vectorized if self.vectorize_particles is None else self.vectorize_particles
        )
        for _ in range(self.num_outer):
            given = None
            if nested and plan.scope.outer:
                given = subset(run(guide, args, kwargs), plan.scope.outer)
            if self.num_particles == 1 or vectorized:
                yield self._once(
                    model, guide, args, kwargs, plan.nesting, self.num_particles, given
                )
                continue
            runs = []
            for _ in range(self.num_particles):
                guide_trace = run(guide, args, kwargs, given)
                if nested and given is None:  # all particles of one bound share one minibatch
                    given = subset(guide_trace, ())
                runs.append(self._terms(model, args, kwargs, guide_trace, 1, None))
            yield concatenate(runs)

    def _once(
        self,
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: Mapping,
        nesting: int,
        num_particles: int,
        given: Any,
    ) -> Terms:
        guide_trace = run(particles(guide, num_particles, nesting), args, kwargs, given)
        model = particles(model, num_particles, nesting)
        return self._terms(
            model, args, kwargs, guide_trace, num_particles, nesting if num_particles > 1 else None
        )

    def _terms(
        self,
        model: Program,
        args: tuple,
        kwargs: Mapping,
        guide_trace: Any,
        num_particles: int,
        nesting: int | None,
    ) -> Terms:
        sites = pair(guide_trace, run(model, args, kwargs, guide_trace))
        exact = _exact_sites(sites, list(guide_trace.nodes)) if self.kl == "exact" else {}
        terms = make_terms(sites, exact, num_particles, nesting)
        if torch.is_grad_enabled():
            _check_reparameterized(terms)
        return terms

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

    def _value(self, terms: Terms, plan: Plan, weights: Mapping[str, float]) -> Tensor:
        def weight(term: Term) -> float:
            return weights.get(term.name, 1.0)

        if self.alpha == 1.0 or self.num_particles == 1:
            return bounds.elbo(terms, weight)
        return bounds.nested(terms, weight, self.alpha, plan.scope)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ObjectiveError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )


def _check_reparameterized(terms: Terms) -> None:
    for term in terms:
        if not term.reparameterized and term.log_q is not None and term.log_q.requires_grad:
            raise ObjectiveError(
                f"guide site '{term.name}' has parameters but no reparameterised sampler, so "
                "pathwise gradients would silently miss them. Use a reparameterised distribution "
                f"there, or sum '{term.name}' out in the model."
            )


def _exact_sites(sites: list[Site], guide_order: list[str]) -> dict[str, str]:
    """For which latents the exact KL is right: "exact", or why its prior may depend on what
    follows.

    The prior of z may depend on every latent that precedes it in the model. The closed form is an
    expectation over z alone, so none of those may follow z in the guide, where they may depend on
    it.
    """
    model_order = [s.name for s in sites if s.p is not None and s.q is not None]
    position = {name: i for i, name in enumerate(guide_order)}
    exact = {}
    for i, name in enumerate(model_order):
        later = [other for other in model_order[:i] if position[other] > position[name]]
        exact[name] = (
            f"sample: prior may depend on '{later[0]}', later in the guide" if later else "exact"
        )
    return exact


def ELBO(
    num_particles: int = 1,
    *,
    kl: Literal["sample", "exact"] = "sample",
    gradient: Literal["auto", "reparam"] = "auto",
    beta: Beta = 1.0,
    vectorize_particles: bool | None = None,
) -> Objective:
    """Evidence lower bound $E_q[\\log p(x, z) - \\log q(z)] \\le \\log p(x)$, in nats.

    Args:
        num_particles: draws averaged in one evaluation.
        kl: "sample" (Kingma and Welling 2014, estimator A) or "exact" (estimator B).
        gradient: "auto" or "reparam".
        beta: weight of each KL; see `BetaELBO`.
        vectorize_particles: `None` to batch particles where the programs allow it.

    >>> ELBO(num_particles=4).num_particles
    4
    """
    return Objective(
        num_particles, kl=kl, gradient=gradient, beta=beta, vectorize_particles=vectorize_particles
    )


def TraceMeanFieldELBO(num_particles: int = 1, **options: Any) -> Objective:
    """`ELBO(kl="exact")`: $E_q[\\log p(x|z)] - \\sum_s KL(q_s \\| p_s)$, in nats.

    A site's KL is exact where torch or Pyro registers it and the guide's order makes it right;
    elsewhere it is sampled, which `explain` shows.
    """
    return ELBO(num_particles, kl="exact", **options)


def BetaELBO(beta: Beta, num_particles: int = 1, **options: Any) -> Objective:
    """$E_q[\\log p(x|z)] - \\beta\\,KL(q \\| p)$ (Higgins et al. 2017), in nats; a bound at beta =
    1 only.

    Args:
        beta: one weight >= 0, or a dict from site name to weight.
    """
    return ELBO(num_particles, beta=beta, **options)


def IWAE(num_particles: int, **options: Any) -> Objective:
    """Importance-weighted bound $E \\log \\frac1K \\sum_k p(x, z_k) / q(z_k)$ (Burda et al. 2016),
    in nats.

    With latents in a plate the mean over particles is taken datum by datum; latents outside it are
    drawn once per bound, so the value reaches the evidence as K grows only without such globals.
    """
    return RenyiELBO(0.0, num_particles, **options)


def RenyiELBO(
    alpha: float,
    num_particles: int,
    *,
    gradient: Literal["auto", "reparam"] = "auto",
    beta: Beta = 1.0,
    bound: Literal["auto", "per_datum", "joint"] = "auto",
    num_outer: int = 1,
    vectorize_particles: bool | None = None,
) -> Objective:
    """Renyi bound of order alpha (Li and Turner 2016), in nats.

    A lower bound on the evidence in the mean for alpha >= 0; an estimate, not a bound, for alpha <
    0.
    """
    return Objective(
        num_particles,
        alpha=float(alpha),
        gradient=gradient,
        beta=beta,
        bound_scope=bound,
        num_outer=num_outer,
        vectorize_particles=vectorize_particles,
    )
