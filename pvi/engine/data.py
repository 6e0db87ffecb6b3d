"""What `data=` may be, as arguments of the model, whole or in minibatches."""

import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from pvi.engine.kinds import array_of, check_constants, check_data, check_rows_kind
from pvi.errors import DataError

Key = int | str


@dataclass(frozen=True)
class Batch:
    """Arguments for some rows, and the rows' numbers; `None` for all rows in order.

    Args:
        size: how many rows the batch stands for.
    """

    args: tuple
    kwargs: dict[str, Any]
    indices: Tensor | None
    size: int


@dataclass
class Data:
    """Rows (tensors of one length) and constants that together are the model's arguments.

    Args:
        entries: positional (0, 1, ...) and keyword arguments from `data=`.
        args, kwargs: the arguments that are not rows.
        names: the model's name of each entry.
        loader: where batches come from a user's `DataLoader` instead.
    """

    entries: dict[Key, Any]
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    names: dict[Key, str] = field(default_factory=dict)
    loader: DataLoader | None = None

    @property
    def size(self) -> int:
        """Number of rows; 0 if there are none."""
        return next((len(v) for v in self.entries.values() if is_rows(v)), 0)

    @property
    def device(self) -> Any:
        """Where the rows are."""
        return next((v.device for v in self.entries.values() if is_rows(v)), None)

    def named(self) -> dict[str, Any]:
        """Data and constants by the model's argument names."""
        extra = {f"args[{i}]": v for i, v in enumerate(self.args)}
        return (
            {self.names.get(k, str(k)): v for k, v in self.entries.items()}
            | extra
            | dict(self.kwargs)
        )

    def fingerprint(self) -> dict[str, Any]:
        """Shape, dtype and checksum of each tensor; a loader's rows may be drawn anew each time."""
        tensors = {k: v for k, v in self.named().items() if isinstance(v, Tensor)}
        return {
            name: [list(x.shape), str(x.dtype), None if self.loader else _checksum(x)]
            for name, x in tensors.items()
        }

    def whole(self) -> tuple[tuple, dict[str, Any]]:
        """The model's arguments for all rows."""
        return self._call(self.entries)

    def rows(self, indices: Tensor) -> tuple[tuple, dict[str, Any]]:
        """The model's arguments for some rows."""
        return self._call({k: v[indices] if is_rows(v) else v for k, v in self.entries.items()})

    def batches(self, batch_size: int | None) -> Iterator[Batch]:
        """One pass: all rows at once in order, or shuffled full-sized batches and their indices."""
        if self.loader is not None:
            yield from self._loaded(self.loader)
        elif batch_size is None:
            yield Batch(*self.whole(), None, self.size)
        else:
            order = torch.randperm(self.size, device=self.device)
            for i in range(self.size // batch_size):
                indices = order[i * batch_size : (i + 1) * batch_size]
                yield Batch(*self.rows(indices), indices, self.size)

    def _loaded(self, loader: DataLoader) -> Iterator[Batch]:
        """A user's batches, so weighted that every row counts the same over an epoch."""
        partial = not getattr(loader.batch_sampler, "drop_last", loader.drop_last)
        for batch in loader:
            entries = {k: as_tensor(v, self.device) for k, v in _entries(batch).items()}
            rows = next(len(v) for v in entries.values() if is_rows(v))
            size = rows * len(loader) if partial else self.size
            yield Batch(*self._call(entries), torch.arange(rows, device=self.device), size)

    def _call(self, entries: Mapping[Key, Any]) -> tuple[tuple, dict[str, Any]]:
        positional = tuple(v for k, v in entries.items() if isinstance(k, int))
        keywords = {k: v for k, v in entries.items() if isinstance(k, str)}
        return positional + self.args, {**keywords, **self.kwargs}


def as_data(
    data: Any, args: tuple, kwargs: Mapping[str, Any] | None, model: Any, device: Any = None
) -> Data:
    """Read `data=`: an array, tensor, tuple, dict, `Dataset` or `DataLoader`.

    Raises:
        DataError: no rows, rows of different lengths, or a loader whose length is unknown.
    """
    check_data(data)
    check_constants(args, kwargs)
    loader = data if isinstance(data, DataLoader) else None
    if isinstance(data, DataLoader | Dataset):
        data = _collate(data) if loader is None else _collate(loader.dataset, loader.collate_fn)
    args = tuple(as_tensor(a, device, f"args[{i}]") for i, a in enumerate(args))
    constants = {k: as_tensor(v, device, k) for k, v in (kwargs or {}).items()}
    names = _names(given := _entries(data), model)
    for key, value in given.items():
        check_rows_kind(names[key], value)
    entries = {k: as_tensor(v, device, names[k]) for k, v in given.items()}
    result = Data(entries, args, constants, names, loader)
    check_rows(result)
    return result


def as_tensor(value: Any, device: Any = None, name: str = "") -> Any:
    """Arrays, series and frames as tensors: floats in torch's default dtype; others as they are."""
    if hasattr(value, "to_numpy") and not isinstance(value, Tensor):
        value = value.to_numpy()
    if isinstance(value, list | np.ndarray):
        value = torch.as_tensor(np.require(array_of(name, value), requirements=["C", "W"]))
        if value.is_floating_point():
            value = value.to(torch.get_default_dtype())
    return value.to(device) if isinstance(value, Tensor) and device is not None else value


def _checksum(x: Tensor) -> int:
    flat = x.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _entries(data: Any) -> dict[Key, Any]:
    if data is None:
        return {}
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, tuple) or (isinstance(data, list) and any(map(is_rows, data))):
        return dict(enumerate(data))
    return {0: data}


def _collate(dataset: Any, collate: Callable = default_collate) -> Any:
    """All items of a map-style dataset as one batch."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(
            "data is a stream without a length, so its log-likelihood can't be scaled to the "
            "whole. Use a map-style Dataset (with __len__ and __getitem__)."
        )
    if len(dataset) == 0:
        raise DataError("data is empty: the Dataset has no items")
    return collate([dataset[i] for i in range(len(dataset))])


def _names(entries: Mapping[Key, Any], model: Any) -> dict[Key, str]:
    """The model's parameter name of each entry."""
    target = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        parameters = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        parameters = []
    names: dict[Key, str] = {}
    for key in entries:
        if isinstance(key, str):
            names[key] = key
        else:
            names[key] = parameters[key] if key < len(parameters) else f"data[{key}]"
    return names


def check_rows(data: Data) -> None:
    """Refuse data without rows, or with a different number of them in different arguments."""
    lengths = {data.names[k]: len(v) for k, v in data.entries.items() if is_rows(v)}
    if any(n == 0 for n in lengths.values()):
        empty = [name for name, n in lengths.items() if n == 0]
        raise DataError(f"data is empty: argument '{empty[0]}' has no rows")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"'{name}' has {n}" for name, n in lengths.items())
        raise DataError(
            f"data must have the same number of rows in every argument: {listed}. What is not rows "
            "of data (constants, tables) goes in args= or kwargs=."
        )
