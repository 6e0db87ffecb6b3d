"""Data of a topic model's methods: checked, and as tensors."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_non_negative, validate_data
from torch import Tensor

from pvi.errors import DataError
from pvi.models.topics.labels import known_labels

COLUMNS = ("embeddings", "covariates")


def checked_counts(model: Any, X: Any, *, reset: bool) -> Any:
    """Counts as a CSR matrix `(N, V)` of the vocabulary that was fitted.

    Args:
        model: the estimator, which remembers V.
        reset: whether it is to be fitted.

    Raises:
        DataError: texts.
        ValueError: as scikit-learn raises it: not finite, negative, or another vocabulary.
    """
    if _are_texts(X):
        raise DataError(
            "X must be counts of words (N, V), got texts: count them by CountVectorizer"
        )
    kinds = [np.float64, np.float32]
    X = validate_data(model, X, accept_sparse="csr", dtype=kinds, reset=reset)
    check_non_negative(X, type(model).__name__)
    matrix = X if issparse(X) else csr_matrix(X)
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    return matrix


def _are_texts(X: Any) -> bool:
    row = getattr(X, "ndim", 1) == 1 and hasattr(X, "__len__") and len(X) > 0
    return isinstance(X, str) or (row and isinstance(next(iter(X)), str))


def columns(
    model: Any, matrix: Any, y: Any, given: Mapping[str, Any], *, reset: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What else belongs to documents as tensors, and the options that are left.

    Args:
        model: the estimator.
        matrix: counts `(N, V)`.
        y: labels.
        given: keyword arguments, of which some are columns.
        reset: whether the model is to be fitted.

    Raises:
        DataError: a column is missing, unknown to the model, or of another shape.
    """
    rest, found = dict(given), {}
    for name in COLUMNS:
        value = rest.pop(name, None)
        if value is not None:
            found[name] = numbers(name, value, matrix.shape[0])
    moments = rest.pop("times", None)
    if moments is not None:
        found["times"] = times(model, moments, matrix.shape[0])
    elif reset and model.decoder == "dynamic":
        raise DataError("topics that change need times=, one for each document")
    if not reset:
        check_known(model, found)
    if "labels" in model.heads and y is not None:
        found["labels"] = labels(model, y, matrix.shape[0])
    elif "labels" in model.heads and reset:
        raise DataError("a model with the head 'labels' needs y, one label for each document")
    return found, rest


def numbers(name: str, value: Any, rows: int, of: str = "document") -> Tensor:
    """A matrix of finite numbers, one row for each document or what else."""
    array = value.toarray() if issparse(value) else np.asarray(value)
    if array.ndim != 2 or len(array) != rows or array.dtype.kind not in "biuf":
        raise DataError(
            f"{name} must be numbers of shape ({rows}, any), one row for each {of}, got "
            f"{array.dtype} of shape {array.shape}"
        )
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise DataError(f"{name}[{row}] is not finite: drop or impute the {of}")
    return torch.as_tensor(np.require(array, requirements="W")).to(torch.get_default_dtype())


def check_known(model: Any, found: Mapping[str, Tensor]) -> None:
    """Columns must be those of the fit."""
    programs = model.programs_
    wanted = {"embeddings": programs.encoder.embeddings, "covariates": programs.covariates}
    for name, width in wanted.items():
        got = found[name].shape[1] if name in found else 0
        if got != width:
            raise DataError(
                f"the model was fitted with {width} {name} for each document, got {got}: give "
                f"{name}= as in fit"
            )
    if bool(programs.times) != ("times" in found):
        needs = "needs" if programs.times else "was fitted without"
        raise DataError(f"the model {needs} times= of documents")


def times(model: Any, value: Any, rows: int) -> Tensor:
    """Times as numbers of the sorted times that were fitted."""
    values = np.asarray(value)
    if values.shape != (rows,):
        raise DataError(
            f"times must hold one time for each of {rows} documents, got {values.shape}"
        )
    if values.dtype.kind not in "iufM":
        raise DataError(
            f"times must be numbers or numpy's dates, which have an order, got {values.dtype}"
        )
    missing = np.flatnonzero(~np.isfinite(values))  # infinite, NaN or NaT
    if len(missing):
        raise DataError(
            f"times[{missing[0]}] is {values[missing[0]]}: leave out documents without a time"
        )
    if not hasattr(model, "times_"):
        model.times_ = np.unique(values)
    codes = np.searchsorted(model.times_, values).clip(max=len(model.times_) - 1)
    strange = values[model.times_[codes] != values]
    if len(strange):
        raise DataError(f"times has {strange[0]!r}, which fit did not see")
    return torch.as_tensor(codes, dtype=torch.long)


def labels(model: Any, y: Any, rows: int) -> Tensor:
    """Labels as numbers of classes, -1 where unknown: -1, None, NaN or ""."""
    values = np.asarray(y)
    if values.shape != (rows,):
        raise DataError(f"y must hold one label for each of {rows} documents, got {values.shape}")
    known = known_labels(values) & np.array([v != -1 for v in values.tolist()], dtype=bool)
    if not hasattr(model, "classes_"):
        check_classification_targets(values[known].tolist())
        model.classes_ = np.unique(values[known])
        if len(model.classes_) < 2:
            raise DataError(
                f"y must hold two classes or more, got {len(model.classes_)} class(es); -1, None, "
                "NaN and '' are no classes, but stand for unknown labels"
            )
    place = {v: i for i, v in enumerate(model.classes_.tolist())}
    strange = [v for v in values[known].tolist() if v not in place]
    if strange:
        raise DataError(f"y has the label {strange[0]!r}, which fit did not see")
    codes = np.full(rows, -1)
    codes[known] = [place[v] for v in values[known].tolist()]
    return torch.as_tensor(codes, dtype=torch.long)
