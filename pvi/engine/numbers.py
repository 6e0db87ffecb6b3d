"""Whole numbers and seeds, as arguments of public functions."""

from numbers import Integral
from typing import Any

from pvi.errors import FitError, PviError

SEEDS = 2**64


def whole_number(name: str, value: Any, least: int = 1, error: type[PviError] = FitError) -> int:
    """The value as an `int`, numpy's included; truth values are no numbers here.

    Raises:
        PviError: of the given kind, naming the argument.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise error(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(value)


def check_seed(seed: Any) -> int | None:
    """A seed that torch takes, or `None`.

    Raises:
        FitError: it is negative, too large, or no whole number.
    """
    if seed is None:
        return None
    seed = whole_number("seed", seed, 0)
    if seed >= SEEDS:
        raise FitError(f"seed must be a whole number below 2**64, got {seed}")
    return seed
