"""Topic models of other libraries, with the methods of scikit-learn's estimators.

Each keeps `cpu_s`, the processor seconds of its fit, and says its settings in `settings`.
"""

import time
from typing import Any

import numpy as np

SETTINGS = {
    "tomotopy LDA": "Gibbs, 500 iterations, alpha .1 and eta .01 at the start, both optimised",
    "scikit-learn LDA": "online, 15 epochs, batch 1024, alpha .1, eta .01",
}


class TomotopyLDA:
    """Collapsed Gibbs sampling (`tomotopy.LDAModel`), one worker."""

    def __init__(self, n_components: int, random_state: int, iterations: int = 500) -> None:
        self.n_components, self.seed, self.iterations = n_components, random_state, iterations

    def fit(self, X: Any) -> "TomotopyLDA":
        import tomotopy

        self.model = tomotopy.LDAModel(k=self.n_components, alpha=0.1, eta=0.01, seed=self.seed)
        for words in _texts(X):
            if words:
                self.model.add_doc(words)
        self.model.train(self.iterations, workers=1)
        columns = np.array([int(word) for word in self.model.used_vocabs])
        found = [self.model.get_topic_word_dist(k) for k in range(self.n_components)]
        self.components_ = np.zeros((self.n_components, X.shape[1]))
        self.components_[:, columns] = np.array(found)
        unseen = np.setdiff1d(np.arange(X.shape[1]), columns)
        self.components_[:, unseen] = 1e-12  # its vocabulary is that of the training documents
        return self

    def transform(self, X: Any) -> np.ndarray:
        prior = np.asarray(self.model.alpha)
        shares = np.tile(prior / prior.sum(), (X.shape[0], 1))
        for row, words in enumerate(_texts(X)):
            document = self.model.make_doc(words) if words else None
            if document is not None:
                shares[row] = self.model.infer(document, iterations=100, workers=1)[0]
        return shares


def sklearn_lda(n_components: int, random_state: int) -> Any:
    """Online variational Bayes of scikit-learn."""
    from sklearn.decomposition import LatentDirichletAllocation

    return LatentDirichletAllocation(
        n_components,
        doc_topic_prior=0.1,
        topic_word_prior=0.01,
        learning_method="online",
        batch_size=1024,
        max_iter=15,
        random_state=random_state,
    )


PEERS = {"tomotopy LDA": TomotopyLDA, "scikit-learn LDA": sklearn_lda}


def timed_fit(model: Any, X: Any, y: Any = None, **more: Any) -> float:
    """Fit; processor seconds."""
    start = time.process_time()
    model.fit(X, *([] if y is None else [y]), **more)
    return time.process_time() - start


def _texts(X: Any) -> list[list[str]]:
    """Documents as words, which are column numbers."""
    names = np.arange(X.shape[1]).astype(str)
    rows = (slice(a, b) for a, b in zip(X.indptr, X.indptr[1:], strict=False))
    return [np.repeat(names[X.indices[r]], X.data[r].astype(int)).tolist() for r in rows]
