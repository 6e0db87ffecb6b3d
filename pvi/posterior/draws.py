"""Run a guide and a model for many draws, batched where the programs allow it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from pvi.engine.joint import terms_of
from pvi.engine.plan import Plan
from pvi.engine.terms import Terms
from pvi.engine.traces import (
    Program,
    deterministic_nodes,
    particles,
    preserved_rng,
    run,
    run_hidden,
    sample_nodes,
)
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
    """

    def __init__(self, model: Program, guide: Program, args: tuple, kwargs: Mapping, plan: Plan):
        self.model, self.guide, self.args, self.kwargs, self.plan = model, guide, args, kwargs, plan
        self.guide_trace = run_hidden(guide, args, kwargs)
        self.model_trace = run_hidden(model, args, kwargs, self.guide_trace)
        sampled, computed = sample_nodes(self.model_trace), deterministic_nodes(self.model_trace)
        self.nodes = sampled | computed
        self.latent = [name for name, node in sampled.items() if not node["is_observed"]]
        self.observed = [
            name
            for name, node in sampled.items()
            if node["is_observed"] and not isinstance(node["fn"], Unit)  # pyro.factor has no data
        ]
        self.deterministic = list(computed)

    def runs(self, num_draws: int) -> Iterator["Run"]:
        """Runs that together make `num_draws` draws, each from a random state of its own.

        So the same seed gives the same draws, whatever else is computed between two runs.
        """
        chunks = list(self._chunks(num_draws))
        seeds = torch.randint(2**62, (len(chunks),)).tolist()
        for num, seed in progress(list(zip(chunks, seeds, strict=True)), "draw"):
            with preserved_rng():
                torch.manual_seed(seed)
                guide_trace = run(self.repeat(self.guide, num), self.args, self.kwargs)
                yield Run(self, num, guide_trace)

    def repeat(self, fn: Program, num: int) -> Program:
        return particles(fn, num, self.plan.nesting)

    def _chunks(self, num_draws: int) -> Iterator[int]:
        """Sizes of runs, by memory; 1 where draws can't be a batch dimension."""
        size = sum(node["value"].numel() for node in self.nodes.values()) or 1
        chunk = max(1, CHUNK // size) if self.plan.vectorized else 1
        while num_draws > 0:
            yield min(chunk, num_draws)
            num_draws -= chunk


class Run:
    """A chunk of draws from the guide, and what the model says of them."""

    def __init__(self, runner: Runner, num: int, guide_trace: Any):
        self._runner, self._num, self._guide_trace = runner, num, guide_trace

    @cached_property
    def _model_trace(self) -> Any:
        return self._run(self._runner.model)

    @cached_property
    def _terms(self) -> Terms:
        nesting = self._runner.plan.nesting if self._num > 1 else None
        return terms_of(self._guide_trace, self._model_trace, self._num, nesting)

    def _run(self, model: Program) -> Any:
        r = self._runner
        return run(r.repeat(model, self._num), r.args, r.kwargs, self._guide_trace)

    def sample(self) -> dict[str, Tensor]:
        """Latent and deterministic sites."""
        values = self._values(self._guide_trace, self._runner.latent)
        if self._runner.deterministic:
            values |= self._values(self._model_trace, self._runner.deterministic)
        return values

    def draws(self) -> Draws:
        """Latent sites with their log densities."""
        log_q = torch.stack([t.log_q_per_particle() for t in self._terms]).sum(0)
        values = self._values(self._guide_trace, self._runner.latent)
        return Draws(values, self._terms.log_weights() + log_q, log_q)

    def log_likelihood(self) -> dict[str, Tensor]:
        """Log density of each observation, masked ones 0, unscaled."""
        nodes = self._runner.nodes
        return {
            t.name: with_draws(t.log_p, self._num, nodes[t.name]["fn"].batch_shape)
            for t in self._terms
            if t.name in self._runner.observed and t.log_p is not None
        }

    def predictive(self, names: list[str]) -> dict[str, Tensor]:
        """`names` drawn from the model with its observations set free."""
        return self._values(self._run(poutine.uncondition(self._runner.model)), names)

    def _values(self, trace: Any, names: list[str]) -> dict[str, Tensor]:
        nodes = self._runner.nodes
        return {
            n: with_draws(trace.nodes[n]["value"], self._num, nodes[n]["value"].shape)
            for n in names
        }


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
