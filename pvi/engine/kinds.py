"""Which kinds of objects may be data, and what to do with the others."""

import inspect
from collections.abc import Mapping
from types import GeneratorType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from pvi.errors import DataError

NUMBERS = "Encode it as numbers first."


def check_data(data: Any) -> None:
    """Refuse what can't be the rows of data as a whole.

    Raises:
        DataError: saying what it is instead.
    """
    if isinstance(data, str | bytes):
        raise DataError(
            f"data is a {type(data).__name__}, {data!r}, where rows are needed: a tensor or an "
            "array, a tuple or a dict of them. Read a file first (pandas.read_csv, numpy.load)."
        )
    if inspect.isgenerator(data) or type(data).__name__ in ("map", "zip", "filter"):
        raise DataError(
            f"data is a {type(data).__name__}, which can be read only once. Make a tensor of it: "
            "torch.tensor(list(data))."
        )
    if isinstance(data, nn.Module) or inspect.isroutine(data) or inspect.isclass(data):
        raise DataError(
            "data is a program, where rows are needed: a tensor or an array, a tuple or a dict of "
            "them. The order is pvi.fit(model, guide, data)."
        )


def check_constants(args: Any, kwargs: Any) -> None:
    """Refuse `args` that are no tuple or list, and `kwargs` that are no dict.

    Raises:
        DataError: with the right way to write it.
    """
    if not isinstance(args, tuple | list):
        raise DataError(
            f"args must be a tuple of the model's further arguments, got {_kind(args)}. One "
            "argument alone is args=(value,)."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise DataError(f"kwargs must be a dict from argument name to value, got {_kind(kwargs)}.")


def check_rows_kind(name: str, value: Any) -> None:
    """Refuse an entry of `data=` that is neither numbers nor a plain constant.

    Raises:
        DataError: naming the argument.
    """
    if isinstance(value, str | bytes):
        raise DataError(
            f"argument '{name}' is a {type(value).__name__}, {value!r}, where data are numbers. "
            "Encode it as numbers, or pass it in args= or kwargs= if it is no data."
        )
    if isinstance(value, GeneratorType | set | frozenset | map | zip | filter | range | ModuleType):
        raise DataError(
            f"argument '{name}' is a {type(value).__name__}, where data are numbers in an order "
            "that stays. Make a list or a tensor of it: torch.tensor(list(...))."
        )


def array_of(name: str, value: Any) -> np.ndarray:
    """A list, series, frame or array as an array of numbers.

    Raises:
        DataError: naming the argument and what it holds.
    """
    label = f"argument '{name}'" if name else "an argument"
    if isinstance(value, list):
        try:
            value = np.asarray([x.detach().cpu() if isinstance(x, Tensor) else x for x in value])
        except ValueError as error:
            raise DataError(
                f"{label} is a list of items of different lengths, which make no "
                "array. Pad them to one length and mask what was added (poutine.mask)."
            ) from error
    if value.dtype == object or value.dtype.kind in "USMm":
        raise DataError(
            f"{label} is an array of dtype {value.dtype}, which can't become a tensor of numbers"
            f"{_example(value)}. {NUMBERS} Missing values: NaN in an array of floats."
        )
    return value


def _example(value: np.ndarray) -> str:
    return f" (such as {value.flat[0]!s})" if value.size else ""


def _kind(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
    return f"a {type(value).__name__}{shape}"
