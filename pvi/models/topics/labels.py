"""Which documents have a label."""

from typing import Any

import numpy as np


def known_labels(labels: Any) -> np.ndarray:
    """Whether each is one: None, NaN, NaT and "" are none.

    >>> known_labels(["a", "", None]).tolist()
    [True, False, False]
    """
    import pandas

    values = np.asarray(labels)
    empty = np.array([v == "" for v in values.tolist()], dtype=bool)
    return ~(empty | pandas.isna(values))
