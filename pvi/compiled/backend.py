"""Run a captured step: operation by operation, or compiled by inductor."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pvi.compiled.errors import NotCompilable

Function = Callable[..., Sequence[Tensor]]


def make_function(graph: fx.GraphModule, backend: str) -> Function:
    """A function of the graph's inputs.

    Args:
        backend: "graph" runs the operations one by one, "inductor" compiles them.
    """
    return graph if backend == "graph" else compiled(graph)


def compiled(function: Callable[..., Any], *, own_code: bool = False) -> Callable[..., Any]:
    """A function of tensors, compiled at its first call.

    Args:
        own_code: the function is one of many with the same code, which the compiler would take for
            one and the same.

    Raises:
        NotCompilable: (from the function) the compiler fails.
    """
    if own_code:
        function.__code__ = function.__code__.replace()  # type: ignore[attr-defined]
    options: dict[str, Any] = {"fallback_random": True, "cpp_wrapper": True}
    fast = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    made = False

    def run(*inputs: Any) -> Any:
        nonlocal made
        if made:
            return fast(*inputs)
        try:
            with warnings.catch_warnings():  # of the compiler, which are no concern of the user's
                warnings.simplefilter("ignore")
                result = fast(*inputs)
        except Exception as error:  # of the compiler, whose errors have no common class
            lines = [line.strip() for line in str(error.__cause__ or error).splitlines()]
            told = next((line for line in lines if "Error" in line), lines[0] if lines else "")
            message = f"torch.compile fails ({type(error).__name__}: {told[:160]})"
            raise NotCompilable(message) from error
        made = True
        return result

    return run
