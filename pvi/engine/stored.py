"""Data of which only a probe is in memory: arrays on disk and sparse matrices."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pvi.engine.rows import ALONE, Batch, Data, Key, Part, is_rows, on_cpu, share
from pvi.engine.shuffle import UNIFORM, Blocks, own_generator
from pvi.engine.sources import Source
from pvi.errors import DataError

PROBE = 256  # rows that the checks at the start look at
WHOLE = 2**30  # bytes that are read into memory where all rows are needed at once
Rows = dict[Key, Any]


@dataclass
class Partial(Data):
    """`entries` are a probe; batches are read when their turn comes.

    Args:
        target: the device of the batches.
    """

    target: Any = None
    _loaded: Data | None = field(default=None, repr=False)

    partial: ClassVar[bool] = True

    @property
    def bytes(self) -> float:
        """Of all rows in memory, about."""
        shown = [v for v in self.entries.values() if is_rows(v)]
        return sum(v[0].numel() * v.element_size() for v in shown) * self.size

    @property
    def fits(self) -> bool:
        return self.bytes <= WHOLE

    def whole(self) -> tuple[tuple, dict[str, Any]]:
        return self.kept().whole()

    def kept(self) -> Data:
        """All rows in memory, read once.

        Raises:
            DataError: they are too many.
        """
        if not self.fits:
            raise DataError(
                f"this needs all {self.size:,} rows at once, but they are read in pieces "
                f"({self.bytes / 2**30:.1f} GiB in memory). Give some rows: "
                "fit.posterior.on(rows), fit.posterior.predict(rows); or pass tensors as data."
            )
        if self._loaded is None:
            self._loaded = self.loaded()
        return self._loaded

    def loaded(self) -> Data:
        rows = self._placed(self._read(torch.arange(self.size, device="cpu")))
        return Data(rows, self.args, self.kwargs, self.names)

    def rows(self, indices: Tensor) -> tuple[tuple, dict[str, Any]]:
        """Of the probe where they are there; so the checks read nothing twice."""
        if len(indices) and int(indices.max()) < self.shown:
            return super().rows(indices)
        return self._fetched(indices)

    def _fetched(self, indices: Tensor) -> tuple[tuple, dict[str, Any]]:
        return self._call(self._placed(self._read(indices.cpu())))

    @abstractmethod
    def _read(self, indices: Tensor) -> Rows:
        """The entries at these rows, in the CPU's memory."""
        raise NotImplementedError

    def _placed(self, entries: Mapping[Key, Any]) -> Rows:
        """What was read, on the device."""
        return {k: on_device(v, self.target) for k, v in entries.items()}

    def _ordered(self, batch_size: int, part: Part, skip: int) -> Iterator[Batch]:
        """Freely shuffled batches, each read by the numbers of its rows."""
        order = torch.randperm(self.size, device="cpu")
        for i in range(skip, self.size // batch_size):
            yield self._batch(order[i * batch_size : (i + 1) * batch_size], part)

    def _batch(self, indices: Tensor, part: Part) -> Batch:
        mine, weight = share(indices, part)
        return Batch(*self._fetched(mine), on_device(mine, self.target), self.size, weight)


@dataclass
class StoredData(Partial):
    """Arrays on disk and sparse matrices, perhaps beside tensors.

    Args:
        sources: all rows, by key; tensors among them are in memory.
    """

    sources: dict[Key, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return next(len(v) for v in self.sources.values() if isinstance(v, Source))

    @property
    def _on_disk(self) -> list[Source]:
        return [v for v in self.sources.values() if isinstance(v, Source)]

    def fingerprint(self) -> dict[str, Any]:
        """Shape, dtype and checksum; of what is not in memory of some rows."""
        result = super().fingerprint()
        with on_cpu():
            marks = {self.names[k]: v.mark() for k, v in self.sources.items() if is_stored(v)}
        return result | marks

    def _read(self, indices: Tensor) -> Rows:
        with on_cpu():
            return {
                k: v.take(indices) if is_stored(v) else v[indices.to(v.device)] if is_rows(v) else v
                for k, v in self.sources.items()
            }

    def _buffer(self, stretches: list[range], rest: Rows | None, left: int) -> Rows:
        """The entries at these stretches of rows and, behind them, what was left over."""
        total = left + sum(map(len, stretches))
        with on_cpu():
            return {
                k: _filled(v, stretches, rest[k] if rest else None, total)
                if is_stored(v) or is_rows(v)
                else v
                for k, v in self.sources.items()
            }

    def batches(self, batch_size: int | None, part: Part = ALONE, skip: int = 0) -> Iterator[Batch]:
        """One pass; rows of large files are shuffled by blocks, see `pvi.engine.shuffle.Blocks`."""
        if batch_size is None:
            yield from self.loaded().batches(None, part, skip)
            return
        disk = self._on_disk
        row_bytes = sum(source.row_bytes for source in disk)
        chunk = max(source.chunk for source in disk)
        small = row_bytes * self.size <= UNIFORM or all(source.in_memory for source in disk)
        if chunk == 1 and small:
            yield from self._ordered(batch_size, part, skip)
        else:
            blocks = Blocks.of(self.size, row_bytes, chunk, batch_size)
            yield from self._blocked(blocks, batch_size, part, skip)

    def _blocked(self, blocks: Blocks, batch_size: int, part: Part, skip: int) -> Iterator[Batch]:
        """Batches from buffers of blocks; rows left over come first from the next buffer."""
        left, rest, done = torch.empty(0, dtype=torch.long, device="cpu"), None, 0
        for stretches, order in blocks.buffers(own_generator()):
            numbers = torch.cat([_numbers(stretches), left])
            order = torch.cat([torch.arange(len(left), device="cpu") + len(order), order])
            count = len(order) // batch_size
            if done + count >= skip:  # something of this buffer, or of its rest, is wanted
                rows = self._buffer(stretches, rest, len(left))
                for i in range(max(skip - done, 0), count):
                    places, weight = share(order[i * batch_size : (i + 1) * batch_size], part)
                    batch = self._call(self._placed(_at(rows, places)))
                    indices = on_device(numbers[places], self.target)
                    yield Batch(*batch, indices, self.size, weight)
                rest = _at(rows, order[count * batch_size :])
                del rows
            left, done = numbers[order[count * batch_size :]], done + count


def is_stored(value: Any) -> bool:
    return isinstance(value, Source)


def on_device(value: Any, device: Any) -> Any:
    """A tensor where it is wanted; copied to a GPU from pinned memory, without waiting for it."""
    if not isinstance(value, Tensor) or device is None:
        return value
    target = torch.device(device)
    if target.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
        value = value.pin_memory()
    return value.to(target, non_blocking=True)


def _filled(value: Any, stretches: list[range], rest: Tensor | None, total: int) -> Tensor:
    """These stretches in one tensor; without `rest`, nobody asks for the rows behind them."""
    result, end = None, 0
    for rows in stretches:
        part = (
            value.slice(rows.start, rows.stop)
            if is_stored(value)
            else value[rows.start : rows.stop]
        )
        if result is None:
            result = torch.empty(total, *part.shape[1:], dtype=part.dtype)
        result[end : end + len(part)] = part
        end += len(part)
    if result is None:
        raise DataError("a buffer without rows")
    if rest is not None:
        result[end:] = rest
    return result


def _numbers(stretches: list[range]) -> Tensor:
    return torch.cat([torch.arange(s.start, s.stop, device="cpu") for s in stretches])


def _at(rows: Rows, places: Tensor) -> Rows:
    return {k: v[places] if is_rows(v) else v for k, v in rows.items()}
