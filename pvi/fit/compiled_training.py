"""Steps of a training by a graph in the place of its programs, where that is safe."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvi.compiled import NotCompilable, Source, Unit, buffers, check, live, make_function, make_unit
from pvi.engine.data import Batch
from pvi.engine.objective import Evaluation

FIRST = 2  # steps that the programs run by themselves, with all their checks


class CompiledSteps:
    """Loss and gradients of a batch from a captured graph, once it has proved right.

    Args:
        task: the fit's trainer; `options.compile` says whether and how.
    """

    def __init__(self, task: Any):
        self._task, self._way = task, task.options.compile
        self.notes: list[str] = []
        self._unit: Unit | None = None
        self._function: Any = None
        self._seen: Batch | None = None

    def gradients(
        self, batch: Batch, step: int, share: float
    ) -> tuple[tuple[str, ...], Tensor] | None:
        """Add the gradients on a batch to the parameters'; `None` where the programs have to run.

        Args:
            step: how many are done.
            share: of the step's gradient that is this batch's.

        Returns:
            Names and numbers of what is recorded.
        """
        if self._way is False:
            return None
        if step < FIRST or self._seen is None:
            self._seen = batch
            return None
        if self._unit is None or list(self._unit.source.leaves) != list(self._task.params.named()):
            self._prepare(batch, step)
        if step & (step - 1) == 0:
            self._check_again(batch, step)
        unit = self._unit
        if unit is None or not unit.fits(batch):
            return None
        weights = [torch.tensor(w) for w in self._weights(step)]
        with torch.no_grad():
            found = self._function(*unit.inputs(batch, weights))
            leaves = live(unit)
            for leaf, grad in zip(leaves, found[1:], strict=False):
                grad = grad.clone() if share == 1.0 else grad * share
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad
            for buffer, value in zip(buffers(unit), found[1 + len(leaves) :], strict=True):
                buffer.copy_(value)
        return unit.names, found[0]

    def _prepare(self, batch: Batch, step: int) -> None:
        """Capture, compile and check; leave the way where one of them fails."""
        other = self._seen or batch
        values = self._weights(step)
        probes = [(other, [0.5 * w + 0.25 for w in values]), (batch, values)]
        backend = "graph" if self._way == "graph" else "inductor"
        try:
            unit = make_unit(self._source(other, batch), probes)
            function = make_function(unit.graph, backend)
            check(unit, function, probes[-1])
        except NotCompilable as error:
            self._way, self._unit = False, None
            self.notes.append(f"not compiled: {error}")
            return
        self._unit, self._function = unit, function
        self.notes.append(f"compiled from step {step + 1} on ({backend})")

    def _check_again(self, batch: Batch, step: int) -> None:
        """Compare once more, for what changes only later: at steps 4, 8, 16, ..."""
        if self._unit is None or not self._unit.fits(batch):
            return
        try:
            check(self._unit, self._function, (batch, self._weights(step)))
        except NotCompilable as error:
            self._way, self._unit = False, None
            self.notes.append(f"no longer compiled from step {step + 1} on: {error}")

    def _source(self, one: Batch, other: Batch) -> Source:
        task = self._task
        if task.baseline().means:
            raise NotCompilable("score gradients of single draws keep moving averages in Python")
        if task.options.precision is not None:
            raise NotCompilable(f"precision='{task.options.precision}' is not captured")
        leaves = task.params.named()
        if any(x.device.type != "cpu" for x in leaves.values()):
            raise NotCompilable("captured steps were tested on CPUs only")
        known = {id(x) for x in leaves.values()}
        buffers = [x for x in task.params.tensors().values() if id(x) not in known]

        def evaluate(batch: Batch, weights: Sequence[Tensor]) -> Evaluation:
            objective = task.objective.with_weights(weights) if weights else task.objective
            return task.evaluate(batch, 0, objective)

        programs = (task.model, task.guide)
        return Source(
            evaluate, leaves, buffers, programs, one.indices is None and _same(one, other)
        )

    def _weights(self, step: int) -> list[float]:
        """The KL weights of a step."""
        task = self._task
        epoch = step / task.steps_per_epoch
        return [float(s.at(step, epoch)) for s in task.objective.schedules()]


def _same(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the very same tensors."""
    pairs = zip(
        (*one.args, *one.kwargs.values()), (*other.args, *other.kwargs.values()), strict=True
    )
    return all(a is b for a, b in pairs)
