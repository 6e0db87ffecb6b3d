"""Diversity: whether topics have words of their own."""

from itertools import combinations
from typing import Any

import numpy as np

from pvi.errors import DataError
from pvi.models.topics.metrics.checks import top_word_ids


def topic_diversity(topics: Any, *, top_n: int = 25) -> float:
    """The share of distinct words among the top words of all topics, from 1/K to 1.

    Args:
        topics: a fitted model, `components_` `(K, V)`, or word ids `(K, n)`, best first.
        top_n: words of each topic.

    Reference:
        Dieng, Ruiz and Blei (2020).

    >>> topic_diversity([[0, 1], [0, 2]], top_n=2)
    0.75
    """
    ids = top_word_ids(topics, top_n)
    return len(np.unique(ids)) / ids.size


def inverted_rbo(topics: Any, *, top_n: int = 10, p: float = 0.9) -> float:
    """One less the rank-biased overlap of two topics' top words, averaged over pairs of topics.

    With $A_d$ the share of common words among the first d of both lists, of n words in all,

    $$\\mathrm{RBO} = A_n\\, p^n + \\frac{1 - p}{p} \\sum_{d = 1}^{n} A_d\\, p^d$$

    which takes it that the lists go on agreeing as they did. 1 where topics share no word, 0 where
    all have the same words in the same order.

    Args:
        topics, top_n: as in `topic_diversity`.
        p: below 1; the smaller, the more the first words count.

    Reference:
        Webber, Moffat and Zobel (2010); Bianchi, Terragni and Hovy (2021).
    """
    if not 0 < p < 1:
        raise DataError(f"p: expected a number between 0 and 1, got {p}")
    ids = top_word_ids(topics, top_n)
    if len(ids) < 2:
        raise DataError("topics: overlap is that of two topics, got one")
    return 1 - float(np.mean([_overlap(a, b, p) for a, b in combinations(ids, 2)]))


def _overlap(a: np.ndarray, b: np.ndarray, p: float) -> float:
    depth = np.arange(1, len(a) + 1)
    same = a[:, None] == b[None, :]  # where a word stands in both lists: its depth is the later one
    later = np.maximum(*np.nonzero(same))
    agreement = np.cumsum(np.bincount(later, minlength=len(a))) / depth
    return float(agreement[-1] * p ** len(a) + (1 - p) / p * (agreement * p**depth).sum())
