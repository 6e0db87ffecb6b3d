"""A step of a fit as one graph of tensor operations, read off a run of the program itself.

The program is run as it is, on its live parameters, while `make_fx` notes the operations on them,
through autograd and Pyro's effect handlers alike. Parameters, buffers, data and weights are inputs
of the graph; whatever else the program computes in Python is a constant in it. So it is run twice,
with other parameters, another batch and another random state: constants that differ are refused.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx

from pvi.compiled.draws import Recorder, Replayer
from pvi.compiled.errors import OURS, NotCompilable, place
from pvi.engine.traces import preserved_rng

RUNS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # tested from there on
READS = ("get value out of a tracing tensor", "data-dependent", "_local_scalar_dense")
HELD = "held draws"
HIDDEN = (torch.ops.aten.native_batch_norm,)  # change their inputs without saying so
CONSTANTS = 1 << 27  # numbers in a value that is known to be the same in each step


def trace(
    step: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], fixed: Sequence[Tensor] = ()
) -> fx.GraphModule:
    """The operations of one step from its inputs to what it returns.

    Args:
        step: runs the program; random numbers, buffers and modes are as it finds them.
        inputs: the live tensors that may change from step to step, in the graph's order.
        fixed: those of them whose values never change, so that the program may look at them.

    Raises:
        NotCompilable: it looks at the values of the others, or fails while it is traced.
    """

    def run(*live: Tensor) -> Sequence[Tensor]:
        with replayer:
            _know(fixed)
            with torch.enable_grad():
                return list(step())

    if not RUNS:
        raise NotCompilable(f"torch {torch.__version__} is older than 2.13")
    with _quiet(), preserved_rng(), Recorder() as recorder:
        step()
        roles = recorder.roles()
    replayer = Replayer(recorder.drawn, roles)
    with _quiet(), preserved_rng(), _constants():
        try:
            known: Any = get_decompositions(HIDDEN)
            graph = make_fx(run, known, record_stack_traces=True)(*inputs)
        except NotCompilable:
            raise
        except Exception as error:  # whatever a program raises on tensors that are being traced
            raise NotCompilable(_reason(error)) from error
    graph.meta[HELD] = replayer.held()
    return graph


def differences(first: fx.GraphModule, second: fx.GraphModule) -> str:
    """What is baked into two graphs of one program and differs; "" if nothing is."""
    one, two = list(first.graph.nodes), list(second.graph.nodes)
    number = [{node: i for i, node in enumerate(nodes)} for nodes in (one, two)]
    for a, b in zip(one, two, strict=False):
        if (a.op, _target(a)) != (b.op, _target(b)):
            return f"the operations change from step to step{_line(a)}"
        if a.op == "get_attr":
            x, y = getattr(first, str(a.target)), getattr(second, str(b.target))
            held = any(x is value for value in first.meta[HELD])
            if isinstance(x, Tensor) and not held and not _equal(x, y):
                user = next(iter(a.users), a)
                what = "a tensor that is no parameter or buffer changes from step to step"
                return f"{what}{_line(user)}"
        elif _plain(a, number[0]) != _plain(b, number[1]):
            return f"a number computed in Python changes from step to step{_line(a)}"
    return "" if len(one) == len(two) else "the number of operations changes from step to step"


@contextmanager
def _quiet() -> Iterator[None]:
    """No validation, whose checks look at values, and no warnings of tracing."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False):  # its recurrent networks are opaque
            yield


@contextmanager
def _constants() -> Iterator[None]:
    """Let make_fx keep track of known values of any size: of the fixed inputs, not of others."""
    before = proxy_tensor.CONSTANT_NUMEL_LIMIT
    proxy_tensor.CONSTANT_NUMEL_LIMIT = CONSTANTS
    try:
        yield
    finally:
        proxy_tensor.CONSTANT_NUMEL_LIMIT = before


def _know(fixed: Sequence[Tensor]) -> None:
    """Tell make_fx that these inputs have known values."""
    mode: Any = get_proxy_mode()
    with proxy_tensor.disable_proxy_modes_tracing():
        for x in fixed:
            slot = get_proxy_slot(x, mode.tracer)
            proxy_tensor.track_tensor_tree(x, slot.proxy, constant=x, tracer=mode.tracer)


def _reason(error: Exception) -> str:
    where = place(error)
    text = (str(error).splitlines() or [""])[0]
    if any(part in str(error) for part in READS):
        text = "the program looks at the value of a tensor (.item(), bool(), if, ...)"
    else:
        text = f"it can't be traced ({type(error).__name__}: {text[:160]})"
    return f"{text} {where}".strip()


def _target(node: fx.Node) -> Any:
    return node.op if node.op in ("get_attr", "placeholder", "output") else node.target


def _plain(node: fx.Node, number: dict[fx.Node, int]) -> str:
    def key(x: Any) -> Any:
        return f"%{number[x]}" if isinstance(x, fx.Node) else x

    return repr(fx.map_arg((node.args, node.kwargs), lambda x: _Name(key(x))))


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _equal(x: Tensor, y: Any) -> bool:
    same = isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype
    return same and bool(torch.isclose(x.detach(), y.detach(), 0.0, 0.0, equal_nan=True).all())


def _line(node: fx.Node) -> str:
    """The line of the user's code that a node comes from."""
    text = node.meta.get("stack_trace") or ""
    for line in reversed(text.splitlines()):
        if line.strip().startswith("File ") and not any(part in line for part in OURS):
            parts = line.strip().split(", ")
            return f" ({parts[1]} of {parts[0].split('/')[-1].rstrip(chr(34))})"
    return ""
