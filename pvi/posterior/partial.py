"""What a posterior can say when the rows of its data are too many to be in memory."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pvi.engine.data import Data
from pvi.engine.traces import Program, deterministic_nodes, run_hidden, sample_nodes
from pvi.errors import DataError


def caveat(data: Data) -> str:
    """Why there are no log weights."""
    return (
        f"the log density of {data.size:,} rows needs all of them, but they are read in pieces "
        "(tensors as data have them in memory)"
    )


def row_sites(model: Program, guide: Program, data: Data) -> frozenset[str]:
    """Sites whose shape follows the number of rows, by tracing two numbers."""
    one, two = (_shapes(model, guide, data, n) for n in (data.shown, max(data.shown // 2, 1)))
    return frozenset(name for name in one if one[name] != two.get(name))


def _shapes(model: Program, guide: Program, data: Data, rows: int) -> Mapping[str, torch.Size]:
    args, kwargs = data.rows(torch.arange(rows))
    trace = run_hidden(model, args, kwargs, run_hidden(guide, args, kwargs))
    nodes = sample_nodes(trace) | deterministic_nodes(trace)
    return {name: node["value"].shape for name, node in nodes.items()}


def without_rows(values: dict[str, Tensor], own: frozenset[str]) -> dict[str, Tensor]:
    """The draws that belong to no single row.

    Raises:
        DataError: there is nothing else.
    """
    rest = {name: value for name, value in values.items() if name not in own}
    if values and not rest:
        raise DataError(
            f"all sites ({sorted(values)}) belong to rows of the data, which are read in pieces. "
            "Say for which rows: fit.posterior.on(rows)."
        )
    return rest
