"""The model's arguments for new data, and which latents can follow them."""

from collections.abc import Mapping
from typing import Any

from pvi.engine.checks import check_values, raise_first, signature_problems
from pvi.engine.data import Data, as_tensor, check_rows, is_rows
from pvi.engine.traces import Program, free, plates_of, run_hidden, sample_nodes, subset
from pvi.errors import DataError, GuideError


def new_arguments(
    model: Program, data: Data, new_data: tuple, new_kwargs: Mapping
) -> tuple[tuple, dict[str, Any], dict[str, Any]]:
    """Positional and keyword arguments for new rows, and all by name; rows that were not given
    become `None`.

    Raises:
        DataError: more positional arguments than the training data had, one twice, or one that
            the model lacks; rows of another kind.
    """
    if not new_data and not new_kwargs:
        return *data.whole(), data.named()
    device, keys = data.device, list(data.entries)
    _check_count(data, new_data)
    entries: dict = dict.fromkeys(keys)
    for key, value in zip(keys, new_data, strict=False):
        entries[key] = as_tensor(value, device, data.names[key])
    by_name = {data.names[k]: k for k in keys}
    for name, value in new_kwargs.items():
        if by_name.get(name) in keys[: len(new_data)]:
            raise DataError(f"predict got argument '{name}' twice, by place and by name")
        entries[by_name.get(name, name)] = as_tensor(value, device, name)
    constants = {k: v for k, v in data.kwargs.items() if k not in new_kwargs}
    names = data.names | {k: str(k) for k in entries if k not in data.names}
    new = Data(entries, data.args, constants, names)
    raise_first(signature_problems("model", model, *new.whole()))
    check_rows(new)
    _check_dimensions(data, new)
    check_values({name: v for name, v in new.named().items() if v is not None})
    return *new.whole(), new.named()


def _check_count(data: Data, new_data: tuple) -> None:
    keys = list(data.entries)
    if new_data and any(isinstance(key, str) for key in keys):
        raise DataError(
            f"the data were given by name, so give new data by name too: predict({keys[0]}=...)"
        )
    if len(new_data) > len(keys):
        raise DataError(
            f"predict got {len(new_data)} arguments, but the data had {len(keys)}: "
            f"{[data.names[k] for k in keys]}. Constants from args= are filled in by themselves."
        )


def _check_dimensions(data: Data, new: Data) -> None:
    """A row must have as many dimensions as in the fit: a column is no vector."""
    for key, rows in data.entries.items():
        value = new.entries[key]
        if is_rows(rows) and is_rows(value) and rows.dim() != value.dim():
            raise DataError(
                f"argument '{data.names[key]}' has rows of shape {tuple(value.shape[1:])}, but "
                f"those of the fit have {tuple(rows.shape[1:])}. Reshape it: a column needs "
                ".squeeze(-1)."
            )


def check_plates(
    model: Program, guide: Program, args: tuple, kwargs: Mapping, named: Mapping[str, Any]
) -> None:
    """Refuse new data whose plates have another size than the guide's own latents.

    Raises:
        GuideError: naming the site.
    """
    left = [name for name, value in named.items() if value is None]
    guide_trace = _run_new("guide", guide, args, kwargs, left)
    guide_nodes = sample_nodes(guide_trace)
    shared = [name for name, node in guide_nodes.items() if not plates_of(node)]
    given = subset(guide_trace, shared, indices=False)
    model_nodes = sample_nodes(_run_new("model", free(model), args, kwargs, left, given))
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


def _run_new(
    role: str, program: Program, args: tuple, kwargs: Mapping, left: list[str], given: Any = None
) -> Any:
    try:
        return run_hidden(program, args, kwargs, given)
    except (TypeError, AttributeError, RuntimeError) as error:
        names = ", ".join(f"'{name}'" for name in left)
        gone = f"predict was not given {names}, which is None there. " if names else ""
        raise DataError(
            f"the {role} can't run on these new data ({str(error).splitlines()[0]}). {gone}"
            "Arguments that were left out, such as the outcome, must be given, or the program "
            "must do without (use len(x), not len(y)). Constants of one value for each training "
            "row can't be reused."
        ) from error
