"""Training in stages of one rate, and the averages of the parameters over them.

At one rate the parameters of Adam end up in a cloud around the optimum, as wide as the rate. Their
average is far nearer to it than any of them, and tells whether they have come to rest.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice, repeat
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

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
        losses: the loss on each of some batches after so many steps, at the present parameters.
    """

    def __init__(self, task: Any, stages: Stages, losses: Callable[[Iterable[Batch], int], Tensor]):
        self.task, self.stages, self.losses = task, stages, losses
        self.best: Values = {}
        self.halves: list[Values] = [{}, {}]
        self.counts = [0, 0]
        self._live: Values = {}

    def after(self, step: int, count: int = 1, means: Values | None = None) -> None:
        """Take the parameters after some steps; at the end of a stage, go to its best.

        Args:
            step: the number of the last one, from 1.
            count: how many, all in the same half of a stage.
            means: the averages over them of the parameters that they change.
        """
        stages = self.stages
        if step <= stages.start or stages.ended:
            return
        self._live = self._live or self._tensors()
        if not self.best:
            self.best = _copies(self._live)
        self._add(step - stages.start > stages.length // 2, count, {**self._live, **(means or {})})
        if step == stages.end:
            gain, error, moving = self._choose(step)
            put(self._tensors(), self.best)
            stages.judge(gain, error, moving)
            self._clear()

    def restart(self, step: int) -> None:
        """Begin the stage anew after a fault: some of its steps may not have been finite."""
        if not self.stages.ended and step >= self.stages.start:
            self.stages.start = step
            self._clear()

    def close(self, step: int) -> None:
        """Leave the best parameters, wherever training ended."""
        if all(self.counts):
            if not self.task.team.alone:
                return  # the others may not be here
            try:
                self._choose(step)
            except (PviError, RuntimeError, ValueError):
                return  # what ended the fit is told already
        if self.best:
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
        """Parameters, and buffers such as the statistics of BatchNorm, which belong to them."""
        found = self.task.params.tensors()
        return {name: x.detach() for name, x in found.items() if x.is_floating_point()}

    def _add(self, second: bool, count: int, values: Values) -> None:
        self.counts[second] += count
        if self.counts[second] == count:
            self.halves[second] = _copies(values)
        else:
            means = [self.halves[second][name] for name in values]
            torch._foreach_lerp_(means, list(values.values()), count / self.counts[second])

    def _clear(self) -> None:
        self.halves, self.counts, self._live = [{}, {}], [0, 0], {}

    def _choose(self, step: int) -> tuple[float, float, bool]:
        """Keep the best candidate of a stage.

        Returns:
            Its gain over the best before and the standard error of that, nats; and whether the
            parameters were still on their way.
        """
        first, second = self.halves
        share = self.counts[1] / sum(self.counts)
        whole = {n: torch.lerp(first[n], x, share) if n in first else x for n, x in second.items()}
        candidates = [whole, second, _copies(self._tensors())]
        for values in candidates:
            self.task.team.broadcast(values.values())  # buffers are each process's own
        before, *bounds = (self._bounds(values, step) for values in (self.best, *candidates))
        winner = max(range(3), key=lambda i: fmean(bounds[i]))
        gains = [b - a for a, b in zip(before, bounds[winner], strict=True)]
        gain, error = fmean(gains), stdev(gains) / math.sqrt(len(gains))
        if gain > 0.0 or gain == math.inf:
            self.best = candidates[winner]
        return gain, error if self.task.batches_per_epoch == 1 else 0.0, winner > 0

    def _bounds(self, values: Values, step: int) -> list[float]:
        """The objective with these parameters, nats: the same batches and draws each time."""
        task = self.task
        kept = kept_random(task.data.loader)
        with kept, torch.no_grad(), task.params.evaluation(), self._holding(values):
            torch.manual_seed(SEED)
            try:
                bounds = -self.losses(self._batches(), step)
            except (RuntimeError, ValueError) as error:
                if not is_numeric(error):
                    raise
                bounds = torch.full((self._count,), -math.inf)
        return task.team.means(bounds).nan_to_num(-math.inf, -math.inf, -math.inf).tolist()

    def _batches(self) -> Iterator[Any]:
        task = self.task
        data = replace(task.data, own_loader=None) if task.data.loader else task.data
        passes = (data.batches(task.batch_size, task.team.part) for _ in repeat(None))
        return islice(chain.from_iterable(passes), self._count)

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
    def _holding(self, values: Values) -> Iterator[None]:
        here = self._tensors()
        kept = _copies(here)
        put(here, values)
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
