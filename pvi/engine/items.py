"""Data that come item by item: `Dataset`, `DataLoader`, and streams of unknown length."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    WeightedRandomSampler,
    default_collate,
)

from pvi.engine.rows import (
    ALONE,
    Batch,
    Data,
    Part,
    as_tensor,
    checksum,
    entries_of,
    is_rows,
    on_cpu,
    share,
)
from pvi.engine.stored import Partial, Rows, on_device
from pvi.errors import DataError

PIECE = 1024  # items that are collated at once where all are read


@dataclass
class ItemData(Partial):
    """A map-style data set, alone or behind a user's loader.

    Args:
        dataset: with `__len__` and `__getitem__`.
        collate: from a list of items to a batch.
        own_loader: where batches come from instead.
    """

    dataset: Any = None
    collate: Callable = default_collate
    own_loader: DataLoader | None = None

    @property
    def loader(self) -> DataLoader | None:  # type: ignore[override]
        return self.own_loader

    @property
    def numbered(self) -> bool:  # type: ignore[override]
        return self.own_loader is None

    @property
    def size(self) -> int:
        return len(self.dataset)

    def batch_size(self, wanted: int | None) -> int | None:
        loader = self.own_loader
        return super().batch_size(wanted) if loader is None else loader_batch_size(loader)

    def steps(self, batch_size: int) -> int:
        loader = self.own_loader
        return super().steps(batch_size) if loader is None else len(loader)

    def fingerprint(self) -> dict[str, Any]:
        """Shape, dtype, and a checksum of the probe if it is the same when it is read again."""
        again = self._placed(self._read(torch.arange(self.shown, device="cpu")))
        marks = super().fingerprint()
        for key, value in self.entries.items():
            name = self.names[key]
            if is_rows(value):
                same = self.own_loader is None and torch.equal(value, again[key])
                shape = [self.size, *value.shape[1:]]
                marks[name] = [shape, str(value.dtype), checksum(value) if same else None]
        return marks

    def loaded(self) -> Data:
        pieces = [
            self._read(numbers) for numbers in torch.arange(self.size, device="cpu").split(PIECE)
        ]
        rows = {
            k: torch.cat([p[k] for p in pieces]) if is_rows(v) else v for k, v in pieces[0].items()
        }
        return Data(self._placed(rows), self.args, self.kwargs, self.names)

    def _read(self, indices: Tensor) -> Rows:
        return read_items(self.dataset, indices.tolist(), self.collate)

    def batches(self, batch_size: int | None, part: Part = ALONE, skip: int = 0) -> Iterator[Batch]:
        if self.own_loader is not None:
            yield from self._loaded_batches(self.own_loader, part, skip)
        elif batch_size is None:
            yield from self.loaded().batches(None, part, skip)
        else:
            yield from self._ordered(batch_size, part, skip)

    def _loaded_batches(self, loader: DataLoader, part: Part, skip: int) -> Iterator[Batch]:
        """A user's batches, so weighted that every row counts the same over an epoch."""
        partial = not getattr(loader.batch_sampler, "drop_last", loader.drop_last)
        if isinstance(loader.sampler, DistributedSampler):
            part, partial = ALONE, False  # it gives each process rows of its own
        for batch in islice(pulled(loader), skip, None):
            entries = as_rows(batch)
            rows = count_rows(entries)
            size = rows * len(loader) if partial else self.size
            yield cut(self, entries, rows, size, part)


@dataclass
class StreamData(Partial):
    """An `IterableDataset`, alone or behind a user's loader.

    Args:
        num_data: rows that the stream stands for.
        source: gives batches at each `iter`.
        rows_in_batch: the most rows of a batch.
    """

    num_data: int = 0
    source: Any = None
    rows_in_batch: int = 1

    numbered: ClassVar[bool] = False

    @property
    def loader(self) -> Any:  # type: ignore[override]
        return self.source

    @property
    def size(self) -> int:
        return self.num_data

    @property
    def fits(self) -> bool:
        return False

    def batch_size(self, wanted: int | None) -> int | None:
        return self.rows_in_batch

    def steps(self, batch_size: int) -> int:
        return -(-self.num_data // batch_size)

    def fingerprint(self) -> dict[str, Any]:
        """Shapes and dtypes: the rows may be others each time."""
        shown = {self.names[k]: v for k, v in self.entries.items() if is_rows(v)}
        marks = {k: [list(v.shape[1:]), str(v.dtype), None] for k, v in shown.items()}
        return super().fingerprint() | marks

    def loaded(self) -> Data:
        raise DataError(
            "this needs all rows at once, which a stream does not give. Give batch_size=, or some "
            "rows as tensors."
        )

    def batches(self, batch_size: int | None, part: Part = ALONE, skip: int = 0) -> Iterator[Batch]:
        """One pass through the stream; every row counts the same.

        After `num_data` rows a batch is cut short: a stream that gives as many rows in a pass ends
        there, and one without end goes on.
        """
        steps, left, empty = self.steps(self.rows_in_batch), self.num_data, True
        for i, batch in enumerate(pulled(self.source)):
            empty = False
            entries = as_rows(batch)
            rows = min(count_rows(entries), left)
            left = self.num_data if rows == left else left - rows
            if i >= skip:
                yield cut(self, entries, rows, rows * steps, part)
        if empty:
            raise DataError(
                "the stream gave no rows in this pass. An IterableDataset must give its rows anew "
                "each time it is iterated (make the generator in __iter__)."
            )

    def parts(self, batch_size: int, part: Part = ALONE) -> Iterator[tuple[Batch, float]]:
        steps, seen = self.steps(self.rows_in_batch), 0
        for batch in self.batches(None, part):
            rows = batch.size // steps
            seen += rows
            yield replace(batch, size=self.size), rows / self.size
            if seen == self.size:
                return
        raise DataError(
            f"the stream stands for {self.size} rows, but gave {seen} in a pass. It must give them "
            "all each time it is iterated."
        )


def cut(data: Partial, entries: Rows, rows: int, size: int, part: Part) -> Batch:
    """A process's share of the first `rows` of a batch from a loader, on the device."""
    mine, weight = share(torch.arange(rows, device="cpu"), part)
    start, stop = int(mine[0]), int(mine[-1]) + 1
    entries = {k: v[start:stop] if is_rows(v) else v for k, v in entries.items()}
    args, kwargs = data._call(data._placed(entries))
    indices = on_device(torch.arange(len(mine), device="cpu"), data.target)
    return Batch(args, kwargs, indices, size, weight)


def read_items(dataset: Any, numbers: list[int], collate: Callable) -> Rows:
    """Some items as one batch."""
    with on_cpu():
        if hasattr(dataset, "__getitems__"):
            return as_rows(collate(dataset.__getitems__(numbers)))
        return as_rows(collate([dataset[i] for i in numbers]))


def pulled(batches: Iterable) -> Iterator[Any]:
    """From a loader, which works on the CPU whatever the default device of the fit is."""
    with on_cpu():
        iterator = iter(batches)
    while True:
        with on_cpu():
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def first_of_stream(loader: DataLoader, rows: int) -> Rows:
    """About so many rows from the beginning of a stream; single rows without the workers."""
    if loader.batch_size is not None:
        stream: Any = loader.dataset
        items = list(islice(pulled(stream), rows))
        return as_rows(loader.collate_fn(items)) if items else _empty()
    batches: list[Rows] = []
    for batch in pulled(loader):
        batches.append(as_rows(batch))
        if sum(map(count_rows, batches)) >= rows:
            break
    first = batches[0] if batches else _empty()
    return {k: torch.cat([b[k] for b in batches]) if is_rows(v) else v for k, v in first.items()}


def _empty() -> Rows:
    raise DataError("data is empty: the stream has no rows")


def as_rows(batch: Any) -> Rows:
    with on_cpu():
        return {k: as_tensor(v) for k, v in entries_of(batch).items()}


def count_rows(entries: Rows) -> int:
    rows = next((len(v) for v in entries.values() if is_rows(v)), 0)
    if not rows:
        raise DataError("a batch of the loader has no rows; items must be tensors or arrays")
    return rows


def check_sampler(loader: DataLoader) -> None:
    """Refuse samplers that leave rows out or prefer some: the data set then is not the data.

    Raises:
        DataError: naming the sampler.
    """
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, DistributedSampler) or not hasattr(sampler, "__len__"):
        return
    rows, drawn = len(loader.dataset), len(sampler)  # type: ignore[arg-type]
    if drawn != rows or isinstance(sampler, WeightedRandomSampler):
        raise DataError(
            f"the DataLoader's {type(sampler).__name__} draws {drawn} rows an epoch, not each of "
            f"the {rows} rows of its data set alike, so it can't be told which rows are the data. "
            "Give a loader of torch.utils.data.Subset(dataset, indices), without that sampler."
        )


def loader_batch_size(loader: DataLoader) -> int:
    """Rows in a batch; the mean where a batch sampler of the user's own doesn't say it."""
    own = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    rows: int = len(loader.dataset)  # type: ignore[arg-type]
    return own or max(rows // len(loader), 1)
