"""Corpora that are larger than memory: counts that come in pieces."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from scipy.sparse import csr_matrix, vstack
from torch.utils.data import DataLoader, IterableDataset

from pvi.errors import DataError
from pvi.models.topics.counts import Batch, Counts
from pvi.models.topics.inputs import numbers


class CountStream(IterableDataset):
    """Documents read piece by piece, in batches of the arguments of a topic model's programs.

    Args:
        read: called without arguments for each pass; gives an iterable of pieces, each a CSR matrix
            `(n, V)` of counts, or a pair of one and a dict with its `embeddings` or `covariates`.
        n_documents: N, of all pieces together.
        n_features: V.
        batch_size: documents in a batch; a piece that is not a multiple of it ends with a shorter
            one.
        partial: whether all pieces together are only a part of the N documents.

    Raises:
        DataError: a piece has another number of words, or a pass another number of documents.

    >>> pieces = [csr_matrix([[0, 2], [1, 0]]), csr_matrix([[3, 1]])]
    >>> stream = CountStream(lambda: pieces, n_documents=3, n_features=2, batch_size=2)
    >>> [len(batch["counts"]) for batch in stream]
    [2, 1]
    """

    def __init__(
        self,
        read: Callable[[], Iterable[Any]],
        *,
        n_documents: int,
        n_features: int,
        batch_size: int = 200,
        partial: bool = False,
    ):
        self.read, self.n_documents, self.n_features = read, n_documents, n_features
        self.batch_size, self.partial = batch_size, partial

    def __len__(self) -> int:
        return self.n_documents

    def pieces(self) -> Iterator[Counts]:
        """What `read` gives, checked."""
        for piece in self.read():
            if isinstance(piece, Counts):
                yield piece
                continue
            matrix, more = piece if isinstance(piece, tuple) else (piece, {})
            matrix: Any = csr_matrix(matrix)
            if matrix.shape[1] != self.n_features:
                raise DataError(
                    f"a piece has {matrix.shape[1]} words, the stream says {self.n_features}"
                )
            if matrix.nnz and not matrix.data.min() >= 0:
                raise DataError("a piece has counts that are negative or not finite")
            if not matrix.has_canonical_format:
                matrix.sum_duplicates()
            rows = matrix.shape[0]
            yield Counts(matrix, {name: numbers(name, x, rows) for name, x in more.items()})

    def first(self, number: int) -> Counts:
        """Its first documents, whole pieces of at least so many in all."""
        found, seen = [], 0
        for piece in self.pieces():
            found.append(piece)
            seen += len(piece)
            if seen >= number:
                break
        columns = {n: torch.cat([p.columns[n] for p in found]) for n in found[0].columns}
        return Counts(vstack([p.matrix for p in found], "csr"), columns)

    def __iter__(self) -> Iterator[Batch]:
        """Batches; the documents of a piece are shuffled."""
        seen = 0
        for piece in self.pieces():
            seen += len(piece)
            order = torch.randperm(len(piece), device="cpu").numpy()
            for start in range(0, len(piece), self.batch_size):
                yield piece.batch(order[start : start + self.batch_size])
        if seen != self.n_documents and not self.partial:
            raise DataError(
                f"the stream's n_documents is {self.n_documents}, but read() gave {seen} documents"
            )

    def loader(self) -> DataLoader:
        """Its batches as `pvi.fit` takes them."""
        return DataLoader(self, batch_size=None)


def streams(X: Any) -> CountStream | None:
    """The stream that some data are, alone or in a loader."""
    source = X.dataset if isinstance(X, DataLoader) else X
    return source if isinstance(source, CountStream) else None


def one_pass(data: Counts, documents: int, batch_size: int) -> CountStream:
    """Data in memory as a piece of a corpus of so many documents."""
    return CountStream(
        lambda: [data],
        n_documents=max(documents, len(data)),
        n_features=data.matrix.shape[1],
        batch_size=min(batch_size, len(data)),
        partial=True,
    )
