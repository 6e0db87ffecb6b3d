"""How often words, alone and in pairs, occur in documents or in windows of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from pvi.errors import DataError
from pvi.models.topics.metrics.checks import as_counts
from pvi.progress import progress


@dataclass(frozen=True)
class Cooccurrence:
    """Shares of windows that hold words.

    Attributes:
        words: column numbers, sorted `(W,)`.
        joint: the share of windows with both words `(W, W)`; on the diagonal, with the word.
        num_windows: how many there are.
        window: tokens in a window, or None for whole documents.
    """

    words: np.ndarray
    joint: np.ndarray
    num_windows: int
    window: int | None

    def of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the words `ids` `(n,)` and of their pairs `(n, n)`."""
        where = np.searchsorted(self.words, ids)
        joint = self.joint[np.ix_(where, where)]
        return np.diag(joint), joint


def cooccurrence(words: np.ndarray, corpus: Any, window: int | None = None) -> Cooccurrence:
    """Count the windows that hold words of interest.

    Args:
        words: column numbers.
        corpus: counts `(N, V)`, if windows are documents; a list of documents, each a sequence of
            column numbers in the order of the text (-1 for a word outside the vocabulary), if
            windows are `window` tokens wide, moved by one token. A shorter document is one window.

    Raises:
        DataError: the corpus is empty, or counts were given where windows need the order of words.
    """
    words = np.unique(words)
    if words.size and words[0] < 0:
        raise DataError("topics: column numbers of words start at 0")
    pairs, total = (
        _in_documents(words, corpus) if window is None else _in_windows(words, corpus, window)
    )
    if not total:
        raise DataError("corpus: expected documents to count words in, got none")
    return Cooccurrence(words, pairs / total, total, window)


def _in_documents(words: np.ndarray, corpus: Any) -> tuple[np.ndarray, int]:
    counts = as_counts(corpus)
    if words.size and words[-1] >= counts.shape[1]:
        raise DataError(
            f"corpus: the topics have word {words[-1]}, but the corpus only {counts.shape[1]} "
            "columns: use the vocabulary of the fit"
        )
    present = sparse.csr_matrix(counts[:, words] > 0, dtype=np.float64)
    return np.asarray((present.T @ present).todense()), counts.shape[0]


def _in_windows(words: np.ndarray, corpus: Any, window: int) -> tuple[np.ndarray, int]:
    if sparse.issparse(corpus) or isinstance(corpus, np.ndarray):
        raise DataError(
            "corpus: windows need the order of the tokens, so expected a list of documents, each "
            "a sequence of column numbers; counts know whole documents only (window=None)"
        )
    if window < 1:
        raise DataError(f"window: expected at least 1 token, got {window}")
    pairs, total = np.zeros((len(words), len(words))), 0
    for document in progress(corpus, "windows", len(corpus)):
        found = _windows_with(words, document, window)
        total += len(found[1])
        pairs[np.ix_(found[0], found[0])] += found[1].T @ found[1]
    return pairs, total


def _windows_with(
    words: np.ndarray, document: Sequence[int], window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in `words` of those in the document, and which window holds which of them."""
    tokens = np.asarray(document, dtype=np.int64)
    count = max(len(tokens) - window + 1, 1) if len(tokens) else 0
    spots = np.flatnonzero(np.isin(tokens, words))
    found, column = np.unique(np.searchsorted(words, tokens[spots]), return_inverse=True)
    ends = np.zeros((count + 1, len(found)))  # +1 where windows with a token begin, -1 after them
    np.add.at(ends, (np.maximum(spots - window + 1, 0), column), 1)
    np.add.at(ends, (np.minimum(spots, count - 1) + 1, column), -1)
    return found, (ends[:-1].cumsum(0) > 0).astype(np.float64)
