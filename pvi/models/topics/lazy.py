"""Arrays over documents that are computed when they are read, for xarray."""

from collections.abc import Callable
from typing import Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing

BLOCK = 512  # documents that are computed together


class DocumentArray(BackendArray):
    """An array with documents in one dimension, some of them at a time from a function.

    The function is called for whole blocks of documents, always the same ones, so that what it
    draws does not depend on what is read.

    Args:
        shape: of the whole.
        axis: of the documents.
        block: from a slice of documents to their part of the array.
    """

    def __init__(self, shape: tuple[int, ...], axis: int, block: Callable[[slice], np.ndarray]):
        self.shape, self.axis, self.block = shape, axis, block
        self.dtype = np.dtype(np.float64)

    def __getitem__(self, key: Any) -> Any:
        support = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def _read(self, key: tuple) -> np.ndarray:
        size, wanted = self.shape[self.axis], key[self.axis]
        single = not isinstance(wanted, slice)
        rows = np.arange(size)[[wanted] if single else wanted]
        found = [self._rows(start, rows) for start in sorted({r // BLOCK * BLOCK for r in rows})]
        shape = list(self.shape)
        shape[self.axis] = 0
        whole = np.concatenate([np.zeros(shape), *found], self.axis)
        order = np.argsort(np.argsort(rows, kind="stable"), kind="stable")
        whole = whole.take(order, self.axis)
        rest = list(key)
        rest[self.axis] = 0 if single else slice(None)
        return whole[tuple(rest)]

    def _rows(self, start: int, rows: np.ndarray) -> np.ndarray:
        """Those of a block that are wanted, in ascending order."""
        stop = min(start + BLOCK, self.shape[self.axis])
        inside = np.sort(rows[(rows >= start) & (rows < stop)]) - start
        return self.block(slice(start, stop)).take(inside, self.axis)


def lazy(shape: tuple[int, ...], axis: int, block: Callable[[slice], np.ndarray]) -> Any:
    """What an `xarray.Variable` takes as its data."""
    return indexing.LazilyIndexedArray(DocumentArray(shape, axis, block))
