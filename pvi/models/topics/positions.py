"""Where words begin in a space that is learned."""

from typing import Any

import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from torch import Tensor

from pvi.models.topics.counts import some_documents

ROWS = 20_000  # documents that are looked at
ITERATIONS = 3  # of the randomised decomposition


def word_positions(matrix: Any, positions: Tensor) -> Tensor:
    """Words by latent semantic analysis, at length 1, so that words of like documents are close.

    The right singular vectors of the documents' tf-idf, times their singular values. Words without
    documents stay where they are, as do dimensions beyond the corpus's. Random numbers are torch's.

    Args:
        matrix: counts `(N, V)` in CSR form.
        positions: random ones to begin with `(V, E)`.

    Reference:
        Deerwester, Dumais, Furnas, Landauer and Harshman (1990), Indexing by latent semantic
        analysis.
    """
    counts, seed = some_documents(matrix, ROWS), int(torch.randint(2**31 - 1, ()))
    size = min(positions.shape[1], min(counts.shape) - 1)
    if size < 1:
        return positions
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    found: Any = TruncatedSVD(size, n_iter=ITERATIONS, random_state=seed).fit(weighted)
    words = torch.as_tensor(found.components_.T * found.singular_values_).to(positions)
    length = words.norm(dim=1, keepdim=True)
    known = length > 1e-6 * length.max()
    filled = torch.cat([words / length, positions[:, size:]], 1)
    return torch.where(known, filled, positions)
