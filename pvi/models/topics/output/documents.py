"""Documents that show best what a topic is about."""

from typing import Any

import numpy as np

from pvi.errors import DataError
from pvi.models.topics.metrics.checks import as_counts


def representative_documents(
    shares: Any, *, n: int = 3, X: Any = None, min_tokens: int = 20
) -> np.ndarray:
    """Numbers of the documents with the largest shares of each topic, the largest first.

    Args:
        shares: of topics in documents `(N, K)`.
        n: documents of each topic.
        X: counts `(N, V)`; with them, shorter documents are passed over: a few words that happen
            to suit a topic say little about it.
        min_tokens: in a document that may be chosen.

    Returns:
        `(K, n)`, or fewer columns where there are fewer documents.

    Raises:
        DataError: all documents are shorter.

    >>> representative_documents([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], n=2).tolist()
    [[0, 2], [1, 2]]
    """
    theta = np.asarray(shares, dtype=float)
    if theta.ndim != 2 or n < 1:
        raise DataError(f"expected shares (N, K) and n >= 1, got {theta.shape} and n={n}")
    rows = np.arange(len(theta))
    if X is not None:
        lengths = np.asarray(as_counts(X).sum(1)).ravel()
        if lengths.shape != rows.shape:
            raise DataError(f"X: expected counts of {len(theta)} documents, got {len(lengths)}")
        rows = rows[lengths >= min_tokens]
    if not len(rows):
        raise DataError(f"no document has {min_tokens} tokens: lower min_tokens")
    order = np.argsort(-theta[rows], axis=0, kind="stable")[:n]
    return rows[order].T
