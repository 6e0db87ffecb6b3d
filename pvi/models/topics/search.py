"""How many topics? Fits of several numbers, measured alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pvi.errors import FitError
from pvi.models.topics import metrics
from pvi.plots.topics import plot_topic_search
from pvi.progress import progress
from pvi.text import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

HIGHER = {"perplexity": False, "npmi": True, "diversity": True, "active": True}


@dataclass(frozen=True)
class TopicSearch:
    """Runs of different numbers of topics, one an entry.

    Attributes:
        n_components: K.
        seeds: of the runs.
        perplexity: by completion of held-out documents.
        npmi: coherence of the top 10 words in the training documents.
        diversity: share of distinct words among the top 25.
        active: topics in use, as of `metrics.collapse`.
    """

    n_components: np.ndarray
    seeds: np.ndarray
    perplexity: np.ndarray
    npmi: np.ndarray
    diversity: np.ndarray
    active: np.ndarray

    def best(self, by: str = "perplexity") -> int:
        """The number of topics whose runs are best on average.

        Args:
            by: perplexity, npmi, diversity or active. They need not agree: perplexity wants topics
                to predict words, NPMI to be read.
        """
        if by not in HIGHER:
            raise FitError(f"by: expected one of {', '.join(HIGHER)}, got {by!r}")
        known = np.unique(self.n_components)
        means = np.array([getattr(self, by)[self.n_components == k].mean() for k in known])
        return int(known[(means if HIGHER[by] else -means).argmax()])

    def plot(self) -> "Figure":
        """The curve of each measure; the number of the lowest perplexity is marked."""
        curves = {"held-out perplexity": self.perplexity, "NPMI": self.npmi}
        curves |= {"topic diversity": self.diversity, "active topics": self.active}
        return plot_topic_search(self.n_components.tolist(), curves, self.best())

    def to_pandas(self) -> "DataFrame":
        """One row a run."""
        import pandas

        return pandas.DataFrame(vars(self))

    def __str__(self) -> str:
        rows = [
            [k, seed, f"{p:.1f}", f"{c:.3f}", f"{d:.3f}", a]
            for k, seed, p, c, d, a in zip(*vars(self).values(), strict=True)
        ]
        header = ["topics", "seed", "perplexity", "NPMI", "diversity", "active"]
        return f"{table(header, rows)}\nlowest perplexity: {self.best()} topics"


def search_topics(
    model: Any,
    X: Any,
    X_test: Any,
    n_components: Sequence[int],
    *,
    y: Any = None,
    seeds: Sequence[int] = (0,),
    **options: Any,
) -> TopicSearch:
    """Fit a model with each number of topics, and measure every fit.

    Args:
        model: an estimator with the parameters `n_components` and `random_state`; it is copied.
        X: counts to fit `(N, V)`.
        X_test: counts held out `(M, V)`.
        n_components: numbers of topics.
        y: labels of `X`, for models that want them.
        seeds: one fit each; runs of one number show how far seeds alone move a measure.
        options: more for `fit`.

    Raises:
        FitError: no numbers, no seeds, or fewer than two topics.
    """
    from sklearn.base import clone

    if not len(n_components) or not len(seeds) or min(n_components) < 2:
        raise FitError(
            f"expected numbers of topics from 2 on and seeds, got {list(n_components)} and "
            f"{list(seeds)}"
        )
    runs = [(k, seed) for k in n_components for seed in seeds]
    rows = []
    for k, seed in progress(runs, "numbers of topics"):
        made: Any = clone(model)
        made.set_params(n_components=k, random_state=seed).fit(X, y, **options)
        top = min(25, X.shape[1])
        rows.append(
            (
                k,
                seed,
                metrics.dc_perplexity(made, X_test),
                metrics.npmi(made, X, top_n=min(10, X.shape[1])).mean,
                metrics.topic_diversity(made, top_n=top),
                metrics.collapse(made, X).num_active,
            )
        )
    return TopicSearch(*(np.array(column) for column in zip(*rows, strict=True)))
