"""Training in stages of one rate, and the averages of the parameters over them.

At one rate the parameters of Adam end up in a cloud around the optimum, as wide as the rate. Their
average is far nearer to it than any of them, and tells whether they have come to rest.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn

from pvi.engine.data import Batch
from pvi.errors import PviError
from pvi.fit.locate import is_numeric
from pvi.fit.random import kept_random
from pvi.fit.storage import Tree
from pvi.optim.schedule import Stages

SEED = 0  # of the noise of every bound, so that their differences are paired
REPEATS, SHARE = 24, 4  # batches in a comparison: at least, and at most this part of a stage's
Values = dict[str, Tensor]


class Averages:
    """The parameters' average in each stage, from the best of which the next one starts.

    At the end of a stage three candidates are compared: the average of all its steps, that of its
    second half, and the parameters as they are. If the first has the highest bound, they were at
    rest around the optimum, and the rate is lowered; else they were still on their way.

    Args:
        task: the fit's trainer.
        stages: lengths and rates.
        loss: on a batch after so many steps, at the present parameters.
    """

    def __init__(self, task: Any, stages: Stages, loss: Callable[[Batch, int], Tensor]):
        self.task, self.stages, self.loss = task, stages, loss
        self.best: Values = {}
        self.halves: list[Values] = [{}, {}]
        self.counts = [0, 0]
        self._live: Values = {}

    def after(self, step: int, count: int = 1, means: Values | None = None) -> None:
        """Take the parameters after some steps; at the end of a stage, go to its best.

        Args:
            step: the number of the last one, from 1.
            count: how many, all in the same half of a stage.
            means: those of `running` with them, of the parameters that they change; by default
                they are worked out from the parameters as they are.
        """
        stages = self.stages
        if step <= stages.start or stages.ended:
            return
        if not self._live:  # without masks that hold infinities, whose mean is NaN
            here = self._tensors().items()
            self._live = {name: x for name, x in here if bool(x.isfinite().all())}
        if not self.best:
            self.best = _copies(self._live)
        self._add(self._half(step), count, means)
        if step == stages.end:
            gain, error, moving = self._choose(step, self._count)
            put(self._tensors(), self.best)
            stages.judge(gain, error, moving)
            self._clear()

    def restart(self, step: int) -> None:
        """Begin the stage anew: after a fault, some of its steps may not have been finite; after
        new parameters came up, those are not in its averages.
        """
        if not self.stages.ended and step >= self.stages.start:
            self.stages.start = step
            self._clear()

    def close(self, step: int, joint: bool) -> None:
        """Leave the best parameters, wherever training ended.

        Args:
            step: how many steps are done.
            joint: whether all processes are here; else they can't compare, and the last stay.
        """
        if not self.best or not (joint or self.stages.ended):
            return
        if not self.stages.ended:
            try:
                self._choose(step, REPEATS)
            except (PviError, RuntimeError, ValueError):
                return  # what ended the fit is told already
        put(self._tensors(), self.best)

    def state(self) -> Tree:
        """What changes in training, as plain data."""
        tree: Tree = {"stages": self.stages.state(), "counts": list(self.counts)}
        return tree | {"best": dict(self.best), "halves": [dict(half) for half in self.halves]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier `state`; the parameters exist by now."""
        here = self.task.params.tensors()
        self.stages.restore(state["stages"])
        self.counts = list(state["counts"])
        self.best, *self.halves = (
            {name: x.to(here[name].device) for name, x in values.items()}
            for values in (state["best"], *state["halves"])
        )

    def _tensors(self) -> Values:
        """Trained parameters, and buffers such as the statistics of BatchNorm, which belong to
        them.
        """
        found = self.task.params.tensors().items()
        moving = ((n, x) for n, x in found if x.requires_grad or not isinstance(x, nn.Parameter))
        return {name: x.detach() for name, x in moving if x.is_floating_point()}

    def running(self, step: int) -> tuple[Values, int]:
        """The averages that the next step goes into, and over how many steps they are so far.

        Args:
            step: how many are done.
        """
        half = self._half(step + 1)
        return self.halves[half], self.counts[half]

    def _half(self, step: int) -> bool:
        return step - self.stages.start > self.stages.length // 2

    def _add(self, half: bool, count: int, means: Values | None) -> None:
        self.counts[half] += count
        here = self.halves[half] = self.halves[half] or _copies(self._live)
        if means is not None:
            here.update(means)
        else:
            xs, share = [here[name] for name in self._live], count / self.counts[half]
            torch._foreach_lerp_(xs, list(self._live.values()), share)

    def _clear(self) -> None:
        self.halves, self.counts, self._live = [{}, {}], [0, 0], {}

    def _choose(self, step: int, count: int) -> tuple[float, float, bool]:
        """Keep the best candidate of a stage, over so many batches.

        Returns:
            Its gain over the best before and the standard error of that, nats; and whether the
            parameters were still on their way.
        """
        first, second = self.halves
        share = self.counts[1] / max(sum(self.counts), 1)
        whole = {n: torch.lerp(first[n], x, share) if n in first else x for n, x in second.items()}
        averages = [whole, second] if second else [first] * bool(first)  # if ended before the half
        candidates = [*averages, _copies(self._tensors())]
        for values in candidates:
            self.task.team.broadcast(values.values())  # buffers are each process's own
        table = self._bounds([self.best, *candidates], step, count)
        telling = table.isfinite().any(0)  # a batch with a row that is bad for all is not
        before, *bounds = table[:, telling | ~telling.any()]
        winner = max(range(len(bounds)), key=lambda i: float(bounds[i].mean()))
        gains = bounds[winner] - before
        gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
        if not gain <= 0.0:
            self.best = candidates[winner]
        return gain, error if self.task.batches_per_epoch == 1 else 0.0, winner > 0

    def _bounds(self, sets: list[Values], step: int, count: int) -> Tensor:
        """The objective with each of these parameters, nats `(len(sets), count)`: on batches that
        are read once, with the same draws.
        """
        task, here = self.task, self._tensors()
        kept, found = kept_random(task.data.loader), []
        with kept, torch.no_grad(), task.params.evaluation(), self._holding():
            torch.manual_seed(SEED)
            for i, batch in enumerate(self._batches(count)):
                for values in sets:
                    put(here, values)
                    torch.manual_seed(SEED + i)
                    found.append(self._bound(batch, step))
        means = task.team.means(torch.stack(found)).double().cpu()
        return means.nan_to_num(-math.inf, -math.inf, -math.inf).reshape(-1, len(sets)).T

    def _bound(self, batch: Any, step: int) -> Tensor:
        """NaN where the programs fail because of bad numbers."""
        try:
            return -self.loss(batch, step)
        except (RuntimeError, ValueError) as error:
            if not is_numeric(error):
                raise
            return next(iter(self._tensors().values())).new_full((), math.nan)

    def _batches(self, count: int) -> Iterator[Any]:
        task = self.task
        data = replace(task.data, own_loader=None) if task.data.loader else task.data
        passes = (data.batches(task.batch_size, task.team.part) for _ in repeat(None))
        return islice(chain.from_iterable(passes), count)

    @property
    def _count(self) -> int:
        """Batches in a comparison: whole passes, so that the choice of rows is no error, unless
        those would take longer than the stage.
        """
        passes = self.task.batches_per_epoch
        if passes == 1:
            return max(REPEATS, self.stages.length // 16)
        return min(passes * math.ceil(REPEATS / passes), max(REPEATS, self.stages.length // SHARE))

    @contextmanager
    def _holding(self) -> Iterator[None]:
        here = self._tensors()
        kept = _copies(here)
        try:
            yield
        finally:
            put(here, kept)


def put(here: Values, values: Mapping[str, Tensor]) -> None:
    """Copy values to the tensors of their names.

    Args:
        here: parameters and buffers, without gradients.
        values: of some of them.
    """
    for name, x in here.items():
        if name in values:
            x.copy_(values[name])


def _copies(values: Values) -> Values:
    return {name: x.clone() for name, x in values.items()}
