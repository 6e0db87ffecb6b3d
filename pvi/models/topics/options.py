"""What the numbers among a topic model's parameters may be."""

from numbers import Integral, Real
from typing import Any

from pvi.errors import ModelError

WHOLE = ("n_components", "batch_size")
POSITIVE = ("concentration", "topic_concentration", "sparsity", "step", "lr")
SHARES = ("dropout", "topic_dropout", "momentum")


def check_options(model: Any) -> None:
    """Refuse numbers that make no model.

    Raises:
        ModelError: by name, with what was expected and what came.
    """
    for name in WHOLE:
        _check(model, name, "a whole number from 1", _whole)
    for name in POSITIVE:
        _check(model, name, "a number above 0", lambda v: _real(v) and v > 0)
    for name in SHARES:
        _check(model, name, "at least 0 and below 1", lambda v: _real(v) and 0 <= v < 1)
    _check(
        model, "total_documents", "None or a whole number from 1", lambda v: v is None or _whole(v)
    )
    _check(model, "label_weight", "at least 0", lambda v: _real(v) and v >= 0)
    _check(model, "hidden", "one or more whole numbers, units of layers", _layers)
    if not hasattr(model.word_embeddings, "shape") and not isinstance(model.word_embeddings, list):
        _check(model, "word_embeddings", "a matrix (V, E), or E, a whole number from 1", _whole)


def _check(model: Any, name: str, expected: str, holds: Any) -> None:
    value = getattr(model, name)
    default = value is None and name == "concentration"  # the family's
    if not default and not holds(value):
        raise ModelError(f"{name} must be {expected}, got {value!r}")


def _real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _layers(value: Any) -> bool:
    try:
        units = list(value)
    except TypeError:
        return False
    return bool(units) and all(map(_whole, units))
