"""Held-out likelihood that means the same for every model: completion of documents."""

from typing import Any

import numpy as np
from scipy import sparse

from pvi.errors import DataError
from pvi.models.topics.metrics.checks import as_components, as_counts

ROWS = 1024  # documents whose words are looked up at once


def split_tokens(X: Any, seed: int = 0) -> tuple[Any, Any]:
    """Each document's tokens in two halves at random; of an odd number, the first has one more.

    Args:
        X: counts `(N, V)`.
        seed: of the choice.

    Returns:
        Counts `(N, V)` of both halves, which sum to `X`.

    >>> first, second = split_tokens([[2, 1], [0, 4]])
    >>> (first + second).toarray().tolist(), first.sum(1).tolist()
    ([[2, 1], [0, 4]], [[2], [2]])
    """
    counts = as_counts(X)
    numbers = counts.data.astype(np.int64)
    if (numbers != counts.data).any():
        raise DataError("corpus: expected whole counts of tokens to split, got fractions")
    lengths = np.asarray(counts.sum(1)).ravel().astype(np.int64)
    document = np.repeat(np.arange(counts.shape[0]), lengths)
    cell = np.repeat(np.arange(counts.nnz), numbers)  # of each token; cells are sorted by document
    order = np.lexsort((np.random.default_rng(seed).random(len(cell)), document))
    rank = np.arange(len(cell)) - np.repeat(lengths.cumsum() - lengths, lengths)
    chosen = order[rank < np.repeat((lengths + 1) // 2, lengths)]
    first = np.bincount(cell[chosen], minlength=counts.nnz)
    return _with_data(counts, first), _with_data(counts, numbers - first)


def dc_perplexity(model: Any, X: Any, *, seed: int = 0, **more: Any) -> float:
    """Perplexity of the second half of each document given the first: document completion.

    $$\\exp\\Bigl(-\\frac{\\sum_{dv} n^{(2)}_{dv} \\log p(v \\mid \\hat\\theta_d)}
      {\\sum_{dv} n^{(2)}_{dv}}\\Bigr), \\qquad
      \\hat\\theta_d = \\mathrm{E}[\\theta \\mid n^{(1)}_d]$$

    It depends on predicted probabilities of words alone, so that any two models can be compared on
    one corpus. The multinomial coefficient has no part in it. Lower is better; a model that knows
    nothing has the number of words.

    Args:
        model: fitted, with `transform`, and either `log_likelihood(X, given=)` as the models here,
            or `components_` as scikit-learn's LDA, when $p(v \\mid \\theta) = \\sum_k \\theta_k
            \\beta_{kv}$, both normalised first.
        X: counts `(N, V)`.
        seed: of the split.
        more: what else the model's methods take of documents, such as `embeddings`.

    Raises:
        DataError: no document has two tokens.

    Reference:
        Wallach, Murray, Salakhutdinov and Mimno (2009), section 5.1.
    """
    first, second = split_tokens(X, seed)
    tokens = second.sum()
    if not tokens:
        raise DataError("corpus: no document has two tokens, so there is nothing to complete")
    if hasattr(model, "log_likelihood"):
        found = model.log_likelihood(second, given=first, **more)
    else:
        found = mixture_log_likelihood(model.transform(first, **more), model, second)
    return float(np.exp(-found.sum() / tokens))


def mixture_log_likelihood(shares: Any, topics: Any, X: Any) -> np.ndarray:
    """$\\sum_v n_{dv} \\log \\sum_k \\theta_{dk} \\beta_{kv}$ of each document, in nats `(N,)`.

    Args:
        shares: of topics in documents `(N, K)`; rows are normalised.
        topics: a fitted model or `components_` `(K, V)`; rows are normalised.
        X: counts `(N, V)`.
    """
    beta = as_components(topics)
    beta = beta / beta.sum(1, keepdims=True)
    theta = np.asarray(shares, dtype=float)
    theta = theta / theta.sum(1, keepdims=True)
    counts = as_counts(X, beta.shape[1])
    result = np.zeros(counts.shape[0])
    for start in range(0, len(result), ROWS):
        part = counts[start : start + ROWS].tocoo()
        mixed = np.einsum("ik,ki->i", theta[start + part.row], beta[:, part.col])
        with np.errstate(divide="ignore"):  # a word that the model rules out: minus infinity
            found = part.data * np.log(mixed)
        result[start : start + ROWS] = np.bincount(part.row, found, part.shape[0])
    return result


def unigram_perplexity(train: Any, X: Any, *, seed: int = 0) -> float:
    """`dc_perplexity` of the words' shares in `train`, each counted once more: what to beat."""
    counts = as_counts(train)
    shares = np.asarray(counts.sum(0)).ravel() + 1.0
    _, second = split_tokens(as_counts(X, counts.shape[1]), seed)
    if not second.sum():
        raise DataError("corpus: no document has two tokens, so there is nothing to complete")
    return float(np.exp(-(second @ np.log(shares / shares.sum())).sum() / second.sum()))


def _with_data(counts: Any, data: np.ndarray) -> Any:
    made = sparse.csr_matrix((data, counts.indices, counts.indptr), counts.shape, copy=True)
    made.eliminate_zeros()  # in place
    return made
