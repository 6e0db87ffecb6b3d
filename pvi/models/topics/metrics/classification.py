"""What topics know of labels that they were not fitted to."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pvi.errors import DataError
from pvi.models.topics.labels import known_labels


@dataclass(frozen=True)
class Classification:
    """Held-out scores of a linear classifier whose inputs are shares of topics.

    Attributes:
        accuracy: the share of test documents with the right label.
        macro_f1: the F1 score of each label, averaged over labels.
        majority: the accuracy of always saying the label most frequent in training.
        num_train, num_test: documents.
    """

    accuracy: float
    macro_f1: float
    majority: float
    num_train: int
    num_test: int

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.3f}, macro F1 {self.macro_f1:.3f} on {self.num_test:,} "
            f"documents (most frequent label: {self.majority:.3f})"
        )


def classification(
    model: Any, train: Any, train_labels: Any, test: Any, test_labels: Any
) -> Classification:
    """Fit a logistic regression of labels on topics, and score it on other documents.

    Its inputs are the logarithms of the shares, centred and scaled, since shares near zero differ
    by orders of magnitude; its penalty is scikit-learn's default (C = 1).

    Args:
        model: fitted, with `transform`; or None, where `train` and `test` are shares `(N, K)`.
        train, test: counts `(N, V)`.
        train_labels, test_labels: one a document; those with None, NaN or "" are left out.

    Raises:
        DataError: another number of labels than of documents, one label only, or none to test.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    seen, known = _labelled("train", _log_shares(model, train), train_labels)
    new, asked = _labelled("test", _log_shares(model, test), test_labels)
    values, counts = np.unique(known, return_counts=True)
    if len(values) < 2:
        raise DataError("train_labels: expected at least two different labels")
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(seen, known)
    said = fitted.predict(new)
    return Classification(
        accuracy=float(accuracy_score(asked, said)),
        macro_f1=float(f1_score(asked, said, average="macro")),
        majority=float((asked == values[counts.argmax()]).mean()),
        num_train=len(known),
        num_test=len(asked),
    )


def _labelled(name: str, rows: np.ndarray, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose label is known, and these labels."""
    values = np.asarray(labels)
    if values.shape != (len(rows),):
        raise DataError(
            f"{name}_labels: expected one for each of {len(rows)} documents, got shape "
            f"{values.shape}"
        )
    known = known_labels(values)
    if not known.any():
        raise DataError(f"{name}_labels: no document has one")
    return rows[known], np.array(values[known].tolist())  # None has made objects of them


def _log_shares(model: Any, X: Any) -> np.ndarray:
    shares = np.asarray(X if model is None else model.transform(X), dtype=float)
    return np.log(shares.clip(1e-12))
