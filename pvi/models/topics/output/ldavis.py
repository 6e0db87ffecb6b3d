"""What `pyLDAvis.prepare` takes."""

from typing import Any

import numpy as np

from pvi.errors import DataError
from pvi.models.topics.metrics.checks import as_components, as_counts
from pvi.models.topics.output.words import checked_vocabulary


def ldavis(model: Any, X: Any, vocabulary: Any, *, shares: Any = None) -> dict[str, np.ndarray]:
    """Arguments of `pyLDAvis.prepare(**ldavis(model, X, vocabulary))`.

    Empty documents and words that do not occur are left out, since pyLDAvis divides by their
    counts; the topics are normalised over the words that are left.

    Args:
        model: fitted.
        X: counts `(N, V)`.
        vocabulary: the words `(V,)`.
        shares: `model.transform(X)`, where it is known already.

    Returns:
        `topic_term_dists` `(K, V)`, `doc_topic_dists` `(N, K)`, `doc_lengths`, `vocab` and
        `term_frequency`.

    Reference:
        Sievert and Shirley (2014).

    Raises:
        DataError: no document has words.
    """
    beta = as_components(model)
    names, counts = checked_vocabulary(beta, vocabulary), as_counts(X, beta.shape[1])
    lengths = np.asarray(counts.sum(1)).ravel()
    frequency = np.asarray(counts.sum(0)).ravel()
    used, seen = lengths > 0, frequency > 0
    if not used.any():
        raise DataError("X: expected documents with words, got none")
    theta = np.asarray(model.transform(X) if shares is None else shares, dtype=float)[used]
    topics = beta[:, seen]
    return {
        "topic_term_dists": topics / topics.sum(1, keepdims=True),
        "doc_topic_dists": theta / theta.sum(1, keepdims=True),
        "doc_lengths": lengths[used],
        "vocab": names[seen],
        "term_frequency": frequency[seen],
    }
