"""Run a captured step: operation by operation, or compiled by inductor."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pvi.compiled.errors import NotCompilable

Function = Callable[..., Sequence[Tensor]]


def make_function(graph: fx.GraphModule, backend: str) -> Function:
    """A function of the graph's inputs; compilation happens at its first call.

    Args:
        backend: "graph" runs the operations one by one, "inductor" compiles them.

    Raises:
        NotCompilable: (from the function) the compiler fails.
    """
    if backend == "graph":
        return graph
    options: dict[str, Any] = {"fallback_random": True, "cpp_wrapper": True}
    compiled = torch.compile(graph, fullgraph=True, dynamic=False, options=options)

    made = False

    def function(*inputs: Tensor) -> Sequence[Tensor]:
        nonlocal made
        if made:
            return compiled(*inputs)
        try:
            with warnings.catch_warnings():  # of the compiler, which are no concern of the user's
                warnings.simplefilter("ignore")
                result = compiled(*inputs)
            made = True
            return result
        except Exception as error:  # of the compiler, whose errors have no common class
            text = next((x for x in reversed(str(error.__cause__ or error).splitlines()) if x), "")
            message = f"torch.compile fails ({type(error).__name__}: {text[:160]})"
            raise NotCompilable(message) from error

    return function
