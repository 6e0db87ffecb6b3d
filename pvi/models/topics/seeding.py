"""Topics to begin with: of documents that are unlike each other, and what EM makes of them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvi.models.topics.coordinate import CoordinateAscent
from pvi.models.topics.counts import Bag, Counts, some_documents
from pvi.models.topics.likelihoods import topic_rows

ROWS = 5000  # documents that are looked at
NEAR = 20  # documents of a topic
BATCHES, SWEEPS = 25, 5  # of expectation maximisation
PRIOR = 0.1  # concentration of both Dirichlets there


def document_topics(matrix: Any, topics: int) -> Tensor:
    """$p(w \\mid k)$ `(K, V)` of groups of similar documents.

    The first document of a group is drawn as by k-means++: with the squared distance from those
    before, 1 less the affinity $\\sum_w \\sqrt{p_w q_w}$. A topic is half the words of the group,
    half those of the corpus. Random numbers are torch's.

    Args:
        matrix: counts `(N, V)` in CSR form.
        topics: K.

    Reference:
        Arthur and Vassilvitskii (2007), k-means++: the advantages of careful seeding.
    """
    counts = some_documents(matrix, ROWS)
    if not counts.shape[0]:
        return torch.full((topics, matrix.shape[1]), 1.0 / matrix.shape[1])
    roots = counts.copy()
    lengths = np.maximum(np.asarray(counts.sum(1)).ravel(), np.finfo(float).tiny)
    roots.data = np.sqrt(counts.data / np.repeat(lengths, np.diff(counts.indptr)))
    corpus = _shares(counts)
    rows, far = [], np.ones(counts.shape[0])
    for _ in range(topics):
        chance = torch.from_numpy(far.clip(min=1e-12))
        affinity = roots @ roots[int(torch.multinomial(chance, 1))].toarray().ravel()
        far = np.minimum(far, (1.0 - affinity).clip(min=0.0) ** 2)
        near = np.argsort(-affinity, kind="stable")[:NEAR]
        rows.append(0.5 * _shares(counts[near]) + 0.5 * corpus)
    return torch.as_tensor(np.stack(rows)).to(torch.get_default_dtype())


def maximised(matrix: Any, topics: Tensor) -> Tensor:
    """$p(w \\mid k)$ `(K, V)` after a few sweeps of LDA's expectation maximisation in steps.

    A network learns to find shares more slowly than topics move, so that they should be good ones
    when it begins. Random numbers are torch's.

    Args:
        matrix: counts `(N, V)` in CSR form.
        topics: $p(w \\mid k)$ to begin with `(K, V)`.

    Reference:
        Cappé and Moulines (2009), On-line expectation-maximization algorithm for latent data
        models; Hoffman, Blei and Bach (2010).
    """
    data = Counts(some_documents(matrix, ROWS))
    ascent, totals = CoordinateAscent(len(topics), PRIOR), torch.zeros_like(topics)
    parts = torch.randperm(len(data)).tensor_split(min(BATCHES, len(data)) or 1)
    for number, rows in enumerate(parts * SWEEPS):
        batch = data.batch(rows.numpy())
        bag = Bag.of(batch["words"], batch["counts"])
        found = ascent.assigned(bag, topic_rows(topics, bag))
        rate = (number + 1.0) ** -0.6
        totals = (1.0 - rate) * totals
        totals.index_add_(1, bag.words, (rate * len(parts)) * found.T)
        topics = (totals + PRIOR) / (totals + PRIOR).sum(-1, keepdim=True)
    return topics


def _shares(counts: Any) -> np.ndarray:
    """Of words in some documents, each counted once more in a thousand."""
    totals = np.asarray(counts.sum(0), np.float64).ravel() + 1e-3
    return totals / totals.sum()
