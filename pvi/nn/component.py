"""Modules that know how they were made, so that they can be saved without code."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from pvi.errors import CheckpointError

SIMPLE = (bool, int, float, str, type(None))
Tree = dict[str, Any]


class Component(nn.Module):
    """An `nn.Module` whose constructor's arguments are attributes of the same names.

    So are scikit-learn's estimators, and `describe` makes plain data of it: numbers, strings, lists
    of them, and other components.
    """

    def get_params(self, deep: bool = False) -> Tree:
        """The constructor's arguments by name.

        Args:
            deep: also those of components among them, as `decoder__hidden`.
        """
        parameters = inspect.signature(type(self)).parameters.values()
        names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found = {name: getattr(self, name) for name in names}
        if deep:
            for name, value in list(found.items()):
                if isinstance(value, Component):
                    found |= {f"{name}__{k}": v for k, v in value.get_params(True).items()}
        return found


def describe(value: Any) -> Any:
    """Plain data that `make` turns into the same value again, with new parameters.

    A module that is no component becomes `{"module": its class}`: its code is not ours to save. A
    `ModuleList` is a list.

    Raises:
        CheckpointError: neither plain data nor a module.
    """
    if isinstance(value, SIMPLE):
        return value
    if isinstance(value, list | tuple | nn.ModuleList):
        return [describe(x) for x in value]
    if isinstance(value, Mapping):
        return {"dict": {str(k): describe(v) for k, v in value.items()}}
    if isinstance(value, Component) and type(value).__module__.startswith("pvi."):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {
            "component": name,
            "arguments": {k: describe(v) for k, v in value.get_params().items()},
        }
    if isinstance(value, nn.Module):
        return {"module": type(value).__name__}
    raise CheckpointError(
        f"{value!r} can't be saved as plain data; use numbers, strings, lists, dicts or modules"
    )


def make(described: Any, given: Mapping[str, Any], name: str = "") -> Any:
    """The inverse of `describe`.

    Args:
        given: modules by the name of the argument, for those that were not saved.
        name: of the argument that is made.

    Raises:
        CheckpointError: a module is missing, or the file names something that is no component.
    """
    if isinstance(described, list):
        return [make(x, given, name) for x in described]
    if not isinstance(described, Mapping):
        return described
    if "dict" in described:
        return {k: make(v, given, name) for k, v in described["dict"].items()}
    if "module" in described:
        raise CheckpointError(
            f"'{name}' is a {described['module']} of your own, whose code is not saved: give it to "
            f"load, {name}=..."
        )
    kind = _class(described["component"])
    arguments = described["arguments"].items()
    ours = {k for k, v in arguments if k in given and isinstance(v, Mapping | list)}  # modules
    return kind(**{k: given[k] if k in ours else make(v, given, k) for k, v in arguments})


def argument_names(described: Any) -> set[str]:
    """The names of all arguments in what `describe` made, those of components in it too."""
    if isinstance(described, list):
        return set().union(*map(argument_names, described))
    if not isinstance(described, Mapping) or "arguments" not in described:
        return set()
    arguments = described["arguments"]
    return set(arguments).union(*map(argument_names, arguments.values()))


def _class(name: str) -> type[Component]:
    """Only classes of pvi: a file must not choose code to run."""
    module, _, kind = name.partition(":")
    found = getattr(import_module(module), kind, None) if module.startswith("pvi.") else None
    if not (isinstance(found, type) and issubclass(found, Component)):
        raise CheckpointError(f"the file names {name!r}, which is no component of pvi")
    return found
