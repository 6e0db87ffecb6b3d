"""Component collapse: topics that no document uses, that copy each other, or that say nothing."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pvi.errors import DataError
from pvi.models.topics.metrics.checks import as_components, as_counts, top_word_ids
from pvi.text import table

TOP_N = 10


@dataclass(frozen=True)
class Collapse:
    """What each topic is used for, and what it tells.

    Attributes:
        share: of all tokens, the topic's `(K,)`.
        sd: of the topic's share among documents `(K,)`; near 0, documents do not tell it apart.
        leads: documents of which it is the largest topic `(K,)`.
        kl_words: KL of the topic's words from those of the corpus, nats `(K,)`; near 0, the topic
            says nothing that the corpus does not.
        overlap: of the topic's top words, the share it has in common with the most similar other
            topic `(K,)`.
        twin: that topic `(K,)`.
        active: topics with a share of their own: `sd` above `threshold` `(K,)`.
        duplicate: topics of which most top words are those of an earlier topic `(K,)`.
        threshold: in units of share.
    """

    share: np.ndarray
    sd: np.ndarray
    leads: np.ndarray
    kl_words: np.ndarray
    overlap: np.ndarray
    twin: np.ndarray
    active: np.ndarray
    duplicate: np.ndarray
    threshold: float

    @property
    def num_active(self) -> int:
        return int(self.active.sum())

    @property
    def num_duplicates(self) -> int:
        return int(self.duplicate.sum())

    def __str__(self) -> str:
        """All topics, the largest first, under a line of summary."""
        lines = [
            f"{self.num_active} of {len(self.share)} topics active (sd of the share among "
            f"documents above {self.threshold:g}), {self.num_duplicates} duplicates"
        ]
        rows = [
            [
                k,
                f"{self.share[k]:.4f}",
                f"{self.sd[k]:.4f}",
                self.leads[k],
                f"{self.kl_words[k]:.2f}",
                f"{self.overlap[k]:.1f} ({self.twin[k]})",
            ]
            for k in np.argsort(-self.share)
        ]
        header = ["topic", "share", "sd", "leads", "KL words", "overlap (with)"]
        return "\n".join([*lines, table(header, rows)])


def collapse(
    model: Any, X: Any, *, threshold: float = 0.01, top_n: int = TOP_N, shares: Any = None
) -> Collapse:
    """Which topics are in use, which repeat others, and how far each is from the corpus's words.

    $$\\mathrm{KL}_k = \\sum_v \\beta_{kv} \\log \\frac{\\beta_{kv}}{p(v)}, \\qquad
      p(v) = \\frac{n_v + 1}{\\sum_w (n_w + 1)}$$

    with n the counts of words in `X`.

    Args:
        model: fitted, with `transform` and `components_`.
        X: counts `(N, V)`.
        threshold: of the sd of a topic's share among documents, below which it is inactive.
        top_n: words that are compared, but at most half of all; a duplicate has more than half of
            them in common with an earlier topic.
        shares: `model.transform(X)`, where it is known already.

    Raises:
        DataError: fewer than two documents, or one topic.
    """
    beta = as_components(model)
    beta = beta / beta.sum(1, keepdims=True)
    counts = as_counts(X, beta.shape[1])
    if counts.shape[0] < 2 or len(beta) < 2:
        raise DataError("expected at least two documents and two topics to compare")
    theta = np.asarray(model.transform(X) if shares is None else shares, dtype=float)
    if theta.shape != (counts.shape[0], len(beta)):
        raise DataError(
            f"shares: expected {(counts.shape[0], len(beta))}, documents by topics, got "
            f"{theta.shape}"
        )
    lengths = np.asarray(counts.sum(1)).ravel()
    words = np.asarray(counts.sum(0)).ravel() + 1.0
    log_ratio = np.log(beta.clip(1e-300)) - np.log(words / words.sum())
    sd = theta.std(0)
    common = _common(top_word_ids(model, min(top_n, -(-beta.shape[1] // 2))))
    return Collapse(
        share=lengths @ theta / max(lengths.sum(), 1),
        sd=sd,
        leads=np.bincount(theta.argmax(1)[lengths > 0], minlength=len(beta)),
        kl_words=(beta * log_ratio).sum(1),
        overlap=common.max(1),
        twin=common.argmax(1),
        active=sd > threshold,
        duplicate=np.tril(common, -1).max(1) > 0.5,
        threshold=threshold,
    )


def _common(ids: np.ndarray) -> np.ndarray:
    """The share of words that two topics have in common `(K, K)`; 0 with itself."""
    held = np.zeros((len(ids), ids.max() + 1))
    np.put_along_axis(held, ids, 1.0, axis=1)
    common = held @ held.T / ids.shape[1]
    np.fill_diagonal(common, 0.0)
    return common
