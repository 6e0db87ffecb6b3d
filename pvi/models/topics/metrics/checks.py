"""What the metrics take: topics as words by rank, and corpora as sparse counts."""

from typing import Any

import numpy as np
from scipy import sparse

from pvi.errors import DataError


def as_components(topics: Any) -> np.ndarray:
    """The matrix `(K, V)` of p(word | topic), of a model or as it is.

    Raises:
        DataError: it is no matrix of finite numbers.
    """
    matrix = np.asarray(getattr(topics, "components_", topics), dtype=float)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise DataError(f"topics: expected components of shape (K, V), got {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise DataError("topics: components must be finite; the fit has diverged")
    return matrix


def top_word_ids(topics: Any, top_n: int) -> np.ndarray:
    """Each topic's `top_n` most probable words as column numbers `(K, top_n)`, best first.

    Args:
        topics: a fitted model, `components_` `(K, V)`, or integers `(K, n)`: column numbers already
            in order, of which the first `top_n` count. Ties go to the smaller column number.

    Raises:
        DataError: topics have fewer words than that, or a word twice.
    """
    known = None if hasattr(topics, "components_") else np.asarray(topics)
    if known is not None and known.ndim == 2 and known.dtype.kind in "iu":
        words = known
        if (np.diff(np.sort(words, axis=1), axis=1) == 0).any():
            raise DataError(
                "topics: integers are numbers of words, each once in a topic, but one has a word "
                "twice; components must be floats"
            )
    else:
        words = np.argsort(-as_components(topics), axis=1, kind="stable")
    if not 1 <= top_n <= words.shape[1]:
        raise DataError(f"top_n: expected 1 to {words.shape[1]}, the words of a topic, got {top_n}")
    return words[:, :top_n]


def as_words(vocabulary: Any) -> np.ndarray:
    """The names of words in order.

    Raises:
        DataError: it is a dict, or something else without an order.
    """
    names = np.asarray(vocabulary)
    if names.ndim != 1:
        raise DataError(
            "vocabulary must hold the words in order, as get_feature_names_out() does, got a "
            f"{type(vocabulary).__name__}"
        )
    return names


def as_counts(X: Any, num_words: int | None = None) -> Any:
    """A corpus as counts `(N, V)`, sparse by rows.

    Raises:
        DataError: negative counts, or another number of words.
    """
    counts: Any = sparse.csr_matrix(X)  # scipy's types do not know of its shape
    if counts.nnz and not (counts.data >= 0).all():  # NaN is refused too
        raise DataError("corpus: expected counts of words, got negative ones or NaN")
    if num_words is not None and counts.shape[1] != num_words:
        raise DataError(
            f"corpus: expected counts of the {num_words} words that the topics have, got "
            f"{counts.shape[1]} columns: use the vocabulary of the fit"
        )
    return counts
