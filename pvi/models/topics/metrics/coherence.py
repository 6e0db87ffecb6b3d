"""Coherence: whether a topic's top words occur together in a reference corpus.

A coherence means nothing without its reference corpus, its window and its number of words, so each
result carries them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pvi.errors import DataError
from pvi.models.topics.metrics.checks import top_word_ids
from pvi.models.topics.metrics.cooccurrence import Cooccurrence, cooccurrence

EPSILON = 1e-12  # of Röder et al.'s implementation, and of gensim's


@dataclass(frozen=True)
class Coherence:
    """A coherence of each topic, with the conditions under which it was measured.

    Attributes:
        measure: NPMI, C_V or U_Mass.
        topics: a value for each topic `(K,)`.
        top_n: how many words of a topic count.
        window: tokens in a window, or None for whole documents.
        num_windows: how many windows or documents the reference corpus has.
        corpus: what the reference corpus is, in words.
    """

    measure: str
    topics: np.ndarray = field(repr=False)
    top_n: int
    window: int | None
    num_windows: int
    corpus: str

    @property
    def mean(self) -> float:
        """The mean over topics."""
        return float(self.topics.mean())

    def __float__(self) -> float:
        return self.mean

    def __str__(self) -> str:
        kind = "documents" if self.window is None else f"windows of {self.window} tokens"
        return (
            f"{self.measure} {self.mean:.3f} (mean of {len(self.topics)} topics, top {self.top_n} "
            f"words, {self.num_windows:,} {kind} of {self.corpus})"
        )


def npmi(
    topics: Any, corpus: Any, *, top_n: int = 10, window: int | None = None, name: str = "corpus"
) -> Coherence:
    """Normalised pointwise mutual information, averaged over the pairs of a topic's top words.

    $$\\mathrm{NPMI}(a, b) = \\frac{\\log p(a, b) - \\log p(a)\\, p(b)}{-\\log p(a, b)}$$

    A pair that never occurs together, or with a word that the corpus lacks, has -1. A pair in every
    window has 1.

    Args:
        topics: a fitted model, `components_` `(K, V)`, or word ids `(K, n)`, best first.
        corpus: counts `(N, V)`; with a window, token sequences as in `cooccurrence`.
        top_n: words of each topic.
        window: tokens in a sliding window; by default whole documents.
        name: of the corpus, for the result.

    Returns:
        Values from -1 to 1.

    Reference:
        Bouma (2009); Lau, Newman and Baldwin (2014).

    >>> print(npmi([[0, 1]], [[2, 1], [1, 1], [0, 0]], top_n=2))
    NPMI 1.000 (mean of 1 topics, top 2 words, 3 documents of corpus)
    """
    return _measure("NPMI", _npmi_of, topics, corpus, top_n, window, name)


def c_v(
    topics: Any, corpus: Any, *, top_n: int = 10, window: int | None = None, name: str = "corpus"
) -> Coherence:
    """C_V: cosine of each top word's NPMI with all the top words, and of the sum of those vectors.

    $$v_i = (\\mathrm{NPMI}(w_i, w_j))_j, \\qquad
      C_V = \\frac{1}{n} \\sum_i \\cos\\Bigl(v_i, \\sum_j v_j\\Bigr)$$

    Published values have `window=110`, which needs the order of the tokens. On counts the windows
    are documents, and values are not comparable with those.

    Args:
        topics, corpus, top_n, window, name: as in `npmi`.

    Reference:
        Röder, Both and Hinneburg (2015), with 1e-12 added to shares of pairs as in gensim.
    """
    return _measure("C_V", _c_v_of, topics, corpus, top_n, window, name)


def u_mass(
    topics: Any,
    corpus: Any,
    *,
    top_n: int = 10,
    epsilon: float | None = None,
    name: str = "corpus",
) -> Coherence:
    """U_Mass: log probability of a top word given a better one, averaged over the ordered pairs.

    $$\\frac{2}{n (n - 1)} \\sum_{i > j} \\log \\frac{p(w_i, w_j) + \\epsilon}{p(w_j)}$$

    Args:
        topics, corpus, top_n, name: as in `npmi`; always on documents.
        epsilon: by default 1 / (number of documents), one document more as in Mimno et al.; gensim
            has 1e-12.

    Raises:
        DataError: a top word does not occur in the corpus.

    Reference:
        Mimno, Wallach, Talley, Leenders and McCallum (2011), there a sum.
    """

    def of(single: np.ndarray, joint: np.ndarray, windows: int) -> float:
        if not (single > 0).all():
            raise DataError("corpus: U_Mass is not defined where a top word does not occur in it")
        later, earlier = np.tril_indices(len(single), -1)
        added = 1 / windows if epsilon is None else epsilon
        return float(np.log((joint[later, earlier] + added) / single[earlier]).mean())

    return _measure("U_Mass", of, topics, corpus, top_n, None, name)


def _measure(
    measure: str,
    of: Callable[[np.ndarray, np.ndarray, int], float],
    topics: Any,
    corpus: Any,
    top_n: int,
    window: int | None,
    name: str,
) -> Coherence:
    if top_n < 2:
        raise DataError(f"top_n: coherence compares pairs of words, so at least 2, got {top_n}")
    ids = top_word_ids(topics, top_n)
    found: Cooccurrence = cooccurrence(ids, corpus, window)
    values = np.array([of(*found.of(row), found.num_windows) for row in ids])
    return Coherence(measure, values, top_n, window, found.num_windows, name)


def _npmi_of(single: np.ndarray, joint: np.ndarray, windows: int) -> float:
    pairs = np.triu_indices(len(single), 1)
    return float(_npmi(single, joint)[pairs].mean())


def _npmi(single: np.ndarray, joint: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (np.log(joint) - np.log(np.outer(single, single))) / -np.log(joint)
    return np.where(joint >= 1, 1.0, np.where(joint > 0, values, -1.0))


def _c_v_of(single: np.ndarray, joint: np.ndarray, windows: int) -> float:
    if not (single > 0).all():
        raise DataError("corpus: C_V is not defined where a top word does not occur in it")
    added = np.log(joint + EPSILON)
    vectors = (added - np.log(np.outer(single, single))) / -added
    whole = vectors.sum(0)
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(whole)
    return float((vectors @ whole / norms).mean())
