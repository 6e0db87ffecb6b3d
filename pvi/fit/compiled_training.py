"""Steps of a training by a graph in the place of its programs, where that is safe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pvi.compiled import (
    Adam,
    Block,
    NotCompilable,
    Source,
    Unit,
    buffers,
    check,
    live,
    make_function,
    make_unit,
    signature,
)
from pvi.engine.data import Batch, Data
from pvi.engine.objective import Evaluation

FIRST = 2  # steps that the programs run by themselves, with all their checks
SHAPES = 3  # shapes of batches that are captured


@dataclass
class Compiled:
    """A captured step.

    Args:
        gradients: from a batch and KL weights to what the unit's graph gives.
        block: many steps at once, where that is possible.
    """

    unit: Unit
    gradients: Callable[[Batch, Sequence[Tensor]], Sequence[Tensor]]
    block: Block | None


class CompiledSteps:
    """Loss and gradients of a batch from a captured graph, once it has proved right.

    Args:
        task: the fit's trainer; `options.compile` says whether and how.
        adam: the optimiser's numbers for the unit's parameters, where steps may be taken in blocks;
            else `None`.
    """

    def __init__(self, task: Any, adam: Callable[[Unit], Adam] | None):
        self._task, self._way, self._adam = task, task.options.compile, adam
        self.notes: list[str] = []
        self.paused = False  # whether the programs have to run for now
        self._known: dict[tuple, Compiled] = {}
        self._seen: dict[tuple, Batch] = {}
        self._schedules = list(task.objective.schedules())

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
        known = self.ready(batch, step)
        if known is None:
            return None
        with torch.no_grad():
            found = known.gradients(batch, [torch.tensor(w) for w in self.weights(step)])
            leaves = live(known.unit)
            for leaf, grad in zip(leaves, found[1:], strict=False):
                grad = grad.clone() if share == 1.0 else grad * share
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad
            for buffer, value in zip(buffers(known.unit), found[1 + len(leaves) :], strict=True):
                buffer.copy_(value)
        return known.unit.names, found[0]

    def known(self, batch: Batch) -> Compiled | None:
        """What there is already for a batch of this shape.

        Args:
            batch: of the data.
        """
        known = None if self._way is False else self._known.get(signature(batch))
        fits = known and list(known.unit.source.leaves) == list(self._task.params.named())
        return known if fits else None

    def ready(self, batch: Batch, step: int) -> Compiled | None:
        """What takes the step on a batch of this shape; `None` where the programs have to.

        Args:
            step: how many are done.
        """
        if self._way is False or self.paused:
            return None
        shape, known = signature(batch), self.known(batch)
        other = self._other(batch, shape)
        self._seen.setdefault(shape, batch)
        if step < FIRST or other is None:
            return None
        if known is None and shape not in self._known and len(self._known) >= SHAPES:
            return None
        try:
            if known is None:
                known = self._known[shape] = self._make(other, batch, step)
                self._tell(f"compiled from step {step + 1} on ({self._backend})")
            elif step & (step - 1) == 0:  # 4, 8, 16, ...: what changes only later
                check(known.unit, known.gradients, (batch, self.weights(step)))
        except NotCompilable as error:
            self._way = False
            late = f"no longer compiled from step {step + 1} on"
            self._tell(f"{late if self._known else 'not compiled'}: {error}")
            return None
        return known

    def weights(self, step: int) -> list[float]:
        """The KL weights of a step."""
        epoch = step / self._task.steps_per_epoch
        return [float(s.at(step, epoch)) for s in self._schedules]

    @property
    def _backend(self) -> str:
        return "graph" if self._way == "graph" else "inductor"

    def _tell(self, note: str) -> None:
        if not self.notes or self._way is False:
            self.notes.append(note)

    def _other(self, batch: Batch, shape: tuple) -> Batch | None:
        """Another batch of this shape, to look at the programs with."""
        data = self._task.data
        if batch.indices is not None and type(data) is Data:
            rows = (batch.indices + 1) % data.size
            args, kwargs = data.rows(rows)
            return replace(batch, args=args, kwargs=kwargs, indices=rows)
        return batch if batch.indices is None and type(data) is Data else self._seen.get(shape)

    def _make(self, other: Batch, batch: Batch, step: int) -> Compiled:
        """Capture, compile and check."""
        values = self.weights(step)
        probes = [(other, [0.5 * w + 0.25 for w in values]), (batch, values)]
        unit = make_unit(self._source(other, batch), probes)
        block = self._block(unit, batch)
        gradients = block.gradients if block else self._single(unit)
        check(unit, gradients, probes[-1])
        return Compiled(unit, gradients, block)

    def _block(self, unit: Unit, batch: Batch) -> Block | None:
        if self._adam is None or unit.changed or len({x.dtype for x in live(unit)}) > 1:
            return None
        data = self._task.data
        args, kwargs = data.whole()
        whole = Batch(args, kwargs, None, data.size)
        return Block(unit, self._adam(unit), whole, batch, self._backend)

    def _single(self, unit: Unit) -> Callable[[Batch, Sequence[Tensor]], Sequence[Tensor]]:
        function = make_function(unit.graph, self._backend)

        def gradients(batch: Batch, weights: Sequence[Tensor]) -> Sequence[Tensor]:
            return function(*[x.detach() for x in unit.inputs(batch, weights)])

        return gradients

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
        rest = [x for x in task.params.tensors().values() if id(x) not in known]

        def evaluate(batch: Batch, weights: Sequence[Tensor]) -> Evaluation:
            objective = task.objective.with_weights(weights) if weights else task.objective
            return task.evaluate(batch, 0, objective)

        programs = (task.model, task.guide)
        fixed = one.indices is None and _same(one, other)
        return Source(evaluate, leaves, rest, programs, fixed)


def _same(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the very same tensors."""
    pairs = zip(
        (*one.args, *one.kwargs.values()), (*other.args, *other.kwargs.values()), strict=True
    )
    return all(a is b for a, b in pairs)
