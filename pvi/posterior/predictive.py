"""The model's arguments for new data, and which latents can follow them."""

from collections.abc import Mapping
from typing import Any

from pvi.engine.checks import check_finite
from pvi.engine.data import Data, as_tensor, check_rows
from pvi.engine.traces import Program, free, plates_of, run_hidden, sample_nodes, subset
from pvi.errors import DataError, GuideError


def new_arguments(data: Data, new_data: tuple, new_kwargs: Mapping) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments for new rows; rows that were not given become `None`.

    Raises:
        DataError: more positional arguments than the training data had.
    """
    if not new_data and not new_kwargs:
        return data.whole()
    device, keys = data.device, list(data.entries)
    if new_data and any(isinstance(key, str) for key in keys):
        raise DataError(
            f"the data were given by name, so give new data by name too: predict({keys[0]}=...)"
        )
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
    constants = {k: v for k, v in data.kwargs.items() if k not in new_kwargs}
    new = Data(entries, data.args, constants, data.names)
    check_rows(new)
    check_finite({name: v for name, v in new.named().items() if v is not None})
    return new.whole()


def check_plates(model: Program, guide: Program, args: tuple, kwargs: Mapping) -> None:
    """Refuse new data whose plates have another size than the guide's own latents.

    Raises:
        GuideError: naming the site.
    """
    guide_trace = _run_new("guide", guide, args, kwargs)
    guide_nodes = sample_nodes(guide_trace)
    shared = [name for name, node in guide_nodes.items() if not plates_of(node)]
    given = subset(guide_trace, shared, indices=False)
    model_nodes = sample_nodes(_run_new("model", free(model), args, kwargs, given))
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


def _run_new(role: str, program: Program, args: tuple, kwargs: Mapping, given: Any = None) -> Any:
    try:
        return run_hidden(program, args, kwargs, given)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise DataError(
            f"the {role} can't run on these new data ({str(error).splitlines()[0]}). Arguments "
            "that were left out, such as the outcome, are None there: give them, or let the "
            "program do without (use len(x), not len(y)). Constants of one value for each training "
            "row can't be reused."
        ) from error
