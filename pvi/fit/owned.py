"""Does a guide own parameters for each row of the data? Then a probe of rows can't set it up."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide

from pvi.engine.data import Data
from pvi.engine.params import Params
from pvi.engine.subsampling import Minibatch, plate_frames
from pvi.engine.traces import Program, preserved_rng, run_hidden, sample_nodes
from pvi.errors import GuideError
from pvi.guides import Guide, Laplace


def for_guide(data: Data, model: Program, guide: Program) -> Data:
    """The data as this guide needs them: as they are, or with all rows in memory.

    A guide that has a row of parameters for each row of the data is as large as they are, and is
    set up on all of them; `Laplace` takes its one look at all of them.

    Raises:
        GuideError: it has rows of its own, but the data come from a loader or a stream.
    """
    if isinstance(guide, Guide) and any(isinstance(part, Laplace) for part in guide.modules()):
        return data.loaded()
    owner = row_parameter(data, model, guide)
    if not owner:
        return data
    if data.numbered:
        return data.loaded()
    if isinstance(guide, Guide | AutoGuide):
        return data  # refused with the name of its plate, once that is known
    raise GuideError(
        f"the guide has parameters for each row of the data ('{owner}'), but a DataLoader or a "
        "stream does not say which rows it gives. Pass the map-style Dataset or arrays as data, "
        "with batch_size."
    )


def row_parameter(data: Data, model: Program, guide: Program) -> str:
    """The name of a parameter with a row for each row of the data; "" if there is none."""
    if isinstance(guide, Guide) and data.size in guide.plate_sizes.values():
        return "its plate of all rows"
    number = data.shown
    if number < 2:
        return ""
    one, two = (_shapes(data, model, guide, rows) for rows in (number, number // 2))
    named = (n for n, shape in one.items() if n in two and two[n] != shape)
    found = next(named, "")
    if found or data.numbered or isinstance(guide, Guide):  # those of ours know their plates
        return found
    tables = (n for n, shape in one.items() if shape[:1] == (data.size,))
    return next((n for n in tables if _reads_numbers(data, model, guide, n)), "")


def _shapes(data: Data, model: Program, guide: Program, rows: int) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the parameters that a copy of the guide creates on some rows; none if it fails,
    for the checks that come say it better.
    """
    try:
        fresh, params, _ = _copied(model, guide, data.rows(torch.arange(rows)))
        own = f"{fresh._pyro_name}." if isinstance(fresh, Guide) else ""  # each copy has another
        return {name.removeprefix(own): tuple(x.shape) for name, x in params.named().items()}
    except Exception:
        return {}


def _reads_numbers(data: Data, model: Program, guide: Program, table: str) -> bool:
    """Whether the guide draws other values where the same rows have other numbers, by a parameter
    that may also have as many rows as the data by chance.
    """
    number = data.shown // 2
    given = data.rows(torch.arange(number))
    with preserved_rng():
        fresh, params, trace = _copied(model, guide, given)
        params.named()[table].data.normal_()  # rows that are alike would tell nothing
        frames = plate_frames(sample_nodes(trace))
        batch = Minibatch((p for p, f in frames.items() if f[0] == number), data.size, feed=True)
        drawn = []
        for start in (0, data.size - number):
            batch.indices = torch.arange(start, start + number)
            torch.manual_seed(0)
            with params.scope(), params.evaluation():
                drawn.append(sample_nodes(run_hidden(batch(fresh), *given)))
    return any(not torch.equal(n["value"], drawn[1][name]["value"]) for name, n in drawn[0].items())


def _copied(model: Program, guide: Program, rows: Any) -> tuple[Any, Params, Any]:
    """A copy of the guide after a run on some rows: itself, its parameters, and the trace."""
    own = getattr(guide, "model", None)
    fresh: Any = copy.deepcopy(guide, {id(own): own, id(model): model})
    if isinstance(fresh, Guide) and not guide.latents:  # type: ignore[attr-defined]
        fresh.init_loc_fn = "median"
    params = Params(model, fresh)
    with params.scope(), params.evaluation():
        trace = run_hidden(fresh, *rows)
        run_hidden(model, *rows, given=trace)
    return fresh, params, trace
