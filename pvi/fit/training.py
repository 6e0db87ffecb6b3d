"""The steps of one fit, and all that changes in their course."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pvi.engine.data import Batch
from pvi.engine.gradients import leaves_of
from pvi.engine.objective import Evaluation
from pvi.engine.traces import rng_state
from pvi.errors import FitError, GuideError, ModelError
from pvi.fit.blocks import Blocks
from pvi.fit.callbacks import Step, ask
from pvi.fit.drift import Path, leaves_in
from pvi.fit.epochs import Epochs
from pvi.fit.faults import SHOWN, TRIES, Recovery, all_finite, put_back, total_norm
from pvi.fit.history import History, Row, read
from pvi.fit.locate import Input, Place, Search, is_numeric, of_record
from pvi.fit.progress import Progress
from pvi.fit.records import Record, in_order, mean_of
from pvi.fit.schedule import Schedule
from pvi.fit.stages import Averages

INTERVAL = 16  # first steps with Pyro's checks; on an accelerator steps between two looks


class Training:
    """Batch, loss, gradient, step, until done. What it holds is what a checkpoint holds.

    Args:
        task: the fit's trainer, with the programs, the data, `params`, `history` and `evaluate`.
        schedule: steps, optimiser and rate.
        bar: shows how far it is.
    """

    def __init__(self, task: Any, schedule: Schedule, bar: Progress):
        self.task, self.schedule, self.bar = task, schedule, bar
        self.options, self.validation, self.team = task.options, task.validation, task.team
        self.team.broadcast(task.params.tensors().values())
        self.optimizer = schedule.optimizer(task.params)
        self.scheduler = schedule.scheduler(self.optimizer, self.validation is not None)
        self.path, self.recovery = Path(), Recovery()
        self.blocks, stages = Blocks(self), schedule.stages
        self.averages = Averages(task, stages, self.blocks.loss) if stages else None
        self.step = 0
        self.epochs = Epochs(task)
        self.whole = False  # whether no step is half done
        self.joint = self.team.alone  # whether all processes have come to the same end
        self._names: tuple[str, ...] = ()  # of the record that processes share
        self._asks = self.team.any(bool(task.callbacks))  # whether some process has callbacks
        self._unread: list[tuple[int, Row]] = []  # steps whose numbers were not looked at yet
        self._interval = looks(leaves_in(self.optimizer)[0])

    @property
    def history(self) -> History:
        return self.task.history

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What makes this fit this fit; read once, for it takes a look at all the data."""
        return self.task.fingerprint(self.schedule)

    def run(self, checkpoints: Any = None) -> str:
        """Train until the schedule, patience or a callback ends it; why it ended early, or "".

        Args:
            checkpoints: `Checkpoints` to go on from and to write, or `None`.
        """
        if checkpoints is not None:
            checkpoints.resume(self)
            self.blocks.every = checkpoints.every
        batches, stopped = self.epochs.batches(), ""
        while not (stopped or self._exhausted or self.schedule.finished(self.step)):
            self.whole = False
            if not self.blocks.take(batches):
                self.take(batches)
            self._validate()
            self.whole = True
            stopped = self._asked()
            if checkpoints is not None:
                checkpoints.after_step(self)
        self.joint = True
        return stopped or (self.validation.reason() if self._exhausted else "")

    def finish(self) -> list[str]:
        """Leave finite parameters, the best ones if they were kept; what was done to the fit."""
        notes, recovery = self.recovery.notes, self.recovery
        values = [p.detach() for p in leaves_in(self.optimizer)]
        if not all_finite(values) and recovery.snapshot is not None:
            put_back(self, recovery.snapshot)
            notes = [*notes, f"the last updates were not finite: back to {recovery.snapshot.step}"]
        if recovery.skipped > SHOWN:
            notes = [*notes, f"{recovery.skipped} steps were left out in all"]
        kept = self.validation is not None and self.validation.keeps_best
        if self.averages is not None and not kept:
            self.averages.close(self.step, self.joint)
        restored = "" if self.validation is None else self.validation.restore_best(self.step)
        notes = [*notes, *self.task.arena.notes, *self.blocks.steps.notes]
        return [*notes, *([restored] if restored else [])]

    def _asked(self) -> str:
        """Why a callback, of any process, ends the fit; "" if none does."""
        said = ask(self.task.callbacks, Step(self.step, self.task.params, self.history))
        return self.team.first_of(said) if self._asks else said

    @property
    def _exhausted(self) -> bool:
        return self.validation is not None and self.validation.exhausted

    def take(self, batches: Iterator[Batch]) -> None:
        """One step, or none where its numbers are not finite."""
        begun = time.perf_counter()
        inputs: list[Input] = []
        row, error = self._gradient(batches, inputs)
        row.more["lr"] = self.optimizer.param_groups[0]["lr"]
        self._unread.append((self.step + 1, row))
        self.history.append(row)
        failed = error is not None and self.team.alone  # others can't know of it before they look
        looked = self._careful or failed or len(self._unread) >= self._interval
        if not looked:
            self.recovery.moved = True
        if not looked or self._sound(inputs, error):
            self._update(row)
        self.step += 1
        row.more["seconds"] = time.perf_counter() - begun
        self._close(looked)

    def _gradient(
        self, batches: Iterator[Batch], inputs: list[Input]
    ) -> tuple[Row, Exception | None]:
        """Mean gradient over the batches of a step and over all processes, and the mean of what is
        recorded: NaN where the programs fail because of bad numbers. The error is that of this
        process.
        """
        self.task.arena.begin()
        for p in leaves_in(self.optimizer):
            p.grad = None
        record, error = self._own_gradient(batches, inputs)
        record = record if self.team.alone else self._averaged(record)
        if record is None:
            return Row(("bound", "loss", "grad_norm"), torch.full((3,), torch.nan), {}), error
        names, numbers = record
        grads = [p.grad for p in leaves_in(self.optimizer) if p.grad is not None]
        norm = total_norm(grads) if grads else torch.zeros(())
        numbers = torch.cat([numbers, norm.reshape(1).to(numbers)])
        return Row((*names, "grad_norm"), numbers, {}), error

    def _own_gradient(
        self, batches: Iterator[Batch], inputs: list[Input]
    ) -> tuple[Record | None, Exception | None]:
        """That of this process, which takes all batches of the step, also where programs fail."""
        count = self.options.accumulate
        try:
            return mean_of([self._backward(next(batches), inputs) for _ in range(count)]), None
        except (RuntimeError, ValueError) as error:
            if not is_numeric(error):
                raise
            for _ in range(count - len(inputs)):
                next(batches)
            return None, error

    def _backward(self, batch: Batch, inputs: list[Input]) -> Record:
        """Add a batch's share to the gradient."""
        inputs.append((batch, rng_state()))
        share = batch.weight / self.options.accumulate
        known = self.blocks.steps.gradients(batch, self.step, share)
        if known is None:
            with self._checks():
                value = self._evaluate(batch)
                known = value.stacked()
                (value.loss if share == 1.0 else value.loss * share).backward()
        names, numbers = known
        return names, numbers if batch.weight == 1.0 else numbers * batch.weight

    def _averaged(self, record: Record | None) -> Record | None:
        """The mean over all processes, in one message. Its entries are those of the first step, for
        all must send as many; `None` where one of them has failed in that.
        """
        if not self._names:
            if self.team.any(record is None):
                return None
            self._names = record[0] if record else ()
        leaves = leaves_in(self.optimizer)
        if record is None:
            numbers = leaves[0].new_full((len(self._names),), torch.nan)
            for p in leaves:
                p.grad = torch.full_like(p, torch.nan)
        else:
            numbers = in_order(record, self._names)
        return self._names, self.team.average(numbers, leaves)

    def _evaluate(self, batch: Batch) -> Evaluation:
        """The objective on one batch; parameters that appear only now are trained too."""
        params = self.task.params
        known = params.created()
        value = self.task.evaluate(batch, self.step)
        if params.created() != known:
            params.sync()
            self.adopt(params.named())
        if not value.loss.requires_grad:
            raise GuideError("the loss depends on no parameter, so there is nothing to fit")
        if self.step == 0:
            self._check_strays(value)
        return value

    def _checks(self) -> AbstractContextManager[Any]:
        """Pyro's checks of values and arguments: where states are kept, at the ends, after a fault
        and where draws may be invalid; never where they would wait for an accelerator.
        """
        recovery, ends = (
            self.recovery,
            self.step < INTERVAL or self.schedule.finished(self.step + 1),
        )
        needed = ends or recovery.notes or recovery.due(self.step) or not self.task.proper
        return nullcontext() if self._careful and needed else pyro.validation_enabled(False)

    @property
    def _careful(self) -> bool:
        """Whether each step is looked at before its update."""
        recovery = self.recovery
        late = recovery.late >= TRIES or self.step < recovery.careful
        stages = self.schedule.stages
        compared = stages is not None and self.step + 1 == stages.end  # then averages are, too
        return self._interval == 1 or late or self.step == 0 or compared

    def _sound(self, inputs: list[Input], error: Exception | None) -> bool:
        """Look at the numbers of all steps since the last look; whether to make the update."""
        read([row for _, row in self._unread])
        for step, row in self._unread:
            record = row.values()
            if math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]):
                continue
            late = step <= self.step
            place = None if late else Search(self.task, self.step).place(inputs)
            place = self.team.first_of(place or _in_error(error)) or of_record(record)
            self._fail(place, late, error)
            self.team.same_random()  # where programs failed, less was drawn
            return False
        if self.recovery.passed(self, [batch for batch, _ in inputs]):
            return True
        self._unread = []
        return False

    def _fail(self, place: Place, late: bool, error: Exception | None) -> None:
        try:
            back = self.recovery.failed(self, place, late=late)
        except FitError as failure:
            raise failure from error
        if back:  # the plateaus are those of an earlier step, and have not seen these
            self._unread = []

    def _update(self, row: Row) -> None:
        if self.options.clip_norm is not None:
            leaves = leaves_in(self.optimizer)
            clip_grads_with_norm_(leaves, self.options.clip_norm, row.tensor[-1])
        self.optimizer.step()
        row.more |= self.task.arena.step(self.step)
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()

    def _close(self, looked: bool) -> None:
        """Draw the consequences of the steps that were looked at."""
        if looked:
            self.history.settle()
            for step, row in self._unread:
                record = row.values()
                self.schedule.see(step, record["loss"])
                self.bar.see(record["bound"])
            self._unread = []
        self._go_on(1)

    def close_block(
        self, count: int, columns: dict[str, list[float]], means: dict[str, Tensor], begun: float
    ) -> None:
        """Draw the consequences of steps that were taken in one call.

        Args:
            count: how many.
            columns: what they have recorded.
            means: the averages of the parameters with them.
            begun: by the clock.
        """
        self.step += count
        for bound in columns["bound"]:
            self.bar.see(bound)
        seconds = (time.perf_counter() - begun) / count
        self.history.extend({**columns, "seconds": [seconds] * count})
        self._go_on(count, means)

    def _go_on(self, count: int, means: dict[str, Tensor] | None = None) -> None:
        if self.averages is not None:
            self.averages.after(self.step, count, means)
        self.schedule.adapt(self.step, self.optimizer)
        self.path.pass_by(self.step, self.optimizer)
        self.bar.update(self.schedule.expected(self.step), count)

    def _validate(self) -> None:
        validation = self.validation
        if validation is None:
            return
        if self.step % validation.every == 0 or self.schedule.finished(self.step):
            bound = validation.update(self.step)
            self.history.amend({"validation_bound": bound})
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(-bound)

    def _check_strays(self, value: Evaluation) -> None:
        """Refuse parameters that shape the loss but that nobody trains."""
        known = {id(p) for p in self.task.params.named().values()}
        strays = [p for p in leaves_of([value.loss]) if id(p) not in known]
        if strays:
            raise ModelError(
                f"the loss depends on a tensor of shape {tuple(strays[0].shape)} that wants "
                "gradients but is no parameter of the model or the guide. Register its network "
                "with pyro.module(name, network) inside the program, or make it a constant with "
                "requires_grad_(False)."
            )

    def unread(self) -> list[Any]:
        """The steps that were not looked at yet, as plain data."""
        return [[step, row.values()] for step, row in self._unread]

    def remember(self, unread: list[Any]) -> None:
        """Go on with steps that were not looked at yet.

        Args:
            unread: from `unread`; they are in the history already.
        """
        rows = [(step, Row((), torch.empty(0), dict(values))) for step, values in unread]
        for _, row in rows:
            row.numbers = {}
        self._unread = rows

    def adopt(self, named: dict[str, Tensor]) -> None:
        """Train those of these parameters too that are not trained yet.

        Args:
            named: unconstrained parameters by name.
        """
        have = {id(p) for p in leaves_in(self.optimizer)}
        new = {n: p for n, p in named.items() if id(p) not in have}
        if new and self.scheduler is not None:
            raise GuideError(
                f"parameter '{min(new)}' appears only in the course of training, which torch's "
                "schedulers can't follow. Create it in every call of the program, or leave "
                "scheduler= out."
            )
        for group in self.schedule.groups(self.task.params, new):
            self.optimizer.add_param_group(group)
        self.recovery.renew()
        if new and self.averages is not None:  # which lack them so far
            self.averages.restart(self.step)


def looks(leaf: Tensor) -> int:
    """Steps between two looks at the numbers, which an accelerator would have to be waited for.

    Args:
        leaf: a parameter.
    """
    return 1 if leaf.device.type == "cpu" else INTERVAL


def _in_error(error: Exception | None) -> Place | None:
    """Where a fault is that did not come again."""
    if error is None:
        return None
    return Place(f"the programs fail ({str(error).splitlines()[0].rstrip('.: ')})", "error")
