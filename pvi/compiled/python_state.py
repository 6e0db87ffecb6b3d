"""Numbers in Python, and tensors that are no parameters or buffers, that a program reaches: a graph
would never see them change.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

PLAIN = (bool, int, float, str)
DEPTH = 4


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
            for key, value in vars(module).items():
                if not key.startswith("_"):
                    yield f"{name}.{key}" if name else key, value
    elif isinstance(item, FunctionType):
        yield from _reached(item)
    elif isinstance(item, partial):
        yield from (("func", item.func), ("args", list(item.args)), ("kw", item.keywords))
    elif isinstance(item, dict):
        yield from ((str(k), v) for k, v in list(item.items())[:100] if isinstance(k, PLAIN))
    elif isinstance(item, list | tuple):
        yield from ((str(i), v) for i, v in enumerate(item[:100]))
    elif hasattr(item, "__func__") and hasattr(item, "__self__"):
        yield from (("self", item.__self__), ("method", item.__func__))
    elif not isinstance(item, type | ModuleType) and _is_users(item):
        yield from vars(item).items()


def _is_users(item: Any) -> bool:
    """Whether an object with attributes is of no library's kind."""
    library = type(item).__module__.split(".")[0] in ("torch", "numpy", "pyro", "pvi")
    return hasattr(item, "__dict__") and not library


def _reached(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function's code names: the variables of its closure and its globals."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet
            continue
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if value is not None and not isinstance(value, type | ModuleType):
            yield name, value
    if hasattr(function, "__wrapped__"):
        yield "wrapped", vars(function)["__wrapped__"]
