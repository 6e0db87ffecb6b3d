"""Small real data for demonstrations, from scikit-learn."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pvi.errors import DataError


@dataclass(frozen=True)
class Table:
    """A regression table, standardised: `x` `(N, D)`, `y` `(N,)`, and the columns' names."""

    x: np.ndarray
    y: np.ndarray
    columns: tuple[str, ...]


def diabetes() -> Table:
    """Disease progression in 442 patients from ten measurements (Efron et al. 2004)."""
    bunch: Any = sklearn_datasets().load_diabetes()
    return Table(_standard(bunch.data), _standard(bunch.target), tuple(bunch.feature_names))


def digits() -> np.ndarray:
    """1,797 handwritten digits, 8 x 8 pixels, each a count from 0 to 16: `(N, 64)`."""
    bunch: Any = sklearn_datasets().load_digits()
    return bunch.data


def _standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0)


def sklearn_datasets() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError("these data come with scikit-learn: pip install 'pvi[topics]'") from error
    return datasets
