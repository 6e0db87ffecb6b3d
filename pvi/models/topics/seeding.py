"""Topics to begin with: those of documents that are unlike each other."""

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

ROWS = 5000  # documents that are looked at
NEAR = 20  # documents of a topic


def document_topics(matrix: Any, topics: int) -> Tensor:
    """Logits of topics $\\log p(w)$ `(K, V)`, less the corpus', from groups of similar documents.

    The first document of a group is drawn as by k-means++: with the squared distance from those
    before, 1 less the affinity $\\sum_w \\sqrt{p_w q_w}$. A topic is half the words of the group,
    half those of the corpus. Random numbers are torch's.

    Args:
        matrix: counts `(N, V)` in CSR form.
        topics: K.

    Reference:
        Arthur and Vassilvitskii (2007), k-means++: the advantages of careful seeding.
    """
    filled = np.flatnonzero(np.diff(matrix.indptr))
    if not len(filled):
        return torch.zeros(topics, matrix.shape[1])
    order = torch.randperm(len(filled))[:ROWS].numpy()
    counts: Any = csr_matrix(matrix[np.sort(filled[order])], dtype=np.float64)
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
        rows.append(np.log(0.5 * _shares(counts[near]) + 0.5 * corpus) - np.log(corpus))
    return torch.as_tensor(np.stack(rows)).to(torch.get_default_dtype())


def _shares(counts: Any) -> np.ndarray:
    """Of words in some documents, each counted once more in a thousand."""
    totals = np.asarray(counts.sum(0), np.float64).ravel() + 1e-3
    return totals / totals.sum()
