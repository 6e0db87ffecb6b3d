"""What happens when a number is not finite: leave the step out, else go back and step shorter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pvi.engine.data import Batch
from pvi.errors import FitError
from pvi.fit.drift import leaves_in
from pvi.fit.locate import Place
from pvi.fit.storage import Tree

PERIOD = 50  # steps between two states that are kept to go back to
TRIES = 3  # failures in a row, or at one row of the data, until a shorter step is tried
LOWERINGS, FACTOR = 2, 0.1  # how often the rate is lowered, and to which share of it
CAREFUL = 100  # steps after a late fault in which each is looked at
SHOWN = 5  # messages about steps that were left out
NONE, HIDDEN = -1, -2  # in place of the number of a row


@dataclass
class Snapshot:
    """A state whose loss and gradient were finite, before the update of that step.

    Args:
        step: how many steps were done.
        values: parameters and buffers by name.
        moments: the optimiser's state of each parameter, by name.
        plateau: the state of the plateaus, where the schedule has some.
        means: the baselines of score gradients.
        arena: the state of the adversaries.
    """

    step: int
    values: dict[str, Tensor]
    moments: dict[str, dict[str, Any]]
    plateau: Any
    means: dict[str, Tensor]
    arena: Any = None


def take(training: Any) -> Snapshot:
    """The state of a training as it is.

    Args:
        training: `Training` in the middle of a step.
    """
    task, plateau = training.task, training.schedule.plateau
    tensors = task.params.tensors()
    state = training.optimizer.state
    moments = {n: _copied(state[x]) for n, x in tensors.items() if x in state}
    values = {name: x.detach().clone() for name, x in tensors.items()}
    means = dict(task.baseline().means)
    known = None if plateau is None else plateau.state()
    return Snapshot(training.step, values, moments, known, means, task.arena.state())


def put_back(training: Any, snapshot: Snapshot) -> None:
    """Make a training's parameters, buffers and optimiser those of a snapshot.

    Args:
        training: `Training`, whose step, history and rates stay.
        snapshot: from `take`.
    """
    task, optimizer = training.task, training.optimizer
    trained = {id(p) for p in leaves_in(optimizer)}
    with torch.no_grad():
        for name, x in task.params.tensors().items():
            if name in snapshot.values:
                x.copy_(snapshot.values[name])
            if id(x) not in trained:
                continue
            if name in snapshot.moments:
                optimizer.state[x] = _copied(snapshot.moments[name])
            else:
                optimizer.state.pop(x, None)
    task.baseline().means = dict(snapshot.means)
    if snapshot.arena is not None:
        task.arena.restore(snapshot.arena)
    if training.schedule.plateau is not None and snapshot.plateau is not None:
        training.schedule.plateau.restore(snapshot.plateau)
    if training.averages is not None:
        training.averages.restart(training.step)
    training.path.kept = [(at, xs) for at, xs in training.path.kept if at <= snapshot.step]


class Recovery:
    """Keeps states to go back to, and decides what follows a fault.

    A single step that is not finite is left out. After `TRIES` of them in a row, or at the same row
    of the data each time that it came up, or once the parameters are not finite, the fit goes back
    to the last state that was, lowers the rate to a tenth and goes on; after `LOWERINGS` of that,
    or where nothing has changed since, it stops.
    """

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.streak = self.lowered = self.skipped = self.late = 0
        self.careful = 0  # the step until which every step is looked at
        self.moved = False  # whether there was an update since the snapshot
        self.strikes: dict[str, list[int]] = {}  # by place: failures, row, step of the last one
        self.notes: list[str] = []

    def passed(self, training: Any, batches: list[Batch]) -> bool:
        """After a finite loss and gradient; whether the update should be made.

        Args:
            training: `Training`.
            batches: those of the step.
        """
        self.streak = 0
        if self.strikes:
            self._forgive(training, batches)
        if self.due(training.step):
            if not _state_finite(training):
                self._lower(training, Place("the optimiser's state is not finite", "optimizer"))
                return False
            self.snapshot, self.moved = take(training), False
        self.moved = True
        return True

    def due(self, step: int) -> bool:
        """Whether the next good state is one to keep.

        Args:
            step: how many are done.
        """
        return self.snapshot is None or step - self.snapshot.step >= PERIOD

    def renew(self) -> None:
        """Keep the next good state: there are parameters that the last one lacks."""
        self.snapshot = None

    def failed(self, training: Any, place: Place, *, late: bool = False) -> bool:
        """After a loss or gradient that was not finite; whether the state went back.

        Args:
            training: `Training`.
            place: where it began.
            late: found only after updates were made with it.

        Raises:
            FitError: there is nothing left to try; the state is the last finite one.
        """
        self.streak += 1
        self.late += late
        row = HIDDEN if place.hidden else NONE if place.row is None else place.row
        count = self.strikes.setdefault(place.key, [0, row, 0])
        count[0], count[2] = count[0] + 1, training.step
        if late and self.streak < TRIES:
            self.careful = training.step + CAREFUL
            return self._back(training, place, "")
        if self.streak >= TRIES or count[0] >= TRIES or not _state_finite(training):
            self._lower(training, place)
            return True
        self.skipped += 1
        if self.skipped <= SHOWN:
            self.notes.append(f"step {training.step + 1}: {place.text}; it was left out")
        self._clean(training)
        return False

    def _lower(self, training: Any, place: Place) -> None:
        if self.snapshot is None or not self.moved or self.lowered == LOWERINGS:
            if self.snapshot is not None:
                put_back(training, self.snapshot)
            raise FitError(self._refusal(training.step, place))
        training.schedule.lower(FACTOR, training.optimizer, training.scheduler)
        self.lowered += 1
        rate = training.optimizer.param_groups[0]["lr"]
        self._back(training, place, f" and lowered the learning rate to {rate:.2g}")
        self.streak = 0
        self.strikes.clear()

    def _back(self, training: Any, place: Place, how: str) -> bool:
        """Return to the snapshot; whether there was one."""
        if self.snapshot is None:
            raise FitError(self._refusal(training.step, place))
        put_back(training, self.snapshot)
        self.moved = False
        where = f"went back to step {self.snapshot.step}"
        self.notes.append(f"step {training.step + 1}: {place.text}; {where}{how}")
        return True

    def _refusal(self, step: int, place: Place) -> str:
        kept = f"step {step + 1}: {place.text}; the parameters keep their last finite values."
        tried = row = ""
        if self.lowered:
            times = "once" if self.lowered == 1 else f"{self.lowered} times"
            tried = f" The learning rate was lowered {times} before, which did not help."
        if place.row is not None:
            row = f" Look at row {place.row} of the data: correct or drop it, if it is wrong."
        advice = "Lower lr or the guide's init_scale, or scale the data to about unit size."
        return f"{kept}{tried}{row} {advice}"

    def _forgive(self, training: Any, batches: list[Batch]) -> None:
        """Forget places that were in these batches and did not fail."""
        for key, (_, row, last) in list(self.strikes.items()):
            if row == HIDDEN:  # in these batches or in others: wait for two epochs
                seen = training.step - last > 2 * training.task.steps_per_epoch
            else:
                rows = [b.indices for b in batches]
                mine = row == NONE or any(r is None or bool((r == row).any()) for r in rows)
                seen = training.team.any(mine)
            if seen:
                del self.strikes[key]

    def _clean(self, training: Any) -> None:
        """Undo what a step that is left out has done to buffers and baselines."""
        kept = self.snapshot
        means = training.task.baseline().means
        for name in [name for name, mean in means.items() if not bool(mean.isfinite())]:
            del means[name]
            if kept is not None and name in kept.means:
                means[name] = kept.means[name]
        for name, x in training.task.params.tensors().items():
            bad = x.is_floating_point() and not bool(x.isfinite().all())
            if bad and kept is not None and name in kept.values:
                with torch.no_grad():
                    x.copy_(kept.values[name])

    def state(self) -> Tree:
        """Everything that decides what comes next, as plain data."""
        counts = ("streak", "lowered", "skipped", "late", "careful", "moved")
        state: Tree = {name: getattr(self, name) for name in counts}
        state |= {"strikes": self.strikes, "notes": self.notes}
        state["snapshot"] = None if self.snapshot is None else vars(self.snapshot)
        return state

    def restore(self, state: Mapping[str, Any], device: Any) -> None:
        """Go on from an earlier `state`.

        Args:
            state: from `state`.
            device: where parameters are.
        """
        for name in ("streak", "lowered", "skipped", "late", "careful", "moved"):
            setattr(self, name, state[name])
        self.strikes, self.notes = dict(state["strikes"]), list(state["notes"])
        kept = state["snapshot"]
        self.snapshot = None if kept is None else Snapshot(**_moved(kept, device))


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def _moved(tree: Any, device: Any) -> Any:
    """All tensors of a tree on a device, but for counters, which torch keeps on the CPU."""
    if isinstance(tree, Tensor):
        return tree.to(device) if tree.dim() else tree
    if isinstance(tree, Mapping):
        return {key: _moved(value, device) for key, value in tree.items()}
    return tree


def _state_finite(training: Any) -> bool:
    """Whether parameters and the optimiser's state are finite (buffers can be put back)."""
    leaves = leaves_in(training.optimizer)
    states = [v for p in leaves for v in training.optimizer.state.get(p, {}).values()]
    floats = [x.detach() for x in (*leaves, *states) if isinstance(x, Tensor)]
    return all_finite([x for x in floats if x.is_floating_point()])


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every number is finite, with one transfer from each device where they are.

    Args:
        tensors: of floating numbers.
    """
    tensors = [x for x in tensors if x.numel()]
    kinds = {(x.device, x.dtype) for x in tensors}
    parts = [[x for x in tensors if (x.device, x.dtype) == kind] for kind in kinds]
    return all(bool(get_total_norm(part, math.inf).isfinite()) for part in parts)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all numbers together: torch's own, without its detours where all are of a kind.

    Args:
        tensors: at least one.
    """
    if len({(x.device, x.dtype) for x in tensors}) > 1:
        return get_total_norm(tensors)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
