"""Rows of one argument that are not in memory as a tensor: arrays on disk, sparse matrices."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvi.engine.rows import as_tensor, checksum
from pvi.errors import DataError

MARKED = 64  # rows that a fingerprint looks at


class Source(ABC):
    """Rows that can be read by number, into the CPU's memory.

    Args:
        shape: of all rows; the first number is theirs.
        dtype: name of the type on disk.
        chunk: rows that are stored together; 1 where single rows are read as fast as stretches.
    """

    in_memory = False

    def __init__(self, shape: tuple[int, ...], dtype: str, chunk: int):
        self.shape, self.dtype, self.chunk = shape, dtype, max(chunk, 1)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as a dense tensor."""
        width = {"float16": 4, "float32": 4, "float64": 8}.get(self.dtype)  # some are widened
        return int(np.prod(self.shape[1:], dtype=np.int64)) * (width or 8)

    @abstractmethod
    def slice(self, start: int, stop: int) -> Tensor:
        """The rows from `start` to `stop`, in memory of their own."""

    def take(self, indices: Tensor) -> Tensor:
        """The rows of these numbers, in this order; read in the order of the disk."""
        indices = indices.cpu()
        if len(indices) and bool((indices.diff() == 1).all()):
            return self.slice(int(indices[0]), int(indices[-1]) + 1)
        ordered, order = indices.sort()
        rows = self._take_sorted(ordered)
        result = torch.empty_like(rows)
        result[order] = rows
        return result

    def _take_sorted(self, indices: Tensor) -> Tensor:
        """Stretch by stretch, for arrays that are good at slices only."""
        ends = (indices.diff() != 1).nonzero().flatten() + 1
        stretches = torch.tensor_split(indices, ends)
        return torch.cat([self.slice(int(s[0]), int(s[-1]) + 1) for s in stretches])

    def mark(self) -> list[Any]:
        """Shape, dtype and a checksum of some rows, spread over all."""
        count = min(len(self), MARKED)
        if self.chunk == 1:
            spread = torch.linspace(0, len(self) - 1, count, dtype=torch.float64).long()
        else:  # the beginning and the end
            half = torch.arange(max(count // 2, 1))
            spread = torch.cat([half, len(self) - 1 - half]).unique()
        return [list(self.shape), self.dtype, checksum(self.take(spread))]


class ArraySource(Source):
    """A `np.memmap`, or whatever has `shape`, `dtype` and slices: zarr, h5py, `pvi.datasets`."""

    def __init__(self, array: Any):
        self._array = array
        mapped = isinstance(array, np.memmap)
        chunks = getattr(array, "chunks", None)
        chunk = 1 if mapped else chunks[0] if chunks else 1024
        super().__init__(tuple(array.shape), str(np.dtype(array.dtype)), int(chunk))

    def slice(self, start: int, stop: int) -> Tensor:
        return as_tensor(np.array(self._array[start:stop]))

    def _take_sorted(self, indices: Tensor) -> Tensor:
        if isinstance(self._array, np.memmap):
            return as_tensor(np.array(self._array[indices.numpy()]))
        return super()._take_sorted(indices)


class CSRSource(Source):
    """A sparse matrix by rows, scipy's or torch's; rows are given dense."""

    in_memory = True

    def __init__(self, matrix: Any):
        if isinstance(matrix, Tensor):
            parts = (matrix.crow_indices(), matrix.col_indices(), matrix.values())
        else:
            parts = (matrix.indptr, matrix.indices, matrix.data)
        self._starts, self._columns, self._values = (as_tensor(x).cpu() for x in parts)
        super().__init__(tuple(matrix.shape), str(self._values.dtype).removeprefix("torch."), 1)

    def slice(self, start: int, stop: int) -> Tensor:
        return self._take_sorted(torch.arange(start, stop))

    def _take_sorted(self, indices: Tensor) -> Tensor:
        starts = self._starts[indices].long()
        counts = self._starts[indices + 1].long() - starts
        rows = torch.repeat_interleave(torch.arange(len(indices)), counts)
        before = counts.cumsum(0) - counts
        places = torch.arange(len(rows)) + (starts - before)[rows]
        dense = self._values.new_zeros(len(indices), self.shape[1])
        where = (rows, self._columns[places].long())
        return dense.index_put_(
            where, self._values[places], accumulate=True
        )  # repeated entries add


def as_source(value: Any) -> Source | None:
    """How to read these rows piece by piece; `None` for what is in memory.

    Raises:
        DataError: a sparse matrix that has no rows to take.
    """
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            return None
        if value.layout == torch.sparse_csr and value.dim() == 2:
            return CSRSource(value)
        raise DataError(f"a tensor of layout {value.layout} has no rows: use x.to_sparse_csr()")
    if hasattr(value, "tocsr") and hasattr(value, "format"):
        if value.format == "csr" and len(value.shape) == 2:
            return CSRSource(value)
        raise DataError(f"a sparse matrix in {value.format} form has no rows: use x.tocsr()")
    mapped = isinstance(value, np.memmap) and value.ndim > 0
    return ArraySource(value) if mapped or _is_stored(value) else None


def _is_stored(value: Any) -> bool:
    """Whether this is an array that gives itself in slices: zarr's, h5py's or like them."""
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "to_numpy"):
        return False
    has = all(hasattr(value, name) for name in ("shape", "dtype", "__getitem__"))
    return has and len(value.shape) > 0
