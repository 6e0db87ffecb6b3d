"""Shares of topics by label and over time, with standard errors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pvi.errors import DataError
from pvi.models.topics.labels import known_labels

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class TopicsByGroup:
    """Mean shares of K topics in G groups of documents.

    Attributes:
        groups: labels or times, sorted `(G,)`; of a period, its middle.
        mean: `(G, K)`; rows sum to 1.
        se: standard errors of the means over documents `(G, K)`; NaN for one document.
        counts: documents in each group `(G,)`.
    """

    groups: np.ndarray
    mean: np.ndarray
    se: np.ndarray
    counts: np.ndarray

    def to_pandas(self) -> "DataFrame":
        """The means, one row a group and one column a topic, after the number of documents."""
        import pandas

        table = pandas.DataFrame(self.mean, index=pandas.Index(self.groups, name="group"))
        table.insert(0, "documents", self.counts)
        return table


def topics_by_label(shares: Any, labels: Any) -> TopicsByGroup:
    """Mean shares of topics in the documents of each label.

    Args:
        shares: of topics in documents `(N, K)`.
        labels: `(N,)`; documents with the label "", None or NaN have none, and are left out.

    Raises:
        DataError: another number of labels, or no labels.

    >>> found = topics_by_label([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]], ["a", "a", "b"])
    >>> found.groups.tolist(), found.mean.tolist()
    (['a', 'b'], [[0.75, 0.25], [0.2, 0.8]])
    """
    values = np.asarray(labels)
    theta = _checked(shares, values, "labels")
    known = known_labels(values)
    if not known.any():
        raise DataError("labels: no document has one")
    groups, place = np.unique(values[known], return_inverse=True)
    return _averages(theta[known], groups, place)


def topics_over_time(
    shares: Any, times: Any, *, num_bins: int = 12, min_documents: int = 1
) -> TopicsByGroup:
    """Mean shares of topics in periods of equal length.

    Args:
        shares: of topics in documents `(N, K)`.
        times: `(N,)`, numbers or dates; documents with NaN or NaT are left out.
        num_bins: periods; those without documents are left out. Where there are no more different
            times than that, each has its own.
        min_documents: in a period; others are left out.

    Raises:
        DataError: another number of times, no times, infinite ones, or no period with so many
            documents.
    """
    values = np.asarray(times)
    theta = _checked(shares, values, "times")
    if values.dtype.kind not in "iufM":
        raise DataError(f"times: expected numbers or numpy's dates, got {values.dtype}")
    if num_bins < 1:
        raise DataError(f"num_bins: expected at least 1, got {num_bins}")
    dates = values.dtype.kind == "M"
    values = values.astype("datetime64[s]") if dates else values
    known = ~(np.isnat(values) if dates else np.isnan(values))
    if not known.any():
        raise DataError("times: no document has one")
    seconds = values[known].astype(np.float64)
    if np.isinf(seconds).any():
        raise DataError("times: expected finite numbers, or NaN where unknown, got an infinite one")
    single, place = np.unique(seconds, return_inverse=True)
    if len(single) <= num_bins:
        middle = single
    else:
        edges = np.linspace(single[0], single[-1], num_bins + 1)
        bins = np.searchsorted(edges[1:-1], seconds, side="right")
        full, place = np.unique(bins, return_inverse=True)
        middle = (edges[full] + edges[full + 1]) / 2
    groups = middle.round().astype(np.int64).astype("datetime64[s]") if dates else middle
    found = _averages(theta[known], groups, place)
    kept = found.counts >= min_documents
    if not kept.any():
        raise DataError(f"times: no period has {min_documents} documents; lower min_documents")
    parts = (found.groups, found.mean, found.se, found.counts)
    return TopicsByGroup(*(part[kept] for part in parts))


def _checked(shares: Any, values: np.ndarray, name: str) -> np.ndarray:
    theta = np.asarray(shares, dtype=float)
    if theta.ndim != 2 or values.shape != (len(theta),):
        raise DataError(
            f"{name}: expected one for each row of shares {theta.shape}, got shape {values.shape}"
        )
    return theta


def _averages(theta: np.ndarray, groups: np.ndarray, place: np.ndarray) -> TopicsByGroup:
    parts = [theta[place == g] for g in range(len(groups))]
    mean = np.array([part.mean(0) for part in parts])
    return TopicsByGroup(
        groups, mean, np.array(list(_errors(parts))), np.array([len(part) for part in parts])
    )


def _errors(parts: list[np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        if len(part) > 1:
            yield part.std(0, ddof=1) / np.sqrt(len(part))
        else:
            yield np.full(part.shape[1], np.nan)
