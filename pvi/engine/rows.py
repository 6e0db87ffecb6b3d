"""Rows of data as arguments of the model, whole or in minibatches: those that are in memory."""

import inspect
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pvi.engine.kinds import array_of
from pvi.errors import DataError

Key = int | str
Part = tuple[int, int]  # (number of this process, how many there are)
ALONE: Part = (0, 1)
NO_ROWS = "What is not rows of data (constants, tables) goes in args= or kwargs=."


@dataclass(frozen=True)
class Batch:
    """Arguments for some rows, and the rows' numbers; `None` for all rows in order.

    Args:
        size: how many rows the batch stands for.
        weight: of this process's share in the mean over all of them; 1 where shares are equal.
    """

    args: tuple
    kwargs: dict[str, Any]
    indices: Tensor | None
    size: int
    weight: float = 1.0

    def checksum(self) -> int:
        """A number that tells these rows from others."""
        mark = 0
        for value in (*self.args, *self.kwargs.values()):
            if is_rows(value):
                mark = zlib.crc32(checksum(value).to_bytes(4, "little"), mark)
        return mark


@dataclass
class Data:
    """Rows (tensors of one length) and constants that together are the model's arguments.

    Args:
        entries: positional (0, 1, ...) and keyword arguments from `data=`.
        args, kwargs: the arguments that are not rows.
        names: the model's name of each entry.
    """

    entries: dict[Key, Any]
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    names: dict[Key, str] = field(default_factory=dict)

    loader: ClassVar[DataLoader | None] = None  # where batches come from a user's instead
    numbered: ClassVar[bool] = True  # whether batches know which rows they hold
    partial: ClassVar[bool] = False  # whether only a probe of the rows is in memory

    @property
    def size(self) -> int:
        """Number of rows; 0 if there are none."""
        return self.shown

    @property
    def shown(self) -> int:
        """Number of rows in memory, which the checks at the start look at."""
        return next((len(v) for v in self.entries.values() if is_rows(v)), 0)

    @property
    def fits(self) -> bool:
        """Whether `whole` gives all rows."""
        return True

    @property
    def device(self) -> Any:
        """Where the rows are."""
        return next((v.device for v in self.entries.values() if is_rows(v)), None)

    def batch_size(self, wanted: int | None) -> int | None:
        """Rows in a batch; `None` for the whole, which is never shuffled."""
        return None if wanted is None or wanted >= self.size else wanted

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch."""
        return self.size // batch_size

    def named(self) -> dict[str, Any]:
        """Data (the rows in memory) and constants by the model's argument names."""
        extra = {f"args[{i}]": v for i, v in enumerate(self.args)}
        return (
            {self.names.get(k, str(k)): v for k, v in self.entries.items()}
            | extra
            | dict(self.kwargs)
        )

    def fingerprint(self) -> dict[str, Any]:
        """Shape, dtype and checksum of each tensor."""
        tensors = {k: v for k, v in self.named().items() if isinstance(v, Tensor)}
        return {k: [list(x.shape), str(x.dtype), checksum(x)] for k, x in tensors.items()}

    def probe(self) -> tuple[tuple, dict[str, Any]]:
        """The model's arguments for the rows in memory: what the checks at the start look at."""
        return self._call(self.entries)

    def whole(self) -> tuple[tuple, dict[str, Any]]:
        """The model's arguments for all rows."""
        return self._call(self.entries)

    def loaded(self) -> "Data":
        """The same with all rows in memory."""
        return self

    def kept(self) -> "Data":
        """All rows in memory, read once; refused where they don't fit."""
        return self

    def rows(self, indices: Tensor) -> tuple[tuple, dict[str, Any]]:
        """The model's arguments for some rows."""
        return self._call({k: v[indices] if is_rows(v) else v for k, v in self.entries.items()})

    def batches(self, batch_size: int | None, part: Part = ALONE, skip: int = 0) -> Iterator[Batch]:
        """One pass: all rows at once in order, or shuffled full-sized batches and their indices.

        Args:
            part: which share of each batch to give.
            skip: batches at the start to leave out.
        """
        if batch_size is None:
            if skip == 0:
                yield self._all(part)
            return
        order = torch.randperm(self.size, device=self.device)
        for i in range(skip, self.size // batch_size):
            yield self._batch(order[i * batch_size : (i + 1) * batch_size], part)

    def parts(self, batch_size: int, part: Part = ALONE) -> Iterator[tuple[Batch, float]]:
        """All rows once, in order: batches of about this size that stand for all rows, each with
        its rows' share of them.

        Args:
            batch_size: the most rows of a batch.
            part: which share of each batch to give.
        """
        rows = torch.arange(self.size, device=self.device)
        for indices in rows.tensor_split(-(-self.size // batch_size)):
            yield self._batch(indices, part), len(indices) / self.size

    def _all(self, part: Part) -> Batch:
        if part == ALONE:
            return Batch(*self.whole(), None, self.size)
        return self._batch(torch.arange(self.size, device=self.device), part)

    def _batch(self, indices: Tensor, part: Part) -> Batch:
        mine, weight = share(indices, part)
        return Batch(*self.rows(mine), mine, self.size, weight)

    def _call(self, entries: Mapping[Key, Any]) -> tuple[tuple, dict[str, Any]]:
        positional = tuple(v for k, v in entries.items() if isinstance(k, int))
        keywords = {k: v for k, v in entries.items() if isinstance(k, str)}
        return positional + self.args, {**keywords, **self.kwargs}


def on_cpu() -> AbstractContextManager:
    """Inside: tensors are made on the CPU, whatever the default device of the fit.

    Nothing where they are anyway, for the mode makes each call of torch slower.
    """
    default = torch.get_default_device().type == "cpu"
    return nullcontext() if default else torch.device("cpu")


def share(rows: Tensor, part: Part) -> tuple[Tensor, float]:
    """One process's stretch of some rows, and its weight in the mean over all processes.

    So weighted, each row counts the same. Where there are fewer rows than processes, some have the
    first row with weight 0.
    """
    rank, number = part
    if number == 1:
        return rows, 1.0
    mine = rows.tensor_split(number)[rank]
    return (mine if len(mine) else rows[:1]), len(mine) * number / len(rows)


def as_tensor(value: Any, device: Any = None, name: str = "") -> Any:
    """Arrays, series and frames as tensors: floats in torch's default dtype; others as they are."""
    if hasattr(value, "to_numpy") and not isinstance(value, Tensor):
        value = value.to_numpy()
    if isinstance(value, list | np.ndarray):
        value = torch.as_tensor(np.require(array_of(name, value), requirements=["C", "W"]))
        if value.is_floating_point():
            value = value.to(torch.get_default_dtype())
    return value.to(device) if isinstance(value, Tensor) and device is not None else value


def checksum(x: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def entries_of(data: Any) -> dict[Key, Any]:
    if data is None:
        return {}
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, tuple) or (isinstance(data, list) and any(map(is_rows, data))):
        return dict(enumerate(data))
    return {0: data}


def names_of(entries: Mapping[Key, Any], model: Any) -> dict[Key, str]:
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
            f"data must have the same number of rows in every argument: {listed}. {NO_ROWS}"
        )
