"""Model, guide, data and parameters of one fit, and how it trains them to an end."""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from pvi.engine import ELBO, Objective
from pvi.engine.checks import check, check_values, is_real
from pvi.engine.data import Batch, Data
from pvi.engine.failures import changed_sites, later
from pvi.engine.gradients import Baseline
from pvi.engine.items import StreamData
from pvi.engine.objective import Evaluation
from pvi.engine.params import Params
from pvi.engine.plan import make_plan
from pvi.engine.traces import Program, plates_of, preserved_rng
from pvi.errors import CheckpointError, DataError, FitError, GuideError, ModelError, PviError
from pvi.fit.arena import NO_END, Arena
from pvi.fit.arguments import check_batch_size
from pvi.fit.callbacks import Callback, tell_end
from pvi.fit.checkpoint import Checkpoints
from pvi.fit.deterministic import Deterministic, why_not
from pvi.fit.distributed import ALONE, Team
from pvi.fit.drift import leaves_in, rise_ahead
from pvi.fit.history import History
from pvi.fit.minibatch import Minibatches, check_additive, check_plate_names, data_plates
from pvi.fit.options import Options
from pvi.fit.precision import lowered
from pvi.fit.progress import Progress
from pvi.fit.restarts import Mode
from pvi.fit.result import Fit
from pvi.fit.schedule import Schedule
from pvi.fit.training import Training
from pvi.fit.validation import make_validation
from pvi.guides import Guide, Laplace
from pvi.posterior import Posterior

TEMPERED = (
    "KL weights other than 1, free bits and the like make the guide aim at a tempered posterior, "
    "not this one"
)
NO_SHARES = (
    "several processes share the rows of the data, but there are none to share: pass at least one "
    "row for each process as data=, in a plate of the model that follows their number. Otherwise "
    "run one process, without torchrun."
)
PARTICLES, SMALL = 8, 20_000  # draws in a step of a model with at most so many numbers


class Trainer:
    """Model, guide, data and parameters of one fit, and the loop over them."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: Data,
        objective: Objective | None,
        batch_size: int | None,
        plate: str | Sequence[str] | None,
        callbacks: list[Callback],
        seed: int | None,
        options: Options | None = None,
        validation: Data | None = None,
        restarts: int = 0,
        team: Team = ALONE,
    ):
        self._begun = time.perf_counter()
        self.seed, self.restarts, self.started, self._sites = seed, restarts, False, ()
        self.modes: tuple[Mode, ...] = ()
        self.options, self.team = options or Options(), team
        self.model, self.guide, self.data, self.callbacks = model, guide, data, callbacks
        self.params = Params(model, guide)
        check_values(data.named())
        with self.params.scope(), self.params.evaluation():
            found = check(model, guide, *data.probe(), data.named())
        self._shapes = {name: list(node["value"].shape) for name, node in found.items()}
        nodes = found.values()
        check_plate_names(plate, nodes)
        self.numbers = sum(node["value"].numel() for node in nodes)
        latents = sum(node["value"].numel() for node in nodes if not node["is_observed"])
        self.latents = None if isinstance(data, StreamData) else latents
        self._passes = math.ceil(max((p.scale for x in nodes for p in plates_of(x)), default=1.0))
        self.proper = self._passes == 1 and not data.partial and _stays_inside(guide, nodes)
        self.batch_size = _batch_size(batch_size, data)
        rows = self.batch_size or self._shared_rows()
        self.batched = self._minibatches(plate, rows) if rows else None
        self.objective = replace(objective or ELBO(self._particles(), kl="exact"))  # own baselines
        team.check(self.objective)
        self.history = History()
        self.notes: list[str] = []
        self.arena = Arena(self.options.adversaries, self)
        self.validation = make_validation(self, validation, self.options)

    def anneal(self) -> int:
        """Steps until the last KL schedule of the objective has come to its end."""
        lengths = {"step": 1, "epoch": self.steps_per_epoch}
        ends = [s.length * lengths[s.unit] for s in self.objective.schedules()]
        return math.ceil(max(ends, default=0))

    def now(self, step: int) -> Objective:
        """The objective after so many steps."""
        return self.objective.at(step, step / self.steps_per_epoch)

    @cached_property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.options.accumulate)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that hold all the data once."""
        if self.batch_size is not None:
            return self.data.steps(self.batch_size)
        return self._passes  # in which a model that subsamples by itself sees all its data

    def _particles(self) -> int:
        """More particles for less noise where they cost next to nothing."""
        share = self.batch_size / (self.data.shown or 1) if self.batch_size else 1.0
        guide = self.guide
        own = guide.parameters() if isinstance(guide, Guide) and not guide.amortized else ()
        free = {id(p) for p in own}  # networks of a flow: no data go through them
        weights = [name for name, p in self.params.named().items() if id(p) not in free]
        if share * self.numbers > SMALL or any(map(self.params.is_network, weights)):
            return 1
        with self.params.scope():
            plan = make_plan(self.model, self.guide, *self.data.probe(), "joint")
        return PARTICLES if plan.vectorized else 1

    def _shared_rows(self) -> int:
        """Rows in a batch of all rows, of which several processes take a share each; 0 if one."""
        if self.team.alone or isinstance(self.guide, Laplace):
            return 0
        if self.data.size < self.team.number:
            raise FitError(NO_SHARES)
        return self.data.size

    def batches(self, skip: int = 0) -> Iterator[Batch]:
        """This process's share of each batch of one epoch."""
        return self.data.batches(self.batch_size, self.team.part, skip)

    def _minibatches(self, plate: str | Sequence[str] | None, batch_size: int) -> Minibatches:
        named = [plate] if isinstance(plate, str) else plate
        with self.params.scope(), self.params.evaluation():
            plates = data_plates(self.model, self.data, batch_size, named)
            if plate is None:
                check_additive(self.model, self.data, batch_size, plates)
            if not plates and not self.team.alone:
                raise FitError(NO_SHARES)
            self.team.check_same(self.data, batch_size)
            batched = Minibatches(self.model, self.guide, plates, self.data, self.team)
            batched.probe(batch_size)
        return batched

    def train(
        self, schedule: Schedule, bar: Progress, checkpoints: Checkpoints | None, device: Any
    ) -> Fit:
        """Train to the schedule's end, and return what there is however it ended."""
        error: PviError | None = None
        self.started = True
        with self.params.scope():
            try:
                reason = self._optimise(schedule, bar, checkpoints) if self._trainable() else ""
            except KeyboardInterrupt:
                reason = "interrupted"
            except CheckpointError:
                raise
            except PviError as failure:
                reason, error = str(failure), failure
            finally:
                if self.batched:
                    self.batched.select(None)
        self.params.freeze()
        self._warn_early(len(self.history))
        result = self._result(reason, device, schedule)
        tell_end(self.callbacks, result)
        if error is not None:
            error.fit = result  # type: ignore[attr-defined]
            raise error
        return result

    def _trainable(self) -> bool:
        """Whether there is something to train; `Laplace` is ready once it is set up.

        Raises:
            GuideError: the model would move away from under such a guide.
        """
        named = self.params.named()
        if not isinstance(self.guide, Laplace):
            return True
        if self.arena.adversaries:
            raise GuideError("Laplace finds the mode without steps, so it can't take adversaries")
        if named:
            raise GuideError(
                f"Laplace finds the mode once, but the model has a parameter '{min(named)}' to "
                "train. Make it a latent site or a constant, or use pvi.guides.FullRank."
            )
        value = self.evaluate(next(self.data.batches(None)), 0)
        self.history.add({**value.record(), "lr": 0.0, "grad_norm": 0.0})
        return False

    def _optimise(self, schedule: Schedule, bar: Progress, checkpoints: Checkpoints | None) -> str:
        """Train by the route that suits; return why the bound has not converged, or ""."""
        started = checkpoints is not None and not checkpoints.is_empty
        why = why_not(self) if schedule.free and not started else "another optimizer is asked for"
        if not why:
            route = Deterministic(self, bar, self.restarts)
            reason = route.run()
            self.modes = route.modes
            if reason is not None:
                return reason
            self.history.clear()
            why = "the model can't be run on fixed draws"
        if self.restarts:
            raise FitError(
                f"restarts={self.restarts} needs the deterministic route, but {why}. Leave it out, "
                "and fit with several seeds or init_loc_fn."
            )
        return self._loop(schedule, bar, checkpoints)

    def _loop(self, schedule: Schedule, bar: Progress, checkpoints: Checkpoints | None) -> str:
        """Train; return why the bound has not converged, or ""."""
        training = Training(self, schedule, bar)
        try:
            if checkpoints is None:
                stopped = training.run()
            else:
                with checkpoints.whole_steps():
                    try:
                        stopped = training.run(checkpoints)
                    finally:
                        checkpoints.write(training)
        finally:
            self.notes = training.finish()
        self.team.broadcast(self.params.tensors().values())  # buffers are each process's own
        if stopped:
            return stopped
        if self.arena.caveats:
            return NO_END
        level = schedule.shortfall(self.history.losses)
        if level or (self.validation is not None and self.validation.keeps_best):
            return level  # the best parameters are no end of a way
        return self._drift(training)

    def _warn_early(self, steps: int) -> None:
        if steps < self.anneal():
            unfinished = [str(s) for s in self.objective.schedules() if s.length > 0]
            warnings.warn(
                f"training ended after {steps} steps, before the KL schedule did "
                f"({'; '.join(unfinished)}: step {self.anneal()}), so the posterior is not yet the "
                "model's. Train longer, or shorten the schedule.",
                stacklevel=5,
            )

    def _drift(self, training: Training) -> str:
        """Why a level bound does not mean the end of the way; "" if it does."""
        step, leaves = training.step, leaves_in(training.optimizer)
        way = training.path.since_middle(step, leaves)
        if not leaves:
            return ""
        if way is None:
            return f"{step} steps are too few to tell whether the bound was level; raise steps"

        def bounds(seed: int) -> Callable[[], float]:
            torch.manual_seed(seed)
            batch = next(self.batches())

            def bound() -> float:
                torch.manual_seed(seed)
                try:
                    loss = float(training.blocks.loss(batch, step))
                except (PviError, RuntimeError, ValueError):  # no training has been there
                    loss = math.nan
                return -self.team.mean(loss)

            return bound

        with preserved_rng(), torch.no_grad(), self.params.evaluation():
            return rise_ahead(leaves, way, bounds)

    def evaluate(self, batch: Batch, step: int, now: Objective | None = None) -> Evaluation:
        """The objective of this step, or a given one, on one batch."""
        if self.batched:
            self.batched.select(batch.indices, batch.size)
        try:
            objective = now or self.now(step)
            with self.arena.playing(step):
                value = objective.evaluate(*self.programs, batch.args, batch.kwargs)
        except (GuideError, ModelError) as error:
            raise (later(error, step) if len(self.history) else error) from error.__cause__
        self._check_sites(value, step)
        return self.arena.weighed(value, step)

    def _check_sites(self, value: Evaluation, step: int) -> None:
        """Refuse sites that come and go, unless draws with score gradients may decide on them."""
        names = tuple(term.name for term in value.terms)
        self._sites = self._sites or names
        if names == self._sites or self.objective.gradient == "score":
            return
        if all(term.reparameterized for term in value.terms):
            raise changed_sites(self._sites, names, step)

    def look(self) -> None:
        """Let the objective look at the programs and decide how to run them, as at the start."""
        with preserved_rng(), torch.no_grad():
            self.evaluate(next(self.batches()), 0)
        self.params.sync()

    @cached_property
    def programs(self) -> tuple[Program, Program]:
        """Model and guide as the objective runs them: on minibatches, in the precision asked."""
        both = self.batched or self
        if self.options.precision is None:
            return both.model, both.guide
        return lowered(both.model, both.guide, self.guide, self.params)

    def baseline(self) -> Baseline:
        """The moving averages of the objective's score gradients."""
        return self.objective.baseline(*self.programs)

    def fingerprint(self, schedule: Schedule) -> dict[str, Any]:
        """What makes this fit this fit, as plain data: programs in outline, data, options."""
        data = {f"data '{name}'": mark for name, mark in self.data.fingerprint().items()}
        programs = {"shape of sites": self._shapes, "guide": type(self.guide).__name__}
        objective = re.sub(r" at 0x[0-9a-f]+", "", repr(self.objective))
        options = {"batch_size": self.batch_size, "objective": objective, "seed": self.seed}
        options |= {**schedule.described(), **self.options.described()}
        if self.validation is not None:
            options |= self.validation.described()
        return {"rows": self.data.size, **data, **programs, **options}

    def _seconds(self) -> float:
        """Since the fit began; with the steps before a checkpoint, as far as they are recorded."""
        steps = math.fsum(self.history["seconds"]) if "seconds" in self.history else 0.0
        return max(time.perf_counter() - self._begun, steps)

    def _result(self, reason: str, device: Any, schedule: Schedule) -> Fit:
        plain = self.now(max(len(self.history) - 1, 0)).is_plain
        given = {"steps": schedule.steps, "batch_size": self.batch_size}
        given |= {"restarts": self.restarts or None}
        given |= {**schedule.described(), **self.options.described(), "plateau": None}
        posterior = Posterior(
            self.model,
            self.guide,
            self.data,
            params=self.params,
            device=device,
            checked=True,
            caveats=(*(() if plain else (TEMPERED,)), *self.arena.caveats),
        )
        return Fit(
            model=self.model,
            guide=self.guide,
            objective=self.objective,
            posterior=posterior,
            history=self.history,
            converged=not reason,
            reason=reason,
            seed=self.seed,
            notes=tuple(self.notes),
            modes=self.modes,
            seconds=self._seconds(),
            arguments={k: v for k, v in given.items() if v is not None and v != "auto"},
        )


def _stays_inside(guide: Program, nodes: Iterable[Any]) -> bool:
    """Whether no draw of the guide can fall outside of its site's support."""
    latents = [node["fn"] for node in nodes if not node["is_observed"]]
    return isinstance(guide, Guide) or all(is_real(getattr(f, "support", None)) for f in latents)


def _batch_size(batch_size: int | None, data: Data) -> int | None:
    """Rows in a batch; `None` for the whole, which is never shuffled."""
    batch_size = check_batch_size(batch_size)
    if data.loader is not None:
        own = data.batch_size(batch_size)
        if batch_size not in (None, own) and min(batch_size, data.size) != own:
            raise DataError(
                f"batch_size={batch_size}, but the DataLoader makes batches of {own}. Leave "
                "batch_size out, or pass the loader's Dataset as data."
            )
        return own
    if batch_size is None:
        return None
    if data.size == 0:
        raise DataError("batch_size needs rows: pass the data as data=, not inside the model")
    return data.batch_size(batch_size)
