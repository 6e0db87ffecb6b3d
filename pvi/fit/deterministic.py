"""When `optimizer="auto"` takes the deterministic route, and how it goes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pvi.engine.traces import Program, preserved_rng
from pvi.fit.callbacks import Step, ask
from pvi.fit.double import doubled, in_double
from pvi.fit.fixed_draws import FAMILIES, LARGEST, WIDEST, FixedDraws, Moments
from pvi.fit.options import Options
from pvi.fit.progress import Progress
from pvi.fit.restarts import Mode, find_modes, shares
from pvi.guides.layout import Layout
from pvi.guides.mode import LogJoint

FRESH, MEASURED = 20, 128  # evaluations at the solution, to report its bound; particles in each
SAME = 0.5  # posterior sds: means that are closer are those of one mode
OPTIMISTIC = 1.0  # nats by which the bound over fixed draws may exceed that over others


@dataclass(frozen=True)
class End:
    """Where one of several searches has ended."""

    bound: float
    reason: str
    values: list[Tensor]
    moments: Moments
    mean: dict[str, Tensor]


class Stopped(Exception):
    """A callback has ended the fit."""


def why_not(task: Any) -> str:
    """Why a fit can't take the deterministic route; "" if it can.

    Args:
        task: the fit's trainer.
    """
    guide, objective = task.guide, task.objective
    if replace(task.options, compile="auto") != Options() or task.validation is not None:
        return "options that need steps are given"
    if type(guide) not in FAMILIES:  # a subclass may draw otherwise
        return "the guide is not one of pvi's normal families"
    own = {id(p) for p in guide.parameters()}
    if not own.issubset(id(p) for p in task.params.named().values()):
        return "parameters of the guide are frozen"
    if any(id(p) not in own for p in task.params.named().values()):
        return "the model has parameters of its own"
    if not task.team.alone:
        return f"{task.team.number} processes share the rows"
    if task.data.partial:
        return "the data are read in pieces"
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

    def __init__(self, task: Any, bar: Progress, restarts: int = 0):
        self._task, self._bar, self._restarts = task, bar, restarts
        self.modes: tuple[Mode, ...] = ()
        self._promised = -math.inf  # the bound over fixed draws where the guide is

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
        except Stopped as stopped:
            return str(stopped)
        if reason is None:
            with torch.no_grad():
                for p, x in zip(self._task.guide.parameters(), own, strict=True):
                    p.copy_(x)
            return None
        dtype = torch.get_default_dtype()
        self.modes = tuple(
            replace(mode, mean={name: x.to(dtype) for name, x in mode.mean.items()})
            for mode in self.modes
        )
        return "; ".join(filter(None, (reason, self._measure())))

    def _attempt(self, double: bool) -> str | None:
        """Fit in double or in the guide's own precision; `None` if the model refuses."""
        task = self._task
        args, kwargs = task.data.whole()
        with in_double(task.guide) if double else preserved_rng():
            if double:
                args, kwargs = doubled(args), doubled(kwargs)
            density = smooth_density(task.model, task.guide.layout, args, kwargs)
            if density is None or density.left_out:
                return None
            route = FixedDraws(task.guide, density, self._after)
            if route.first > route.most:
                return None
            if self._restarts:
                return self._from_modes(route, density)
            reason = route.run()
            self._promised = task.history["bound"][-1]
            return reason

    def _from_modes(self, route: FixedDraws, density: LogJoint) -> str:
        """Fit from every mode, and stay at the best."""
        guide = self._task.guide
        found = find_modes(density, density.start, self._restarts + 1) or [(None, None)]
        ends = []
        for mode, curvature in found:
            reason = route.run(mode, curvature)
            values = [p.detach().clone() for p in guide.parameters()]
            bound = float(self._task.history["bound"][-1])
            ends.append(End(bound, reason, values, route.moments(), guide.mean()))
        ends.sort(key=lambda end: -end.bound)
        apart: list[End] = []
        for end in ends:
            if all(_differ(end.moments, other.moments) for other in apart):
                apart.append(end)
        told = zip(apart, shares([end.bound for end in apart]), strict=True)
        self.modes = tuple(Mode(end.bound, share, end.mean) for end, share in told)
        with torch.no_grad():
            for p, value in zip(guide.parameters(), ends[0].values, strict=True):
                p.copy_(value)
        self._promised = ends[0].bound
        return ends[0].reason

    def _after(self, bound: float, grad_norm: float, num_draws: int) -> None:
        task = self._task
        row = {"bound": bound, "loss": -bound, "grad_norm": grad_norm, "num_draws": num_draws}
        task.history.add(row)
        step = len(task.history)
        self._bar.see(bound)
        self._bar.update(None)
        if reason := ask(task.callbacks, Step(step, task.params, task.history)):
            raise Stopped(reason)

    def _measure(self) -> str:
        """Add the bound over fresh draws to the history; say if the fixed ones were too few."""
        task = self._task
        promised, found, objective = self._promised, [], task.objective
        if objective.num_particles > 1:  # more cost little, unless each is large
            most = max(objective.num_particles, min(MEASURED, int(LARGEST / task.numbers)))
            objective = replace(objective, num_particles=most)
        args, kwargs = task.data.whole()
        with torch.no_grad():
            for _ in range(FRESH):
                record = objective.evaluate(task.model, task.guide, args, kwargs).record()
                task.history.add(record)
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


def _differ(a: Moments, b: Moments) -> bool:
    """Whether two solutions are not the same one, found twice."""
    return bool(((a.mean - b.mean) / b.sd).abs().max() > SAME)


def smooth_density(model: Program, layout: Layout, args: tuple, kwargs: Mapping) -> LogJoint | None:
    """The model's log density in the default precision, if it has one, twice differentiated."""
    try:
        density = LogJoint(model, layout, args, kwargs, torch.get_default_dtype())
        density.derivatives(density.start)
    except Exception:  # whatever a model raises in other circumstances than its own
        return None
    return density if _is_function(density, density.start) else None


def _is_function(density: LogJoint, start: Tensor) -> bool:
    """Whether the model gives the same density from two random states: it does not draw inside."""
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            values.append(density(start))
    return bool(values[0] == values[1])
