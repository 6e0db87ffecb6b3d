"""One epoch of batches after the other, also from the middle of one."""

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

from pvi.engine.data import Batch, Data
from pvi.errors import CheckpointError
from pvi.fit.random import random_state, set_random_state
from pvi.fit.storage import Tree


class Epochs:
    """Where a training is in its data.

    Args:
        task: the fit's trainer.
    """

    def __init__(self, task: Any):
        self._task = task
        self.done = 0  # batches of this epoch
        self._start: dict[str, Any] = {}  # the random state then, which decides the order
        self._batch: Batch | None = None  # the last one
        self._mark: int | None = None  # its checksum, where a checkpoint was written

    def batches(self) -> Iterator[Batch]:
        """Batches without end, from the middle of an epoch where a checkpoint left off."""
        task, loader = self._task, self._task.data.loader
        if type(task.data) is Data and task.batch_size is None and task.team.alone:
            self._batch = next(task.batches())  # which does not depend on any random state
            yield from repeat(self._batch)
        while True:
            task.team.same_random()
            now, done = random_state(loader), self.done
            if done:
                set_random_state(self._start, loader)
            else:
                self._start = now
            batches = task.batches(skip=max(done - 1, 0))
            if done:
                self._check_same(next(batches, None))
                set_random_state(now, loader)
            for batch in batches:
                self.done, self._batch = self.done + 1, batch
                yield batch
            self.done = 0

    def state(self) -> Tree:
        """What decides the batches to come, as plain data."""
        return {"in_epoch": self.done, "epoch_start": self._start, "batch": self._last()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier `state`."""
        self.done, self._start = state["in_epoch"], state["epoch_start"]
        self._mark = state.get("batch")

    def _last(self) -> int | None:
        """What tells the last batch from others, for whoever goes on from here."""
        if self._batch is None:
            return self._mark
        return None if self._batch.indices is None else self._batch.checksum()

    def _check_same(self, batch: Batch | None) -> None:
        """Refuse to go on in the middle of an epoch whose rows come in another order now."""
        team = self._task.team
        mark = self._mark if team.first else None  # it is of the first process's share
        other = mark is not None and (batch is None or batch.checksum() != mark)
        if team.any(other):
            raise CheckpointError(
                f"the data don't give the same rows again ({self.done} batches into an epoch), so "
                "this fit can't go on where it was: its stream, sampler or transform draws from a "
                "random state that is not torch's, numpy's or Python's. Seed it, or start again "
                "with another checkpoint= folder."
            )
