"""Networks in bfloat16, densities in single precision."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any, Literal

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import Transform

from pvi.engine.params import Params
from pvi.engine.traces import Program
from pvi.errors import FitError
from pvi.guides import Amortized, Guide

Precision = Literal["bf16"]
LOW = torch.bfloat16


def lowered(
    model: Program, guide: Program, own: Program, params: Params
) -> tuple[Program, Program]:
    """Both programs with their matrix products and convolutions in bfloat16 (`torch.autocast`).

    Parameters stay as they are. At every `pyro.sample`, distribution and value become float32, and
    draws are made without autocast; log densities, KLs and their sums follow outside of the
    programs. Of a guide of `pvi.guides` only the encoders run in bfloat16: its matrix products are
    the geometry of the posterior, not a network.

    Args:
        model, guide: as they are run, perhaps wrapped for minibatches.
        own: the guide without wrappers.
        params: of both, for their device and dtype.

    Raises:
        FitError: no parameter is float32, so nothing would change.
    """
    found = params.named().values()
    if not any(p.dtype == torch.float32 for p in found):
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in found})
        raise FitError(
            f"precision='bf16' needs parameters in float32, but they are {', '.join(kinds)}. "
            "Leave precision= out, or make networks and data float32."
        )
    device = next(iter(found)).device.type
    ours = isinstance(own, Guide)
    low_guide = _encoders(guide, own, device) if ours else _autocast(guide, device)
    return _autocast(model, device), low_guide


class Upcast(Messenger):
    """Effect handler: whatever reaches a sample statement is float32 and drawn without autocast.

    Its `device` is the type of the device, such as "cuda".
    """

    device = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self._open = ExitStack()

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = raised(msg["fn"])
        if isinstance(msg["value"], Tensor):
            msg["value"] = raised(msg["value"])
        self._open.enter_context(torch.autocast(self.device, enabled=False))

    def _pyro_post_sample(self, msg: Any) -> None:
        self._open.close()

    def _pyro_pvi_effect(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor):
            msg["value"] = raised(msg["value"])

    def __exit__(self, *error: Any) -> None:
        self._open.close()
        return super().__exit__(*error)


def raised(x: Any) -> Any:
    """Bfloat16 tensors as float32, also inside of distributions, transforms, tuples and dicts.

    >>> import pyro.distributions as dist
    >>> fn = dist.Normal(torch.zeros(2, dtype=torch.bfloat16), 1.0).to_event(1)
    >>> raised(fn).base_dist.loc.dtype
    torch.float32
    """
    if isinstance(x, Tensor):
        return x.float() if x.dtype == LOW else x
    if isinstance(x, Mapping) and type(x) is dict:
        return {key: raised(value) for key, value in x.items()}
    if type(x) in (list, tuple):
        values = [raised(value) for value in x]
        return tuple(values) if type(x) is tuple else values
    if isinstance(x, Distribution | TorchDistributionMixin | Transform):
        found = {key: raised(value) for key, value in vars(x).items()}
        changed = {key: value for key, value in found.items() if not _same(value, vars(x)[key])}
        if not changed:
            return x
        new = copy(x)
        new.__dict__.update(changed)
        return new
    return x


def _same(new: Any, old: Any) -> bool:
    """Whether nothing was raised; lists and dicts are made anew each time."""
    if isinstance(new, dict):
        return all(_same(new[key], old[key]) for key in new)
    if isinstance(new, list | tuple):
        return all(map(_same, new, old))
    return new is old


def _autocast(program: Program, device: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        handler = Upcast()
        handler.device = device
        with handler, torch.autocast(device, dtype=LOW):
            return program(*args, **kwargs)

    return run


def _encoders(program: Program, guide: Guide, device: str) -> Program:
    """A guide of ours with its encoders in bfloat16."""
    parts = [part for part in guide.modules() if isinstance(part, Amortized)]
    if not parts:
        return program

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(_low(part.encoder, device))
            return program(*args, **kwargs)

    return run


@contextmanager
def _low(module: nn.Module, device: str) -> Iterator[None]:
    """Calls of a module in bfloat16, their results in float32."""
    open_: list[Any] = []

    def before(*call: Any) -> None:
        open_.append(torch.autocast(device, dtype=LOW))
        open_[-1].__enter__()

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        open_.pop().__exit__(None, None, None)
        return raised(out)

    first = module.register_forward_pre_hook(before)
    last = module.register_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()
