"""When `optimizer="auto"` takes the deterministic route, and how it goes."""

from typing import Any

import torch
from torch import Tensor

from pvi.engine.traces import preserved_rng
from pvi.errors import PviError
from pvi.fit.callbacks import Step
from pvi.fit.double import doubled, in_double
from pvi.fit.fixed_draws import WIDEST, FixedDraws
from pvi.fit.progress import Progress
from pvi.guides import Laplace
from pvi.guides.mean_field import NormalGuide
from pvi.guides.mode import LogJoint

FRESH = 20  # evaluations of the objective at the solution, to report its bound
OPTIMISTIC = 1.0  # nats by which the bound over fixed draws may exceed that over others


class Stopped(Exception):
    """A callback has ended the fit."""


def why_not(task: Any) -> str:
    """Why a fit can't take the deterministic route; "" if it can.

    Args:
        task: the fit's trainer.
    """
    guide, objective = task.guide, task.objective
    own = {id(p) for p in guide.parameters()} if isinstance(guide, NormalGuide) else set()
    if not own or isinstance(guide, Laplace):
        return "the guide is not one of pvi's normal families"
    if any(id(p) not in own for p in task.params.named().values()):
        return "the model has parameters of its own"
    if task.batched or task.data.loader is not None:
        return "the data come in minibatches"
    if objective.is_weighted or not objective.is_plain or objective.alpha != 1.0:
        return "the objective is not the ELBO"
    if objective.gradient not in ("auto", "reparam", "path"):
        return "the objective asks for another gradient"
    if guide.layout.size > WIDEST:
        return f"there are more than {WIDEST} latents"
    if any(p.size < p.full_size for x in guide.latents.values() for p in x.plates):
        return "the model takes part of a plate a call"
    return ""


class Deterministic:
    """One fit by fixed draws: in double precision where the model allows it."""

    def __init__(self, task: Any, bar: Progress):
        self._task, self._bar = task, bar

    def run(self) -> str | None:
        """Move the guide to the optimum.

        Returns:
            "" if that is certain, why it is not, or `None` where this route leads nowhere and the
            guide is where it was.
        """
        own = [p.detach().clone() for p in self._task.guide.parameters()]
        try:
            with preserved_rng():
                reason = self._attempt(double=True)
                if reason is None:
                    reason = self._attempt(double=False)
        except Stopped:
            return "stopped by a callback"
        if reason is None:
            with torch.no_grad():
                for p, x in zip(self._task.guide.parameters(), own, strict=True):
                    p.copy_(x)
            return None
        return self._measure() or reason

    def _attempt(self, double: bool) -> str | None:
        """Fit in double or in the guide's own precision; `None` if the model refuses."""
        task = self._task
        args, kwargs = task.data.whole()
        with in_double(task.guide) if double else preserved_rng():
            if double:
                args, kwargs = doubled(args), doubled(kwargs)
            try:
                density = LogJoint(task.model, task.guide.layout, args, kwargs)
                if not _is_function(density, task.guide.layout.start()):
                    return None
                route = FixedDraws(task.guide, density, task.numbers, self._after)
                return None if route.first > route.most else route.run()
            except (PviError, RuntimeError, ValueError, TypeError):
                return None  # what a model raises in other circumstances than its own

    def _after(self, bound: float, grad_norm: float, num_draws: int) -> None:
        task = self._task
        row = {"bound": bound, "loss": -bound, "lr": 1.0, "grad_norm": grad_norm}
        task.history.add(row | {"num_draws": num_draws})
        step = len(task.history)
        self._bar.update(step, bound, None)
        state = Step(step, bound, -bound, task.params)
        if any([callback(state) is True for callback in task.callbacks]):
            raise Stopped

    def _measure(self) -> str:
        """Add the bound over fresh draws to the history; say if the fixed ones were too few."""
        task = self._task
        promised, found = task.history["bound"][-1], []
        with torch.no_grad():
            for _ in range(FRESH):
                record = task.evaluate(next(task.data.batches(None)), 0).record()
                task.history.add({**record, "lr": 0.0, "grad_norm": 0.0})
                found.append(record["bound"])
        bounds = torch.tensor(found, dtype=torch.float64)
        error = float(bounds.std()) / FRESH**0.5
        if promised - float(bounds.mean()) <= OPTIMISTIC + 4.0 * error:
            return ""
        return (
            f"over the fixed draws the bound is {promised:.6g} nats, over others "
            f"{float(bounds.mean()):.6g}: the guide has fitted the draws; give steps= to train on "
            "fresh ones"
        )


def _is_function(density: LogJoint, start: Tensor) -> bool:
    """Whether the model gives the same density from two random states: it does not draw inside."""
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            values.append(density(start))
    return bool(values[0] == values[1])
