"""The compiled unit: loss, record and gradients of a step as a function of tensors alone.

$$(\\phi, b, x, w) \\mapsto (L, \\nabla_\\phi L, b')$$
with parameters, buffers, a batch and KL weights; random numbers come from torch's stream as in the
program itself, so that a graph and its program agree step by step up to rounding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from pvi.compiled.capture import differences, trace
from pvi.compiled.errors import NotCompilable
from pvi.compiled.passes import functional
from pvi.compiled.python_state import moved, numbers
from pvi.engine.data import Batch
from pvi.engine.objective import Evaluation
from pvi.engine.traces import preserved_rng

TOLERANCE = 1e-4  # of a compiled number, relative to the largest one of its tensor
ROUNDING = 1e-5  # relative to the largest of all: of gradients that are sums of zero
MOVE = 0.03  # how far parameters are moved for the second look, relative to their size


@dataclass
class Source:
    """What is compiled.

    Args:
        evaluate: from a batch and KL weights (0-dim tensors) to an evaluation.
        leaves: parameters, by name.
        buffers: of the modules; the programs may change them.
        programs: where to look for numbers in Python.
        fixed: whether every batch is the same.
    """

    evaluate: Callable[[Batch, Sequence[Tensor]], Evaluation]
    leaves: dict[str, Tensor]
    buffers: list[Tensor]
    programs: tuple
    fixed: bool


@dataclass
class Unit:
    """A step as a graph: inputs are leaves, buffers, the batch's tensors and the KL weights;
    outputs the record `(R,)`, a gradient for each trained leaf, and the buffers that change.

    Args:
        graph: the operations.
        names: of the numbers in the record.
        trained: positions of the leaves that the loss depends on.
        changed: positions of the buffers that the programs change.
        signature: what a batch must look like.
    """

    source: Source
    graph: fx.GraphModule
    names: tuple[str, ...]
    trained: list[int]
    changed: list[int]
    signature: tuple

    def inputs(self, batch: Batch, weights: Sequence[Tensor]) -> list[Tensor]:
        """The live tensors of a step in the graph's order."""
        return _inputs(self.source, batch, weights)[0]

    def fits(self, batch: Batch) -> bool:
        """Whether a batch has the shapes that the graph was made for."""
        return signature(batch) == self.signature


def tensors_of(batch: Batch) -> list[Tensor]:
    """The tensors of a batch, row numbers last."""
    leaves = tree_flatten((batch.args, batch.kwargs, batch.indices))[0]
    return [x for x in leaves if isinstance(x, Tensor)]


def signature(batch: Batch) -> tuple:
    """Shapes and types of a batch's tensors, and all else that it holds."""
    leaves, spec = tree_flatten((batch.args, batch.kwargs, batch.indices))
    parts = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves]
    return (str(spec), *parts, batch.size)


def make_unit(source: Source, probes: Sequence[tuple[Batch, Sequence[float]]]) -> Unit:
    """Capture a step, and check that nothing that changes from step to step is baked in.

    Args:
        probes: a batch and KL weights of two steps, better different ones.

    Raises:
        NotCompilable: naming the site or line.
    """
    kept = _Kept(source)
    names: list[tuple[str, ...]] = []
    used: list[list[int]] = []
    graphs: list[fx.GraphModule] = []
    given: list[Tensor] = []
    before = numbers(*source.programs)
    for attempt, (batch, values) in enumerate(probes):
        weights = [torch.tensor(v) for v in values]
        given, fixed = _inputs(source, batch, weights)

        def step(batch: Batch = batch, weights: Sequence[Tensor] = weights) -> list[Tensor]:
            record, grads = loss_and_gradients(source, batch, weights)
            names.append(record[0])
            used.append([i for i, g in enumerate(grads) if g is not None])
            return [record[1], *(g for g in grads if g is not None)]

        try:
            if attempt:
                kept.move()
            graphs.append(trace(step, given, fixed))
        finally:
            kept.put_back()
    counter = moved(before, numbers(*source.programs))
    if counter:
        raise NotCompilable(f"the programs change '{counter}' each time they are run")
    if len(set(names)) > 1 or len(set(map(tuple, used))) > 1:
        raise NotCompilable("what is recorded, or which parameters matter, changes between steps")
    found = differences(*graphs) if len(graphs) > 1 else ""
    if found:
        raise NotCompilable(found)
    first = len(source.leaves)
    changing = range(first, first + len(source.buffers))
    try:
        graph, changed = functional(graphs[-1], given, changing)
    except RuntimeError as error:
        text = str(error).splitlines()[0][:160]
        raise NotCompilable(f"the graph can't be made free of mutation ({text})") from error
    return Unit(source, graph, names[0], used[0], changed, signature(probes[-1][0]))


def loss_and_gradients(
    source: Source, batch: Batch, weights: Sequence[Tensor]
) -> tuple[tuple[tuple[str, ...], Tensor], list[Tensor | None]]:
    """A step run by the programs themselves: names and numbers of the record, and gradients."""
    with torch.enable_grad():
        value = source.evaluate(batch, weights)
        record = value.stacked()
        leaves = list(source.leaves.values())
        grads = torch.autograd.grad(value.loss, leaves, allow_unused=True)
    return record, list(grads)


def check(
    unit: Unit, function: Callable[[Batch, Sequence[Tensor]], Sequence[Tensor]], probe: tuple
) -> bool:
    """Compare a compiled step with the program on the same random numbers; whether that tells
    anything, for it does not where the program's own numbers are not finite.

    Args:
        function: from a batch and KL weights to what the unit's graph gives.
        probe: a batch and KL weights.

    Raises:
        NotCompilable: they differ, or draw differently.
    """
    batch, weights = probe[0], [torch.tensor(v) for v in probe[1]]
    kept = _Kept(unit.source)
    with preserved_rng():
        start = torch.get_rng_state()
        (_, record), grads = loss_and_gradients(unit.source, batch, weights)
        expected = [record, *(g for g in grads if g is not None)]
        expected += [b.detach().clone() for b in buffers(unit)]
        end = torch.get_rng_state()
        kept.put_back()
        torch.set_rng_state(start)
        with torch.no_grad():
            found = function(batch, weights)
        if not torch.equal(torch.get_rng_state(), end):
            raise NotCompilable("the compiled step draws other random numbers than the program")
    labels = ["record", *(list(unit.source.leaves)[i] for i in unit.trained)]
    labels += ["a buffer"] * len(unit.changed)
    largest = max(map(_size, expected))
    if not math.isfinite(largest):
        return False
    for label, a, b in zip(labels, expected, found, strict=True):
        scale, worst = _size(a), _size(a.detach().double() - b.double())
        if not worst <= TOLERANCE * scale + ROUNDING * largest:
            raise NotCompilable(
                f"the compiled step differs from the program by {worst:.2g} (of {scale:.2g}) in "
                f"'{label}'"
            )
    return True


def _size(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def _inputs(
    source: Source, batch: Batch, weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """All inputs in order, and those of them that never change; each tensor once."""
    data, buffers = tensors_of(batch), source.buffers
    unique = list({id(x): x for x in data}.values())
    if len(unique) != len(data):
        raise NotCompilable("the model is given the same tensor twice")
    inputs = [*source.leaves.values(), *buffers, *data, *weights]
    return inputs, unique if source.fixed else []


class _Kept:
    """Parameters and buffers, to be moved and put back."""

    def __init__(self, source: Source):
        self._leaves, self._buffers = list(source.leaves.values()), source.buffers
        self._values = [x.detach().clone() for x in (*self._leaves, *self._buffers)]

    def move(self) -> None:
        """Other values for the parameters, and other random numbers to come."""
        with torch.no_grad(), preserved_rng():
            torch.manual_seed(0)
            for x in self._leaves:
                x.add_(MOVE * (x.abs() + MOVE) * torch.randn_like(x))

    def put_back(self) -> None:
        with torch.no_grad():
            for x, value in zip((*self._leaves, *self._buffers), self._values, strict=True):
                x.copy_(value)


def live(unit: Unit) -> list[Tensor]:
    """The parameters that the loss depends on."""
    leaves = list(unit.source.leaves.values())
    return [leaves[i] for i in unit.trained]


def buffers(unit: Unit) -> list[Tensor]:
    """The buffers that the programs change."""
    return [unit.source.buffers[i] for i in unit.changed]
