"""Draw from the guide, run the model on the draws, and return the terms of one bound."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pvi.engine.gradients import (
    Detached,
    Gradient,
    Tap,
    Values,
    check_reparameterized,
    frozen,
    leaves_of,
)
from pvi.engine.independence import described
from pvi.engine.joint import terms_of
from pvi.engine.pairing import pair
from pvi.engine.plan import Plan
from pvi.engine.terms import Terms, concatenate, make_terms
from pvi.engine.traces import (
    Program,
    Site,
    density,
    replaced,
    rng_at,
    rng_state,
    run,
    sample_nodes,
    subset,
)


@dataclass(frozen=True)
class Draw:
    """Terms of K particles; for `path`, the taps that wait for their ratio and the control term.

    Args:
        taps: one for a batched run, else one a particle.
        control: log q of the inner sites at fixed draws, through the outer draws only, or `None`.
        notes: what networks in the model do with their weights.
    """

    terms: Terms
    guide_trace: Any
    taps: list[Tap] = field(default_factory=list)
    control: Terms | None = None
    notes: tuple[str, ...] = ()

    def set_ratio(self, ratio: Tensor, scaled: bool) -> None:
        """Hand each tap its draws' factor `(K, *plates)`."""
        for k, tap in enumerate(self.taps):
            tap.scaled = scaled
            tap.ratio = ratio if tap.batched else ratio[k]


@dataclass(frozen=True)
class Sampler:
    """How to draw from one pair of programs.

    Args:
        nested: outer sites are drawn once for all particles.
        exact: use closed-form KLs where they are right.
        detached: cut draws from their parameters.
    """

    model: Program
    guide: Program
    args: tuple
    kwargs: Mapping
    plan: Plan
    num_particles: int
    vectorized: bool
    nested: bool
    exact: bool
    gradient: Gradient
    detached: bool = False

    def draw(self) -> Draw:
        """One set of `num_particles` draws."""
        outer = self.plan.scope.outer if self.nested else frozenset()
        given = subset(self._guide(1), outer) if outer else None
        if self.num_particles == 1 or self.vectorized:
            return self._run(self.num_particles, given)
        draws = []
        for _ in range(self.num_particles):
            draws.append(self._run(1, given))
            if self.nested and given is None:  # all particles of one bound share one minibatch
                given = subset(draws[-1].guide_trace, ())
        controls = [d.control for d in draws if d.control is not None]
        return Draw(
            concatenate([d.terms for d in draws]),
            draws[-1].guide_trace,
            [tap for d in draws for tap in d.taps],
            concatenate(controls) if controls else None,
            draws[-1].notes,
        )

    def _guide(self, num: int, given: Any = None) -> Any:
        guide = self.plan.enumeration.guide(self.guide, num)
        with Detached(self.plan.points) if self.detached else nullcontext():
            return run(guide, self.args, self.kwargs, given, params=False)

    def _run(self, num: int, given: Any) -> Draw:
        """One batched run of `num` particles, or a single one."""
        if self.gradient == "path" and torch.is_grad_enabled():
            return self._run_path(num, given)
        guide_trace = self._guide(num, given)
        model_trace = self._model(num, guide_trace)
        terms = self._terms(guide_trace, model_trace, num)
        return Draw(terms, guide_trace, notes=self._notes(model_trace, num))

    def _model(self, num: int, guide_trace: Any) -> Any:
        programs = (self.model, self.args, self.kwargs, guide_trace, num)
        return self.plan.run_model(*programs, local=not self._why_not_local(num))

    def _why_not_local(self, num: int) -> str:
        """Why networks must run on the draws of their weights; "" if activations of the same
        distribution will do.
        """
        if self.gradient not in ("auto", "reparam") or self.detached:
            return f"gradient='{self.gradient}' is that of a draw"
        if self.nested:
            return "this objective weighs draws by their likelihoods"
        if self.plan.mapped and num > 1:
            return "the model is mapped over particles"
        return ""

    def _notes(self, model_trace: Any, num: int) -> tuple[str, ...]:
        how, instead = self.plan.local, self._why_not_local(num)
        return tuple(described(model_trace.requests, how, instead))

    def _terms(
        self, guide_trace: Any, model_trace: Any, num: int, sites: list[Site] | None = None
    ) -> Terms:
        return terms_of(
            guide_trace,
            model_trace,
            num,
            self.plan.depth(num),
            exact=self.exact,
            sites=sites,
            enumeration=self.plan.enumeration,
        )

    def _run_path(self, num: int, given: Any) -> Draw:
        """A run whose log q is evaluated with the guide's parameters held fixed.

        With outer draws (theta) the inner log q(z | theta) must not see theta either: its mean-zero
        part through theta comes back as the control term, through theta only.
        """
        guide, rng = self.plan.enumeration.guide(self.guide, num), rng_state()
        guide_trace = run(guide, self.args, self.kwargs, given)
        tap, outer = Tap(num > 1), set(given.nodes) if given is not None else set()
        nodes = sample_nodes(guide_trace)
        drawn = {name: node["value"] for name, node in nodes.items() if not node["is_observed"]}
        masks: dict[str, Any] = {}
        inner = {
            n: v if n in self.plan.points else _tapped(tap, nodes[n], partial(masks.get, n))
            for n, v in drawn.items()
            if n not in outer
        }
        model_trace = self._model(num, replaced(guide_trace, inner))
        fixed = {n: v.detach() for n, v in drawn.items()}
        outside = {n: drawn[n] for n in outer if n in drawn}
        densities = {n: node["fn"].log_prob(node["value"]) for n, node in nodes.items()}
        rigid = [n for n, x in densities.items() if x.requires_grad and not _reparam(nodes[n])]
        check_reparameterized(rigid, "path")
        leaves = leaves_of([*drawn.values(), *densities.values()])
        indices = subset(guide_trace, ())

        def again(values: Mapping[str, Tensor]) -> Any:
            with rng_at(rng), frozen(leaves), Values(values):
                trace = run(guide, self.args, self.kwargs, indices)
                for node in sample_nodes(trace).values():
                    node["fn"] = _evaluated(node["fn"], node["value"])
                return trace

        held = again({**fixed, **inner})
        sites = pair(held, model_trace)
        masks |= {site.name: site.q.mask for site in sites if site.q is not None}
        if not outside:
            return Draw(self._terms(guide_trace, model_trace, num, sites), guide_trace, [tap])
        through = pair(again({**fixed, **outside}), model_trace)
        by_name = {site.name: site for site in through}
        sites = [replace(s, q=by_name[s.name].q) if s.name in outer else s for s in sites]
        control = [replace(s, p=None, observed=False) for s in through if s.name in inner]
        terms = self._terms(guide_trace, model_trace, num, sites)
        through_only = make_terms(control, {}, num, self.plan.depth(num))
        return Draw(terms, guide_trace, [tap], through_only)


def _evaluated(fn: Any, value: Tensor) -> Any:
    """The distribution with this value's density computed now: flows look up their parameters only
    when they are asked for it, and these must be the frozen ones.
    """
    known, log_prob = copy(fn), fn.log_prob(value)
    known.log_prob = lambda x: log_prob if x is value else fn.log_prob(x)
    return known


def _tapped(tap: Tap, node: Any, mask: Callable[[], Any]) -> Tensor:
    return tap.view(node["value"], node["fn"].event_dim, density(node).scale, mask)


def _reparam(node: Mapping) -> bool:
    return bool(getattr(node["fn"], "has_rsample", False))
