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
from pvi.compiled.python_state import moved, numbers
from pvi.engine.data import Batch, Data
from pvi.engine.objective import Evaluation
from pvi.fit.choice import choose
from pvi.fit.locate import is_numeric

FIRST = 2  # steps that the programs run by themselves, with all their checks
SMALL = 20_000  # numbers in the parameters; in larger networks the arithmetic takes the time
SHAPES = 3  # shapes of batches that are captured


@dataclass
class Compiled:
    """A captured step.

    Args:
        gradients: from a batch and KL weights to what the unit's graph gives.
        block: many steps at once, where that is possible.
        backend: by which they run.
    """

    unit: Unit
    gradients: Callable[[Batch, Sequence[Tensor]], Sequence[Tensor]]
    block: Block | None
    backend: str


class CompiledSteps:
    """Loss and gradients of a batch from a captured graph, once it has proved right.

    Args:
        task: the fit's trainer; `options.compile` says whether and how.
        limit: steps in all; `None` where that is open.
        adam: the optimiser's numbers for a unit's parameters, where steps may be taken in blocks;
            else `None`.
    """

    def __init__(self, task: Any, limit: int | None, adam: Callable[[Unit], Adam] | None):
        wanted = task.options.compile
        self._task, self._limit, self._adam = task, limit, adam
        self._auto = wanted == "auto"
        self._backend = {False: "", "auto": "", "graph": "graph"}.get(wanted, "inductor")
        self.notes: list[str] = []
        self.off = wanted is False  # whether the programs run to the end
        self.paused = False  # whether they run for now
        self._known: dict[tuple, Compiled] = {}
        self._seen: dict[tuple, Batch] = {}
        self._schedules = list(task.objective.schedules())
        self._numbers: dict[str, Any] | None = None  # that the programs reach

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
        before = torch.get_rng_state()
        try:
            weights = [torch.tensor(w) for w in self.weights(step)]
            found = known.gradients(batch, weights) if known else None
        except RuntimeError:  # of bad numbers, which the programs will name
            torch.set_rng_state(before)
            return None
        if known is None or found is None:
            return None
        with torch.no_grad():
            leaves = live(known.unit)
            taken = set(map(_memory, known.unit.inputs(batch, weights)))
            for leaf, grad in zip(leaves, found[1:], strict=False):
                if share != 1.0:
                    grad = grad * share
                elif _memory(grad) in taken or not grad.is_contiguous():
                    grad = grad.clone(memory_format=torch.contiguous_format)  # it is written to
                taken.add(_memory(grad))
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad
            for buffer, value in zip(buffers(known.unit), found[1 + len(leaves) :], strict=True):
                buffer.copy_(value)
        return known.unit.names, found[0]

    def waits(self, step: int) -> bool:
        """Whether the programs run for some more steps.

        Args:
            step: how many are done.
        """
        if self._auto:
            small = sum(x.numel() for x in self._task.params.named().values()) <= SMALL
            self._backend = choose(step, self._limit, small=small)
        return self.off or step < FIRST or not self._backend

    def known(self, batch: Batch) -> Compiled | None:
        """What there is for a batch of this shape.

        Args:
            batch: of the data.
        """
        known = None if self.off else self._known.get(signature(batch))
        fits = known and list(known.unit.source.leaves) == list(self._task.params.named())
        return known if fits else None

    def ready(self, batch: Batch, step: int) -> Compiled | None:
        """What takes the step on a batch of this shape; `None` where the programs have to.

        Args:
            step: how many are done.
        """
        if self.off or self.paused:
            return None
        if self.waits(step):
            self._seen.setdefault(signature(batch), batch)
            if step < FIRST:
                self._changed()
            return None
        known = self.known(batch)
        try:
            name = self._changed() if self._is_open else ""
            if name:
                raise NotCompilable(f"'{name}' in the programs changes from step to step")
            if known is None:
                return self._new(batch, step)
            if known.backend != self._backend:
                known = self._run_by(self._backend, known.unit, batch, step) or known
                self._known[signature(batch)] = known
            elif step & (step - 1) == 0:  # 4, 8, 16, ...
                check(known.unit, known.gradients, (batch, self.weights(step)))
        except NotCompilable as error:
            late = f"no longer compiled from step {step + 1} on"
            self.notes.append(f"{late if known else 'not compiled'}: {error}")
            self.off = True
            return None
        except (RuntimeError, ValueError) as error:
            if not is_numeric(error):
                raise
            return None  # the programs will name it
        return known

    def weights(self, step: int) -> list[float]:
        """The KL weights of a step."""
        epoch = step / self._task.steps_per_epoch
        return [float(s.at(step, epoch)) for s in self._schedules]

    @property
    def _is_open(self) -> bool:
        """Whether code of the user's runs between steps, or the programs were not watched yet."""
        task = self._task
        return bool(task.callbacks) or task.data.loader is not None or not self._known

    def _changed(self) -> str:
        """A number that the programs reach and that has changed since the last look; "" if none."""
        now = numbers(self._task.model, self._task.guide)
        before, self._numbers = self._numbers or now, now
        return moved(before, now)

    def _new(self, batch: Batch, step: int) -> Compiled | None:
        """Capture the step on batches of a shape."""
        shape = signature(batch)
        other = self._other(batch, self._seen.setdefault(shape, batch))
        if other is None or (shape not in self._known and len(self._known) >= SHAPES):
            return None
        values = self.weights(step)
        probes = [(other, [w / 2 + 0.25 for w in values]), (batch, values)]
        unit = make_unit(self._source(other, batch), probes)
        found = self._run_by(self._backend, unit, batch, step)
        if found is not None:
            self._known[shape] = found
        return found

    def _run_by(self, backend: str, unit: Unit, batch: Batch, step: int) -> Compiled | None:
        """A unit run by a backend, or operation by operation where the compiler fails; `None` where
        the programs come to bad numbers, with which nothing can be checked.
        """
        block = self._block(unit, batch, backend)
        gradients = block.gradients if block else _single(unit, backend)
        try:
            if not check(unit, gradients, (batch, self.weights(step))):
                return None
        except NotCompilable as error:
            if backend == "graph":
                raise
            self.notes.append(f"run as a graph: {error}")
            found = self._run_by("graph", unit, batch, step)
            return found and replace(found, backend=backend)
        self._tell(f"compiled from step {step + 1} on ({backend})")
        return Compiled(unit, gradients, block, backend)

    def _tell(self, note: str) -> None:
        """Once for each backend, whatever the number of shapes."""
        if not any(note.split("(")[-1] in known for known in self.notes):
            self.notes.append(note)

    def _other(self, batch: Batch, seen: Batch) -> Batch | None:
        """Another batch of the same shape, to look at the programs with."""
        data = self._task.data
        if type(data) is not Data:
            return None if seen is batch else seen
        if batch.indices is None:
            return batch
        rows = (batch.indices + 1) % data.size
        args, kwargs = data.rows(rows)
        return replace(batch, args=args, kwargs=kwargs, indices=rows)

    def _block(self, unit: Unit, batch: Batch, backend: str) -> Block | None:
        if self._adam is None or unit.changed or len({x.dtype for x in live(unit)}) > 1:
            return None
        data = self._task.data
        args, kwargs = data.whole()
        return Block(unit, self._adam(unit), Batch(args, kwargs, None, data.size), batch, backend)

    def _source(self, one: Batch, other: Batch) -> Source:
        task = self._task
        if task.baseline().means:
            raise NotCompilable("score gradients of single draws keep moving averages in Python")
        if task.options.precision is not None:
            raise NotCompilable(f"precision='{task.options.precision}' is not captured")
        if task.arena.adversaries:
            raise NotCompilable("the steps of adversaries are not captured")
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


def _single(unit: Unit, backend: str) -> Callable[[Batch, Sequence[Tensor]], Sequence[Tensor]]:
    """A unit as a function of a batch and KL weights."""
    function = make_function(unit.graph, backend)

    def gradients(batch: Batch, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        return function(*[x.detach() for x in unit.inputs(batch, weights)])

    return gradients


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _same(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the very same tensors."""
    pairs = zip(
        (*one.args, *one.kwargs.values()), (*other.args, *other.kwargs.values()), strict=True
    )
    return all(a is b for a, b in pairs)
