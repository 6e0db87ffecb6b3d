"""Parquet files as rows on disk."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from pvi.errors import DataError


class ParquetRows:
    """Columns of Parquet files as an array on disk: `shape`, `dtype`, `chunks` and slices.

    One row group is in memory at a time.

    Args:
        paths: the files, one behind the other.
        columns: their names; `one` for a column by itself, `(N,)` instead of `(N, D)`.
    """

    def __init__(self, paths: Sequence[Any], columns: Sequence[str], one: bool):
        self._columns, self._one = list(columns), one
        self._files = [_pyarrow().ParquetFile(path) for path in paths]
        self._groups = [(f, i) for f in self._files for i in range(f.num_row_groups)]
        sizes = [f.metadata.row_group(i).num_rows for f, i in self._groups]
        self._starts = [0, *accumulate(sizes)]
        self._check_columns(paths)
        self.chunks = (max(sizes, default=1),)
        self.shape = (self._starts[-1], *(() if one else (len(self._columns),)))
        self._read, self._group = -1, np.empty(self.shape[1:])
        self.dtype = self._group_of(0).dtype if self._groups else np.dtype(float)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise DataError(f"Parquet rows are read by stretches, not by steps of {step}")
        parts, at = [], start
        while at < stop:
            group = bisect_right(self._starts, at) - 1
            first, last = self._starts[group : group + 2]
            parts.append(self._group_of(group)[at - first : min(stop, last) - first])
            at = last
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def _group_of(self, number: int) -> np.ndarray:
        if number != self._read:
            file, i = self._groups[number]
            table = file.read_row_group(i, columns=self._columns)
            columns = [table.column(name).to_numpy() for name in self._columns]
            self._group = columns[0] if self._one else np.stack(columns, 1)
            self._read = number
        return self._group

    def _check_columns(self, paths: Sequence[Any]) -> None:
        for path, file in zip(paths, self._files, strict=True):
            known = file.schema_arrow.names
            missing = [name for name in self._columns if name not in known]
            if missing:
                raise DataError(f"{path} has no column '{missing[0]}'; it has {known}")


def parquet(paths: Any, columns: str | Sequence[str]) -> ParquetRows:
    """Columns of one or several Parquet files as `data=` of `pvi.fit`, read by row groups.

    With `batch_size` never more than some row groups are in memory: rows are shuffled by row groups
    and within a buffer of them.

    Args:
        paths: a file, or a list of files.
        columns: a name, for rows `(N,)`; or names, for rows `(N, D)`.

    Raises:
        DataError: pyarrow is not installed, or a column is missing.
    """
    one = isinstance(columns, str)
    several = paths if isinstance(paths, list | tuple) else [paths]
    return ParquetRows(several, [columns] if isinstance(columns, str) else columns, one)


def _pyarrow() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("Parquet files need pyarrow: pip install 'pvi[parquet]'") from error
    return parquet
