"""Word counts of documents: a sparse matrix, and batches of it as padded tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.utils.data import Dataset

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Bag:
    """The words of a batch of B documents one after the other, n of them in all.

    Args:
        documents: of each word, the number of its document, ascending, `(n,)`.
        words: their numbers in the vocabulary `(n,)`.
        counts: how often each occurs in its document `(n,)`.
        filled: which documents have words at all `(B,)`.
    """

    documents: Tensor
    words: Tensor
    counts: Tensor
    filled: Tensor

    @staticmethod
    def of(words: Tensor, counts: Tensor) -> "Bag":
        """What a padded batch holds.

        Args:
            words, counts: `(B, L)`; places with a count of 0 are padding.
        """
        documents, places = counts.nonzero(as_tuple=True)
        kept = (words[documents, places], counts[documents, places])
        return Bag(documents, *kept, (counts > 0).any(-1))

    def __len__(self) -> int:
        return len(self.filled)

    @property
    def starts(self) -> Tensor:
        """Where each document begins `(B,)`."""
        numbers = torch.arange(len(self), device=self.documents.device)
        return torch.searchsorted(self.documents, numbers)

    def summed(self, values: Tensor) -> Tensor:
        """Sums over each document's words: `(*batch, n)` to `(*batch, B)`."""
        total = values.new_zeros(*values.shape[:-1], len(self))
        return total.index_add(-1, self.documents, values)

    def dense(self, vocabulary: int) -> Tensor:
        """Counts of all words `(B, V)`."""
        x = self.counts.new_zeros(len(self), vocabulary)
        return x.index_put((self.documents, self.words), self.counts, accumulate=True)


class Counts(Dataset):
    """The rows of a sparse count matrix, and what else belongs to them, as a data set.

    An item is a dict of the arguments of a topic model's programs. Its `words` and `counts` are
    padded to the longest document's number of different words, so nothing here is ever as wide as
    the vocabulary.

    Args:
        matrix: `(N, V)` in CSR form.
        columns: what else each document has, such as embeddings or labels, tensors of N rows.
        dtype: of the counts.
    """

    def __init__(
        self,
        matrix: Any,
        columns: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.matrix, self.columns = matrix, dict(columns or {})
        self.dtype = dtype or torch.get_default_dtype()
        self.width = max(1, int(np.diff(matrix.indptr).max(initial=0)))

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def __getitem__(self, number: int) -> Batch:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        batch = self.batch(np.asarray(numbers), self.width)
        rows = zip(*(x.unbind() for x in batch.values()), strict=True)
        return [dict(zip(batch, row, strict=True)) for row in rows]

    def batch(self, numbers: np.ndarray, width: int | None = None) -> Batch:
        """Some documents.

        Args:
            numbers: of the rows.
            width: to which they are padded; by default that of the longest.
        """
        words, counts = padded(self.matrix, numbers, width)
        found = {"words": torch.from_numpy(words), "counts": torch.from_numpy(counts)}
        found["counts"] = found["counts"].to(self.dtype)
        rows = torch.from_numpy(numbers)
        return found | {name: column[rows] for name, column in self.columns.items()}

    def batches(self, size: int) -> Iterator[Batch]:
        """All documents in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, min(start + size, len(self))))


def some_documents(matrix: Any, number: int) -> Any:
    """Documents with words, at most so many, by torch's random numbers.

    Args:
        matrix: counts `(N, V)` in CSR form.
        number: how many.
    """
    filled = np.flatnonzero(np.diff(matrix.indptr))
    order = torch.randperm(len(filled))[:number].numpy()
    return csr_matrix(matrix[np.sort(filled[order])], dtype=np.float64)


def padded(
    matrix: Any, numbers: np.ndarray, width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Words and counts of some rows of a CSR matrix, `(B, L)` each, with zeros behind.

    >>> from scipy.sparse import csr_matrix
    >>> words, counts = padded(csr_matrix([[0, 2, 1], [0, 0, 0]]), np.array([0, 1]))
    >>> words.tolist(), counts.tolist()
    ([[1, 2], [0, 0]], [[2.0, 1.0], [0.0, 0.0]])
    """
    starts, lengths = matrix.indptr[numbers], np.diff(matrix.indptr)[numbers]
    width = max(1, int(lengths.max(initial=0))) if width is None else width
    rows = np.repeat(np.arange(len(numbers)), lengths)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    taken = np.repeat(starts, lengths) + places
    words, counts = np.zeros((len(numbers), width), np.int64), np.zeros((len(numbers), width))
    words[rows, places], counts[rows, places] = matrix.indices[taken], matrix.data[taken]
    return words, counts
