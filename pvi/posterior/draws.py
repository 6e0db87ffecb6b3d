"""Run a guide and a model for many draws, batched where the programs allow it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import Unit
from torch import Tensor

from pvi.engine.backward import draw_summed
from pvi.engine.enumeration import with_sites
from pvi.engine.joint import terms_of
from pvi.engine.numbers import whole_number
from pvi.engine.pairing import pair
from pvi.engine.plan import Plan, particle_slice
from pvi.engine.terms import Term, Terms
from pvi.engine.traces import (
    Program,
    Site,
    deterministic_nodes,
    free,
    particles,
    plates_of,
    replaced,
    rng_state,
    run,
    run_hidden,
    sample_nodes,
    set_rng_state,
    subset,
)
from pvi.errors import DataError
from pvi.progress import progress

CHUNK = 4_000_000  # numbers held at once while drawing


@dataclass(frozen=True)
class Draws:
    """Draws of the latent sites `(S, *shape)` with $\\log p(x, z)$ and $\\log q(z)$, `(S,)`,
    nats.
    """

    values: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor


class Runner:
    """Draws from one guide and model with fixed arguments.

    Args:
        plan: whether draws can be a batch dimension; else they are made one by one.
        trained: for new data the runner of the training data; a site that the model sums out there
            for all rows together keeps its posterior given those.
        rows: how many the training data have.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: Mapping,
        plan: Plan,
        trained: "Runner | None" = None,
        rows: int = 0,
    ):
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self._trained, self._rows = trained, rows
        self.guide_trace = run_hidden(guide, args, kwargs)
        self.model_trace = run_hidden(model, args, kwargs, self.guide_trace)
        sums = plan.enumeration.summed
        self._shared = () if trained is None else trained.shared(sums, rows)
        self.guide_trace = with_sites(self.guide_trace, self.model_trace, self._shared)
        own = tuple(name for name in sums if name not in self._shared)
        self.plan = replace(plan, enumeration=replace(plan.enumeration, summed=own))
        sampled, computed = sample_nodes(self.model_trace), deterministic_nodes(self.model_trace)
        self.nodes = sampled | computed
        self.latent = [name for name, node in sampled.items() if not node["is_observed"]]
        self.observed = [
            name
            for name, node in sampled.items()
            if node["is_observed"] and not isinstance(node["fn"], Unit)  # pyro.factor has no data
        ]
        self.deterministic = list(computed)
        if own:
            model = self.plan.enumeration.model(model)
            self._enumerated = run_hidden(model, args, kwargs, self.guide_trace)

    @property
    def sites(self) -> list[Site]:
        """The sites of both programs; those that are summed out have no `q`."""
        summed = self.plan.enumeration.summed
        return pair(self.guide_trace, self._enumerated if summed else self.model_trace)

    def shared(self, names: Iterable[str], rows: int) -> tuple[str, ...]:
        """Those of the sites that belong to no single one of so many rows."""
        sizes = {name: {plate.size for plate in plates_of(self.nodes[name])} for name in names}
        return tuple(name for name in names if rows not in sizes[name])

    def runs(self, num_draws: int) -> Iterator["Run"]:
        """Runs that together make `num_draws` draws, each from a random state of its own.

        So the same seed gives the same draws, whatever else is computed between two runs.

        Raises:
            DataError: `num_draws` is no whole number >= 1.
        """
        num_draws = whole_number("num_draws", num_draws, error=DataError)
        chunks = [min(self.chunk, num_draws - k) for k in range(0, num_draws, self.chunk)]
        seeds = torch.randint(2**62, (len(chunks),)).tolist()
        for num, seed in progress(list(zip(chunks, seeds, strict=True)), "draw"):
            state = rng_state()
            torch.manual_seed(seed)
            yield Run(self, num, self._draw(num))
            set_rng_state(state)  # not on an error: `drawing` does, this might be much later

    def _draw(self, num: int, given: Any = None) -> Any:
        """Draws from the guide, with the model's sums that belong to the training data."""
        trace = run(self.repeat(self.guide, num), self.args, self.kwargs, given)
        if self._trained is None or not self._shared:
            return trace
        common = self._trained.shared(sample_nodes(trace), self._rows)
        given = subset(trace, common, indices=False)
        past = Run(self._trained, num, self._trained._draw(num, given))
        return with_sites(trace, past.latents, self._shared)

    def repeat(self, fn: Program, num: int) -> Program:
        return particles(fn, num, self.plan.nesting)

    @cached_property
    def chunk(self) -> int:
        """Draws of one run, by memory; 1 where draws can't be a batch dimension."""
        enumerated = self.plan.enumeration
        size = numbers_in(sample_nodes(self._enumerated) if enumerated else self.nodes)
        return max(1, CHUNK // max(size, 1)) if self.plan.vectorized else 1


class Run:
    """A chunk of draws from the guide, and what the model says of them.

    Args:
        runner: the programs and their arguments.
        num: of draws.
        guide_trace: of the guide for all of them.
    """

    def __init__(self, runner: Runner, num: int, guide_trace: Any):
        self.runner = runner
        self.num = num
        self._guide_trace = guide_trace

    @cached_property
    def _model_trace(self) -> Any:
        """The model on the draws; where it sums sites out, with all of their values."""
        r = self.runner
        return r.plan.run_model(r.model, r.args, r.kwargs, self._guide_trace, self.num)

    @cached_property
    def latents(self) -> Any:
        """A trace of all latents: the guide's, and those summed out given them and the data."""
        if not self.runner.plan.enumeration:
            return self._guide_trace
        values = draw_summed(self._guide_trace, self._model_trace, self.runner.plan.enumeration)
        return with_sites(self._guide_trace, replaced(self._model_trace, values), values)

    @cached_property
    def _drawn(self) -> Any:
        """The model on one value of every latent."""
        summed = self.runner.plan.enumeration
        return self._run(self.runner.model) if summed else self._model_trace

    @cached_property
    def _terms(self) -> Terms:
        plan = self.runner.plan
        traces, depth = (self._guide_trace, self._model_trace), plan.depth(self.num)
        return terms_of(*traces, self.num, depth, enumeration=plan.enumeration)

    def _run(self, model: Program) -> Any:
        r = self.runner
        return run(r.repeat(model, self.num), r.args, r.kwargs, self.latents)

    def sample(self) -> dict[str, Tensor]:
        """Latent and deterministic sites."""
        values = self._values(self.latents, self.runner.latent)
        if self.runner.deterministic:
            values |= self._values(self._drawn, self.runner.deterministic)
        return values

    def draws(self) -> Draws:
        """The guide's latent sites with their log densities; others are summed out."""
        log_q = torch.stack([t.log_q_per_particle() for t in self._terms]).sum(0)
        latent = [n for n in self.runner.latent if n not in self.runner.plan.enumeration.summed]
        values = self._values(self._guide_trace, latent)
        return Draws(values, self._terms.log_weights() + log_q, log_q)

    def log_likelihood(self) -> dict[str, Tensor]:
        """Log density of each observation, masked ones 0, unscaled.

        Observations that share a discrete site have one density together, over their common plates.
        """
        data = set(self.runner.observed)
        return {
            t.name: with_draws(t.log_p, self.num, batch_shape(t))
            for t in self._terms
            if t.kind == "likelihood" and t.log_p is not None and data & observed_in(t)
        }

    def log_prior(self) -> dict[str, Tensor]:
        """Log density of each latent under the model, masked ones 0, unscaled.

        Sites that the model sums out are part of the likelihood.
        """
        return {
            t.name: with_draws(t.log_p, self.num, batch_shape(t))
            for t in self._terms
            if t.kind == "latent" and t.log_p is not None
        }

    def prior(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Fresh draws from the model alone: of latent and deterministic sites, and of observed
        ones.
        """
        r = self.runner
        if r.plan.mapped and self.num > 1:
            parts = [Run(r, 1, None).prior() for _ in range(self.num)]
            return stack([p[0] for p in parts]), stack([p[1] for p in parts])
        trace = run(r.repeat(free(r.model), self.num), r.args, r.kwargs)
        latent = [*r.latent, *r.deterministic]
        return self._values(trace, latent), self._values(trace, r.observed)

    def on(self, new: Runner) -> Iterator["Run"]:
        """The same draws for new data: sites of no single row stay, others are drawn anew.

        In runs of the size that the new data need, whatever that of the training data's is.
        """
        for start in range(0, self.num, new.chunk):
            yield self._on(new, start, min(new.chunk, self.num - start))

    def _on(self, new: Runner, start: int, num: int) -> "Run":
        """For `num` of the draws."""
        draws = self if num == self.num else self._cut(start, num)
        own = sample_nodes(draws._guide_trace)
        both = (own, self.runner.nodes)
        rows = {
            name
            for nodes in both
            for name, node in nodes.items()
            if new._rows in {plate.size for plate in plates_of(node)}
        }
        common = own.keys() - rows
        given = subset(draws._guide_trace, common, indices=False)
        trace = run(new.repeat(new.guide, num), new.args, new.kwargs, given)
        return Run(new, num, with_sites(trace, draws.latents, new._shared))

    def _cut(self, start: int, num: int) -> "Run":
        """Draws `start` to `start + num` as a run of their own."""
        r, summed = self.runner, self.runner.plan.enumeration.summed
        place = (start, r.plan.nesting, num)
        part = Run(r, num, particle_slice(self._guide_trace, r.guide_trace, *place))
        if summed:
            single = with_sites(r.guide_trace, r.model_trace, summed)
            part.latents = particle_slice(self.latents, single, *place)
        return part

    def predictive(self, names: list[str]) -> dict[str, Tensor]:
        """`names` drawn from the model with its observations set free."""
        r = self.runner
        if r.plan.mapped and self.num > 1:
            traces = (self.latents, r.guide_trace)
            parts = [particle_slice(*traces, k, r.plan.nesting) for k in range(self.num)]
            return stack([Run(r, 1, part).predictive(names) for part in parts])
        return self._values(self._run(free(self.runner.model)), names)

    def _values(self, trace: Any, names: list[str]) -> dict[str, Tensor]:
        nodes = self.runner.nodes
        return {
            n: with_draws(trace.nodes[n]["value"], self.num, nodes[n]["value"].shape) for n in names
        }


def observed_in(term: Term) -> set[str]:
    """Names of the observed sites in a term."""
    site = term.sites[0]
    return {member.name for member in site.members or (site,) if member.observed}


def batch_shape(term: Term) -> torch.Size:
    """The shape that its plates give to a term."""
    sizes = {plate.dim: plate.size for plate in term.plates if plate.dim is not None}
    return torch.Size(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))


def numbers_in(nodes: Mapping[str, Mapping]) -> int:
    """How many numbers sites hold."""
    shapes = [(node["fn"].shape(), node["value"].shape) for node in nodes.values()]
    return sum(torch.broadcast_shapes(*both).numel() for both in shapes)


def with_draws(value: Tensor, num: int, shape: torch.Size) -> Tensor:
    """A value of a batched run as `(num, *shape)`; one that does not depend on the draw is
    repeated.
    """
    if value.numel() == num * shape.numel():
        return value.reshape(num, *shape)
    return value.reshape(1, *shape).expand(num, *shape)


def stack(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join chunks along the draws."""
    if not parts:
        return {}
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def stack_draws(parts: list[Draws]) -> Draws:
    """Join chunks of draws."""
    log_p, log_q = (torch.cat([getattr(p, key) for p in parts]) for key in ("log_p", "log_q"))
    return Draws(stack([p.values for p in parts]), log_p, log_q)
