"""The model's arguments for new data, and which latents can follow them."""

from collections.abc import Mapping
from typing import Any

from pyro import poutine

from pvi.engine.data import Data, as_tensor
from pvi.engine.traces import Program, plates_of, run_hidden, sample_nodes, subset
from pvi.errors import DataError, GuideError


def new_arguments(data: Data, new_data: tuple, new_kwargs: Mapping) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments for new rows; rows that were not given become `None`.

    Raises:
        DataError: more positional arguments than the training data had.
    """
    if not new_data and not new_kwargs:
        return data.whole()
    device = data.device
    keys = list(data.entries)
    if len(new_data) > len(keys):
        raise DataError(
            f"predict got {len(new_data)} arguments, but the data had {len(keys)}: "
            f"{[data.names[k] for k in keys]}. Constants from args= are filled in by themselves."
        )
    entries: dict = dict.fromkeys(keys)
    for key, value in zip(keys, new_data, strict=False):
        entries[key] = as_tensor(value, device)
    by_name = {data.names[k]: k for k in keys}
    for name, value in new_kwargs.items():
        entries[by_name.get(name, name)] = as_tensor(value, device)
    return Data(entries, data.args, data.kwargs, data.names).whole()


def check_rows(model: Program, guide: Program, args: tuple, kwargs: Mapping) -> None:
    """Refuse new data whose plates have another size than the guide's own latents.

    Raises:
        GuideError: naming the site.
    """
    guide_trace = run_hidden(guide, args, kwargs)
    guide_nodes = sample_nodes(guide_trace)
    shared = [name for name, node in guide_nodes.items() if not plates_of(node)]
    free = poutine.uncondition(model)
    model_nodes = sample_nodes(
        run_hidden(free, args, kwargs, subset(guide_trace, shared, indices=False))
    )
    for name, node in guide_nodes.items():
        if name not in model_nodes:
            continue
        sizes = {p.name: p.size for p in plates_of(model_nodes[name])}
        for plate in plates_of(node):
            if sizes.get(plate.name, plate.size) != plate.size:
                raise GuideError(
                    f"site '{name}' belongs to the {plate.size} rows of plate '{plate.name}' that "
                    f"the guide was fitted to; the new data have {sizes[plate.name]}. Use a guide "
                    "that computes it from the data (an encoder), or fit again with the new rows."
                )
