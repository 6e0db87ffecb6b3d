"""Topics as a table of their words."""

from typing import TYPE_CHECKING, Any

import numpy as np

from pvi.errors import DataError
from pvi.models.topics.metrics.checks import as_components, as_counts, as_words, top_word_ids

if TYPE_CHECKING:
    from pandas import DataFrame


def top_words_table(
    topics: Any,
    vocabulary: Any,
    *,
    top_n: int = 10,
    shares: Any = None,
    X: Any = None,
    **columns: Any,
) -> "DataFrame":
    """One row a topic, the largest topic first.

    Args:
        topics: a fitted model or `components_` `(K, V)`.
        vocabulary: the words `(V,)`.
        top_n: words of each topic.
        shares: of topics in documents `(N, K)`; with them, the column `share` is the mean share.
        X: counts of the documents `(N, V)`; with them, `share` is of all tokens.
        columns: more to put before the words, `(K,)` each, such as coherences.

    Returns:
        A pandas table with the topics' numbers as index, and a column `words`.

    Raises:
        DataError: the vocabulary or a column has another length.

    >>> print(top_words_table([[0.7, 0.3], [0.2, 0.8]], ["ham", "spam"], top_n=2, npmi=[0.1, 0.2]))
           npmi      words
    topic
    0       0.1  ham, spam
    1       0.2  spam, ham
    """
    import pandas

    beta = as_components(topics)
    words = named_words(beta, vocabulary, top_n)
    filled = {name: np.asarray(values) for name, values in columns.items()}
    if shares is not None:
        filled = {"share": topic_shares(shares, X), **filled}
    for name, values in filled.items():
        if values.shape != (len(beta),):
            raise DataError(
                f"{name}: expected a value for each of {len(beta)} topics, got shape {values.shape}"
            )
    filled["words"] = np.array([", ".join(map(str, row)) for row in words], dtype=object)
    index = pandas.RangeIndex(len(beta), name="topic")
    table = pandas.DataFrame(filled, index=index)
    return table if shares is None else table.sort_values("share", ascending=False, kind="stable")


def named_words(topics: Any, vocabulary: Any, top_n: int) -> list[list[Any]]:
    """The most probable words of each topic.

    Args:
        topics, vocabulary, top_n: as in `top_words_table`.

    Raises:
        DataError: the vocabulary has another number of words than the topics.
    """
    names = checked_vocabulary(topics, vocabulary)
    return [names[row].tolist() for row in top_word_ids(topics, top_n)]


def checked_vocabulary(topics: Any, vocabulary: Any) -> np.ndarray:
    """The words as an array, one for each column of the topics."""
    names = as_words(vocabulary)
    width = as_components(topics).shape[1]
    if names.shape != (width,):
        raise DataError(f"vocabulary: expected {width} words, one a column, got {len(names)}")
    return names


def topic_shares(shares: Any, X: Any = None) -> np.ndarray:
    """The share of each topic `(K,)`: of all tokens, or without counts, of all documents.

    Args:
        shares: of topics in documents `(N, K)`.
        X: counts `(N, V)`.
    """
    theta = np.asarray(shares, dtype=float)
    if X is None:
        return theta.mean(0)
    lengths = np.asarray(as_counts(X).sum(1)).ravel()
    return lengths @ theta / max(lengths.sum(), 1)
