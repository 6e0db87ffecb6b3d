"""Numbers in Python, and tensors that are no parameters or buffers, that a program reaches: a graph
would never see them change.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

PLAIN = (bool, int, float, str)
DEPTH = 4
LIBRARIES = ("torch", "numpy", "pyro", "pvi", "zuko", "builtins")
SMALL = 1 << 12  # numbers in an array whose values are looked at
INNER = set(vars(nn.Module()))  # of a module: its tensors and hooks


def numbers(*programs: Any) -> dict[str, Any]:
    """The plain values and tensors that programs reach, by where they are.

    Looks into modules, objects, closures, lists, dicts and the globals that the code names.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    stack = [("", program, 0) for program in programs]
    while stack:
        name, item, depth = stack.pop()
        if isinstance(item, PLAIN):
            found[name] = item
        elif isinstance(item, Tensor) and not isinstance(item, nn.Parameter):
            found[name] = (id(item), item._version)  # another one, or written to
        elif isinstance(item, np.ndarray) and item.dtype != object:
            found[name] = hash(item.tobytes()) if item.size <= SMALL else id(item)
        elif isinstance(item, Iterator):
            found[name] = object()  # whose place can't be seen: never equal
        elif depth <= DEPTH and id(item) not in seen:
            seen.add(id(item))
            for key, value in _parts(item):
                stack.append((f"{name}.{key}" if name else key, value, depth + 1))
    return found


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The first value that is another one; "" if all are the same."""
    for name, value in before.items():
        if name in after and after[name] != value:
            return name
    return next((name for name in after if name not in before), "")


def _parts(item: Any) -> Iterator[tuple[str, Any]]:
    """What an object of the user's holds."""
    if isinstance(item, nn.Module):
        for name, module in item.named_modules():
            hidden = "_" if _is_library(type(module)) else "_pyro"
            for key, value in vars(module).items():
                if key == "training" or not (key in INNER or key.startswith(hidden)):
                    yield f"{name}.{key}" if name else key, value
        yield from _code_of(type(item))
    elif isinstance(item, FunctionType):
        yield from _reached(item)
    elif isinstance(item, partial):
        yield from (("func", item.func), ("args", list(item.args)), ("kw", item.keywords))
    elif isinstance(item, dict):
        yield from ((str(k), v) for k, v in list(item.items())[:100] if isinstance(k, PLAIN))
    elif isinstance(item, list | tuple):
        yield from ((str(i), v) for i, v in enumerate(item[:100]))
    elif isinstance(item, set | frozenset | deque):
        yield "items", repr([x for x in item if isinstance(x, PLAIN)][:100])
    elif hasattr(item, "__func__") and hasattr(item, "__self__"):
        yield from (("self", item.__self__), ("method", item.__func__))
    elif isinstance(item, type) and not _is_library(item):
        yield from vars(item).items()
    elif not isinstance(item, type | ModuleType) and not _is_library(type(item)):
        yield from getattr(item, "__dict__", {}).items()
        yield from _code_of(type(item))


def _is_library(kind: type) -> bool:
    """Whether a class is of no user's."""
    return kind.__module__.split(".")[0] in LIBRARIES


def _code_of(kind: type) -> Iterator[tuple[str, Any]]:
    """The user's classes that an object is of, whose methods may hold numbers."""
    yield from ((base.__name__, base) for base in kind.__mro__ if not _is_library(base))


def _reached(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function's code names: the variables of its closure and its globals."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet
            continue
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if value is not None and not isinstance(value, ModuleType):
            yield name, value
    yield "defaults", [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    yield from vars(function).items()


def _names(code: CodeType) -> Iterator[str]:
    """What code names, and that of functions and comprehensions in it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
