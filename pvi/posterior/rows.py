"""The posterior of single rows: which plates are theirs, and both programs on some of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvi.engine.data import Data
from pvi.engine.items import StreamData
from pvi.engine.subsampling import plate_frames
from pvi.engine.traces import (
    Program,
    density,
    is_subsample,
    preserved_rng,
    replaced,
    run,
    run_hidden,
    sample_nodes,
    subset,
)
from pvi.errors import DataError

PROBE = 8  # rows that a program is tried on
MEAN_DRAWS = 100  # of distributions that do not know their mean


def row_plates(model: Program, data: Data) -> frozenset[str]:
    """The plates that grow with the data, by tracing two numbers of rows.

    Where the model runs on its own number only: those of as many elements as there are rows.
    """
    rows = torch.arange(min(data.shown, PROBE), device=data.device)
    if not len(rows):
        return frozenset()
    try:
        one, two = (_frames(model, data, r) for r in (rows, torch.cat([rows, rows[:1]])))
    except Exception:  # whatever a program raises on other rows than those it is made for
        found = _frames(model, data, torch.arange(data.shown, device=data.device))
        return frozenset(name for name in found if found[name][0] == data.shown)
    sizes = (len(rows), len(rows) + 1)
    both = one.keys() & two.keys()
    return frozenset(name for name in both if (one[name][0], two[name][0]) == sizes)


def _frames(model: Program, data: Data, rows: Tensor) -> Mapping[str, tuple]:
    return plate_frames(sample_nodes(run_hidden(model, *data.rows(rows))))


class RowWise:
    """Guide and model on some rows of a posterior's data. Use it inside `posterior.drawing`.

    Attributes:
        plates: names of the rows' plates.
        whole: the guide must see all rows at once: it has parameters for each, or mixes them.

    Raises:
        DataError: there are no rows, or they come from a stream, which can't be asked for some.
    """

    def __init__(self, posterior: Any):
        self.model, self.guide, self.data = posterior.model, posterior.guide, posterior.data
        if self.data.size == 0:
            raise DataError("this needs data with rows: data=, as in pvi.fit")
        if isinstance(self.data, StreamData):
            raise DataError("this needs rows that can be asked for; a stream's can't: data=rows")
        self.plates = row_plates(self.model, self.data)
        self.whole = not self._follows()

    @property
    def size(self) -> int:
        return self.data.size

    def dim(self, node: Mapping) -> int | None:
        """The dimension of the rows in a site's batch, from the right; `None` outside of them."""
        dims = [f.dim for f in node["cond_indep_stack"] if f.name in self.plates]
        return next((dim for dim in dims if dim is not None), None)

    def arguments(self, rows: Tensor) -> tuple[tuple, Mapping]:
        return self.data.whole() if self._is_all(rows) else self.data.rows(rows)

    def draw(self, rows: Tensor, *, mean: bool = False) -> dict[str, Tensor]:
        """A draw of the guide's sites for these rows, or their means, each given those before it.

        Discrete sites have their mode for a mean.
        """
        every = torch.arange(self.size, device=rows.device) if self.whole else rows
        args, kwargs = self.arguments(every)
        trace = run(self.guide, args, kwargs)
        for name in sample_nodes(trace) if mean else ():
            trace = run(
                self.guide, args, kwargs, replaced(trace, {name: centre(trace.nodes[name])})
            )
        nodes = sample_nodes(trace)
        if not self.whole:
            return {name: node["value"] for name, node in nodes.items()}
        return {name: self._at(node, rows) for name, node in nodes.items()}

    def run(self, rows: Tensor, values: Mapping[str, Tensor], model: Any = None) -> Any:
        """The model's trace for these rows, at the values of latents."""
        args, kwargs = self.arguments(rows)
        model = self.model if model is None else model
        empty = run(model, args, kwargs)
        names = [name for name in values if name in empty.nodes]
        return run(model, args, kwargs, subset(replaced(empty, values), names, indices=False))

    def _is_all(self, rows: Tensor) -> bool:
        return len(rows) == self.size and bool((rows.diff() == 1).all())

    def _at(self, node: Mapping, rows: Tensor) -> Tensor:
        dim = self.dim(node)
        if dim is None:
            return node["value"]
        return node["value"].index_select(dim - node["fn"].event_dim, rows)

    def _follows(self) -> bool:
        """Whether the guide says the same of some rows, whichever other rows it sees."""
        count = min(self.data.shown, 2 * PROBE)
        rows = torch.arange(count, device=self.data.device)
        part = rows[count // 2 :]
        try:
            first = run_hidden(self.guide, *self.data.rows(rows))
            nodes = sample_nodes(first)
            values = {name: self._at(node, part) for name, node in nodes.items()}
            given = subset(replaced(first, values), nodes, indices=False)
            args, kwargs = self.data.rows(part)
            second = sample_nodes(run_hidden(self.guide, args, kwargs, given))
            return all(self._same(nodes[n], second[n], part) for n in nodes)
        except Exception:  # such as shapes that do not fit
            return False

    def _same(self, one: Mapping, two: Mapping, rows: Tensor) -> bool:
        a, b = (density(node).log_prob() for node in (one, two))
        dim = self.dim(one)
        a = a if dim is None else a.index_select(dim, rows)
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def centre(node: Mapping) -> Tensor:
    """The mean of a site's distribution, by draws where it has no closed form; of discrete ones
    the mode.
    """
    fn, value = node["fn"], node["value"]
    if is_subsample(node):
        return value
    try:
        found = fn.mean if value.is_floating_point() and not is_discrete(fn) else fn.mode
        return found.to(value.dtype).expand(value.shape)
    except NotImplementedError:
        if is_discrete(fn):
            return value
    with preserved_rng():
        return torch.stack([fn.sample().expand(value.shape) for _ in range(MEAN_DRAWS)]).mean(0)


def is_discrete(fn: Any) -> bool:
    return bool(getattr(fn.support, "is_discrete", False))
