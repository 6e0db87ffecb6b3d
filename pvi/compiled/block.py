"""Many steps of Adam in one call: the captured step and its update in a loop of compiled code.

$$m \\leftarrow b_1 m + (1-b_1) g, \\quad v \\leftarrow b_2 v + (1-b_2) g^2, \\quad
\\phi \\leftarrow \\phi - \\frac{r\\,m}{(1-b_1^t)\\,(\\sqrt{v / (1-b_2^t)} + \\epsilon)}$$
All parameters are one vector here. Nothing is changed in place, so that steps that end badly can be
forgotten.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from pvi.compiled.backend import compiled
from pvi.compiled.errors import NotCompilable
from pvi.compiled.unit import Unit, live, tensors_of
from pvi.engine.data import Batch

STEPS = 500  # the most in a call
SIZE, ROOT, CLIP, SHARE, WEIGHTS = range(5)  # columns of a plan; KL weights are the last ones


class State(NamedTuple):
    """Parameters, Adam's two averages, and an average of the parameters over steps, `(P,)`."""

    values: Tensor
    mean: Tensor
    square: Tensor
    average: Tensor


@dataclass(frozen=True)
class Adam:
    """The numbers of an optimiser that don't change.

    Args:
        rates: of each number in the parameters `(P,)`, to be multiplied by those of a plan.
    """

    rates: Tensor
    betas: tuple[float, float]
    eps: float


class Block:
    """Up to `STEPS` steps of one unit.

    Args:
        unit: whose programs change no buffers.
        adam: the optimiser.
        whole: the batch of all rows, from which others are picked by their row numbers.
        batch: one of the batches.
        backend: "graph" or "inductor".

    Raises:
        NotCompilable: the unit can't be run in blocks.
    """

    def __init__(self, unit: Unit, adam: Adam, whole: Batch, batch: Batch, backend: str):
        leaves = live(unit)
        if unit.changed:
            raise NotCompilable("the programs change buffers")
        if len({x.dtype for x in leaves}) > 1:
            raise NotCompilable("parameters have different dtypes")
        self._unit, self._adam = unit, adam
        self._data, self._picked = _sources(whole, batch)
        step = self._make_step()
        loop = _make_loop(step)
        self._loop = _repeat(step) if backend == "graph" else compiled(loop, own_code=True)

    def run(self, state: State, plan: Tensor, indices: Tensor | None) -> tuple[State, Tensor]:
        """As many steps as the plan has.

        Args:
            plan: for each step the factor on the rates, the root of 1 - b2^t, the longest gradient,
                its share in the average, and the KL weights `(n, 4 + W)`.
            indices: row numbers of the batches `(n, B)`; `None` for the whole data.

        Returns:
            The state after them, and what each has recorded, with the norm of its gradient last
            `(n, R + 1)`.
        """
        n = len(plan)
        rows = torch.zeros(n, 0, dtype=torch.long) if indices is None else indices
        record = plan.new_zeros(STEPS, len(self._unit.names) + 1)
        trained = set(self._unit.trained)
        leaves = enumerate(self._unit.source.leaves.values())
        fixed = [x.detach() for i, x in leaves if i not in trained]
        fixed += [*self._unit.source.buffers, *self._data, self._adam.rates]
        with torch.no_grad():
            *found, record = self._loop(
                torch.tensor(n), list(state), record, _padded(plan), _padded(rows), fixed
            )
        return State(*found), record[:n]

    def gradients(self, batch: Batch, weights: Sequence[Tensor]) -> list[Tensor]:
        """The record and the gradients of a single step, without clipping, as a unit gives them."""
        values = torch.cat([x.detach().reshape(-1) for x in live(self._unit)])
        zeros = (torch.zeros_like(values) for _ in range(3))  # none may be another
        plan = values.new_tensor([[1.0, 1.0, torch.inf, 1.0, *map(float, weights)]])
        rows = None if batch.indices is None else batch.indices.unsqueeze(0)
        state, record = self.run(State(values, *zeros), plan, rows)
        grads = state.mean / (1.0 - self._adam.betas[0])
        return [record[0, :-1], *self.split(grads)]

    def split(self, flat: Tensor) -> list[Tensor]:
        """A vector `(P,)` in the shapes of the parameters that are trained."""
        leaves = live(self._unit)
        parts = flat.split([x.numel() for x in leaves])
        return [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]

    def _make_step(self) -> Callable[..., list[Tensor]]:
        """One step, as a function that a compiler can read: of tensors and plain numbers alone."""
        unit, (b1, b2), eps = self._unit, self._adam.betas, self._adam.eps
        graph, picked = unit.graph, self._picked
        leaves = live(unit)
        shapes, sizes = [list(x.shape) for x in leaves], [x.numel() for x in leaves]
        order = {at: i for i, at in enumerate(unit.trained)}
        places = [order.get(i) for i in range(len(unit.source.leaves))]
        buffers, kind = len(unit.source.buffers), torch.get_default_dtype()

        def step(state: list[Tensor], plan: Tensor, rows: Tensor, fixed: list[Tensor]) -> list:
            values, mean, square, average = state
            parts = [x.reshape(s) for x, s in zip(values.split(sizes), shapes)]  # noqa: B905
            given = iter(fixed)
            inputs = [next(given) if p is None else parts[p] for p in places]
            inputs += [next(given) for _ in range(buffers)]
            for pick in picked:
                x = rows if pick is None else next(given)
                inputs.append(x.index_select(0, rows) if pick else x)
            inputs += [x.to(kind) for x in plan[WEIGHTS:].unbind()]
            record, *grads = graph(*inputs)
            grad = torch.cat([x.reshape(-1) for x in grads])
            norm = torch.linalg.vector_norm(grad)
            grad = grad * (plan[CLIP] / (norm + 1e-6)).clamp(max=1.0)
            mean = b1 * mean + (1.0 - b1) * grad
            square = b2 * square + (1.0 - b2) * grad * grad
            move = plan[SIZE] * mean / (square.sqrt() / plan[ROOT] + eps)
            values = values - next(given) * move
            average = torch.lerp(average, values, plan[SHARE])
            return [values, mean, square, average, torch.cat([record, norm.reshape(1)])]

        return step


def _make_loop(step: Callable[..., list[Tensor]]) -> Callable[..., tuple]:
    """The steps of a plan as one function for a compiler, which needs all their number but `n`."""

    def loop(
        n: Tensor, state: list[Tensor], record: Tensor, plan: Tensor, rows: Tensor, fixed: list
    ) -> tuple:
        def more(i: Tensor, *_: Tensor) -> Tensor:
            return i < n

        def body(i: Tensor, *carried: Tensor) -> tuple:
            *state, record = carried
            at = i.reshape(1)
            now, picked = (x.index_select(0, at).squeeze(0) for x in (plan, rows))
            *state, row = step(state, now, picked, fixed)
            record = record.index_copy(0, at, row.unsqueeze(0).to(record.dtype))
            return i + 1, *(x.clone() for x in state), record.clone()

        start = torch.zeros((), dtype=torch.long)
        return while_loop(more, body, (start, *state, record))[1:]

    return loop


def _repeat(step: Callable[..., list[Tensor]]) -> Callable[..., tuple]:
    """The same, operation by operation."""

    def loop(
        n: Tensor, state: list[Tensor], record: Tensor, plan: Tensor, rows: Tensor, fixed: list
    ) -> tuple:
        for i in range(int(n)):
            *state, record[i] = step(state, plan[i], rows[i], fixed)
        return *state, record

    return loop


def _sources(whole: Batch, batch: Batch) -> tuple[list[Tensor], list[bool | None]]:
    """Where the tensors of batches come from: those of the whole data, and for each tensor of a
    batch whether it is rows of one of them; `None` for the row numbers.
    """
    everything, own = tensors_of(whole), tensors_of(batch)
    if batch.indices is None:
        return everything, [False] * len(everything)
    picked: list[bool | None] = []
    for all_rows, x in zip(everything, own, strict=False):
        picked.append(all_rows is not x)
        if all_rows is not x and not torch.equal(all_rows[batch.indices], x):
            raise NotCompilable("batches are not rows of the data")
    return everything, [*picked, None]


def _padded(x: Tensor) -> Tensor:
    """The same with `STEPS` rows, as the loop is compiled for."""
    return torch.cat([x, x.new_zeros(STEPS - len(x), *x.shape[1:])])
