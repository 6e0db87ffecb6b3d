"""Data that a likelihood has no density for, in words."""

import math

from torch import Tensor

from pvi.errors import DataError


def check_support(
    kind: str, values: str, advice: str, inside: Tensor, x: Tensor, name: str = "X"
) -> None:
    """Refuse data that have no density.

    Args:
        kind: of the likelihood.
        values: what data may be, in words.
        advice: what to do about others.
        inside: which elements of x have a density.
        name: of x.

    Raises:
        DataError: naming the first element, and what to do.
    """
    bad = ~inside
    if bad.any():
        place = tuple(bad.nonzero()[0].tolist())
        value = float(x[place])
        advice = advice if math.isfinite(value) else "Drop or impute what is not finite."
        raise DataError(
            f"{kind} needs {values}, but {int(bad.sum()):,} of {bad.numel():,} elements of {name} "
            f"are not, first {name}{list(place)} = {value:.4g}. {advice}"
        )
