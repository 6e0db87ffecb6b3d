"""The steps of one fit, and all that changes in their course."""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pvi.engine.data import Batch
from pvi.engine.gradients import leaves_of
from pvi.engine.objective import Evaluation
from pvi.errors import CheckpointError, FitError, GuideError, ModelError
from pvi.fit.callbacks import Step
from pvi.fit.drift import Path, leaves_in
from pvi.fit.progress import Progress
from pvi.fit.random import random_state, set_random_state
from pvi.fit.result import History
from pvi.fit.schedule import Schedule

PATIENCE = 20  # steps in a row without a finite gradient


class Training:
    """Batch, loss, gradient, step, until done. What it holds is what a checkpoint holds.

    Args:
        task: the fit's trainer, with the programs, the data, `params`, `history` and `evaluate`.
    """

    def __init__(self, task: Any, schedule: Schedule, bar: Progress):
        self.task, self.schedule, self.bar = task, schedule, bar
        self.team = task.team
        self.team.broadcast(task.params.tensors().values())
        self.optimizer = schedule.optimizer(task.params)
        self.path = Path()
        self.step = self.failures = 0
        self.in_epoch = 0  # batches of this epoch that are done
        self.epoch_start: dict[str, Any] = {}  # the random state then, which decides the order
        self.batch: Batch | None = None  # the last one
        self.batch_mark: int | None = None  # its checksum, where a checkpoint was written
        self.whole = False  # whether no step is half done

    @property
    def history(self) -> History:
        return self.task.history

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What makes this fit this fit; read once, for it takes a look at all the data."""
        return self.task.fingerprint(self.schedule)

    def run(self, checkpoints: Any = None) -> bool:
        """Train until the schedule ends, or a callback ends it; return whether one did.

        Args:
            checkpoints: `Checkpoints` to go on from and to write, or `None`.
        """
        if checkpoints is not None:
            checkpoints.resume(self)
        batches = self._batches()
        while not self.schedule.finished(self.step):
            self.whole = False
            bound, loss = self._take(next(batches))
            self.whole = True
            state = Step(self.step, bound, loss, self.task.params)
            stopped = any([callback(state) is True for callback in self.task.callbacks])
            stopped = self.team.any(stopped) if self.task.callbacks else stopped
            if checkpoints is not None:
                checkpoints.after_step(self)
            if stopped:
                return True
        return False

    def _batches(self) -> Iterator[Batch]:
        """Batches without end, from the middle of an epoch where a checkpoint left off."""
        data = self.task.data
        while True:
            self.team.same_random()
            now, done = random_state(data.loader), self.in_epoch
            if done:
                set_random_state(self.epoch_start, data.loader)
            else:
                self.epoch_start = now
            batches = self.task.batches(skip=max(done - 1, 0))
            if done:
                self._check_same(next(batches, None))
                set_random_state(now, data.loader)
            for batch in batches:
                self.in_epoch, self.batch = self.in_epoch + 1, batch
                yield batch
            self.in_epoch = 0

    def mark(self) -> int | None:
        """What tells the last batch from others, for whoever goes on from here."""
        if self.batch is None:
            return self.batch_mark
        return None if self.batch.indices is None else self.batch.checksum()

    def _check_same(self, batch: Batch | None) -> None:
        """Refuse to go on in the middle of an epoch whose rows come in another order now."""
        mark = self.batch_mark if self.team.first else None  # it is of the first process's share
        if mark is not None and (batch is None or batch.checksum() != mark):
            raise CheckpointError(
                f"the data don't give the same rows again at step {self.step}, so this fit can't "
                "go on where it was: its stream, sampler or transform draws from a random state "
                "that is not torch's, numpy's or Python's. Seed it, or start again with another "
                "checkpoint= folder."
            )

    def _take(self, batch: Batch) -> tuple[float, float]:
        """One step; its bound and loss."""
        value, record, grad_norm = self._gradient(batch)
        bound, loss = record["bound"], record["loss"]
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step()
            self.failures = 0
        else:
            self.failures += 1
            if self.step == 0 or self.failures == PATIENCE:
                raise FitError(_not_finite(self.step, value))
        self.step += 1
        lr = self.optimizer.param_groups[0]["lr"]
        self.history.add({**record, "lr": lr, "grad_norm": grad_norm})
        self.schedule.after(self.step, -loss, self.optimizer)
        self.path.pass_by(self.step, self.optimizer)
        self.bar.update(self.step, bound, self.schedule.plateau)
        return bound, loss

    def _gradient(self, batch: Batch) -> tuple[Evaluation, dict[str, float], float]:
        """Loss, record and gradient on one batch; parameters that appear only now are trained
        too.
        """
        params = self.task.params
        self.optimizer.zero_grad()
        known = params.created()
        value = self.task.evaluate(batch, self.step)
        if params.created() != known:
            params.sync()
            self.adopt(params.named())
        if not value.loss.requires_grad:
            raise GuideError("the loss depends on no parameter, so there is nothing to fit")
        if not self.history:
            self._check_strays(value)
        (value.loss if batch.weight == 1.0 else value.loss * batch.weight).backward()
        record = self.team.average(value.record(), leaves_in(self.optimizer), batch.weight)
        grads = [p.grad for p in leaves_in(self.optimizer) if p.grad is not None]
        return value, record, float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0

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

    def adopt(self, named: dict[str, Tensor]) -> None:
        """Train those of these parameters too that are not trained yet."""
        have = {id(p) for p in leaves_in(self.optimizer)}
        new = {n: p for n, p in named.items() if id(p) not in have}
        for group in self.schedule.groups(self.task.params, new):
            self.optimizer.add_param_group(group)


def _not_finite(step: int, value: Evaluation) -> str:
    bad = [t.name for t in value.terms if not bool(t.per_particle().isfinite().all())]
    if bad:
        where = f"site '{bad[0]}' has a log density that is not finite"
    else:
        where = "the gradient is not finite"
    return (
        f"step {step}: {where}; the parameters keep their last finite values. Lower lr or the "
        "guide's init_scale, or scale the data to about unit size."
    )
