"""What `data=` may be: arguments of the model, in memory, on disk, or from a stream."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from pvi.engine.items import (
    ItemData,
    StreamData,
    check_sampler,
    count_rows,
    first_of_stream,
    loader_batch_size,
    read_items,
)
from pvi.engine.kinds import check_constants, check_data, check_rows_kind
from pvi.engine.numbers import whole_number
from pvi.engine.rows import (
    NO_ROWS,
    Batch,
    Data,
    as_tensor,
    check_rows,
    entries_of,
    is_rows,
    names_of,
)
from pvi.engine.sources import as_source
from pvi.engine.stored import PROBE, StoredData, is_stored, on_device
from pvi.engine.traces import preserved_rng
from pvi.errors import DataError

__all__ = ["Batch", "Data", "as_data", "as_tensor", "check_rows", "is_rows"]


def as_data(
    data: Any,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
    model: Any,
    device: Any = None,
    *,
    batch_size: int | None = None,
    num_data: int | None = None,
) -> Data:
    """Read `data=`: rows in memory become tensors, of others only a probe is read.

    Args:
        batch_size: rows in a batch, where a stream does not say it.
        num_data: rows that a stream stands for.

    Raises:
        DataError: no rows, rows of different lengths, or a stream of unknown length.
    """
    check_data(data)
    check_constants(args, kwargs)
    constants = (
        tuple(as_tensor(a, device, f"args[{i}]") for i, a in enumerate(args)),
        {k: as_tensor(v, device, k) for k, v in (kwargs or {}).items()},
    )
    if isinstance(data, TensorDataset):
        data = data.tensors
    stream = _is_stream(data)
    if num_data is not None and not stream:
        raise DataError("num_data is for streams (IterableDataset): these data know their rows")
    if stream:
        result = _streamed(data, constants, device, batch_size, num_data)
    elif isinstance(data, DataLoader | Dataset):
        result = _from_items(data, constants, device, batch_size)
    else:
        result = _from_arrays(entries_of(data), constants, device, model)
    result.names = names_of(result.entries, model)
    for key, value in result.entries.items():
        check_rows_kind(result.names[key], value)
    check_rows(result)
    return result


def _from_arrays(given: dict, constants: tuple, device: Any, model: Any) -> Data:
    """Arrays, one for each argument, in memory or on disk."""
    names, entries = names_of(given, model), {}
    for key, value in given.items():
        check_rows_kind(names[key], value)
        source = as_source(value)
        entries[key] = as_tensor(value, device, names[key]) if source is None else source
    if any(map(is_stored, entries.values())):
        return _stored(entries, constants, device, names)
    return Data(entries, *constants)


def _is_stream(data: Any) -> bool:
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(data, DataLoader) and data.batch_sampler is None:
        return True  # its items are batches of a size of their own
    known = isinstance(data, Dataset | DataLoader)
    return known and (isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"))


def _stored(sources: dict, constants: tuple, device: Any, names: dict) -> Data:
    """Arrays on disk: all arguments must have the same rows."""
    lengths = {k: len(v) for k, v in sources.items() if is_stored(v) or is_rows(v)}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"'{names[k]}' has {n}" for k, n in lengths.items())
        raise DataError(
            f"data must have the same number of rows in every argument: {listed}. {NO_ROWS}"
        )
    size = next(iter(lengths.values()))
    if size == 0:
        raise DataError(f"data is empty: argument '{names[next(iter(lengths))]}' has no rows")
    result = StoredData({}, *constants, target=device, sources=sources)
    numbers = torch.arange(min(size, PROBE), device="cpu")
    result.entries = result._placed(result._read(numbers))
    return result


def _from_items(data: Any, constants: tuple, device: Any, batch_size: int | None) -> Data:
    """A map-style data set, or a loader of one."""
    loader = data if isinstance(data, DataLoader) else None
    dataset: Any = data if loader is None else loader.dataset
    collate = default_collate if loader is None else loader.collate_fn
    size = len(dataset)
    if size == 0:
        raise DataError("data is empty: the Dataset has no items")
    if loader is not None:
        check_sampler(loader)
        batch_size = loader_batch_size(loader)
    number = min(size, PROBE, max(batch_size or 0, 8))
    with preserved_rng():
        entries = read_items(dataset, list(range(number)), collate)
    entries = {k: on_device(v, device) for k, v in entries.items()}
    return ItemData(
        entries, *constants, target=device, dataset=dataset, collate=collate, own_loader=loader
    )


def _streamed(
    data: Any, constants: tuple, device: Any, batch_size: int | None, num_data: int | None
) -> Data:
    """A stream, alone or in a loader."""
    if num_data is None:
        num_data = _length(data.dataset if isinstance(data, DataLoader) else data)
    num_data = whole_number("num_data", num_data, error=DataError)
    if not isinstance(data, DataLoader):
        if batch_size is None:
            raise DataError("an IterableDataset needs batch_size=, or a DataLoader around it")
        data = DataLoader(data, batch_size=batch_size)
    with preserved_rng():
        entries = first_of_stream(data, min(PROBE, max(data.batch_size or 0, 8)))
    rows = data.batch_size
    if rows is None:
        with preserved_rng():
            rows = count_rows(first_of_stream(data, 1))
    entries = {k: on_device(v, device) for k, v in entries.items()}
    return StreamData(
        entries,
        *constants,
        target=device,
        num_data=num_data,
        source=data,
        rows_in_batch=min(rows, num_data),
    )


def _length(stream: Any) -> int:
    """Rows of a stream that says how many it has."""
    try:
        if isinstance(stream, IterableDataset):
            return len(stream)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise DataError(
        "data is a stream of unknown length, so its log-likelihood can't be scaled to the whole. "
        "Say how many rows it stands for: num_data=, or a method __len__ of the stream."
    )
