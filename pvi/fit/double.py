"""Double precision for the deterministic route: in single, the last digits hide the optimum."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pvi.guides.mean_field import NormalGuide


@contextmanager
def in_double(guide: NormalGuide) -> Iterator[None]:
    """The guide, and whatever the model makes, in double precision for a while."""
    default, own = torch.get_default_dtype(), [(p, p.dtype) for p in guide.parameters()]
    torch.set_default_dtype(torch.float64)
    for p, _ in own:
        p.data = p.data.double()
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        for p, dtype in own:
            p.data = p.data.to(dtype)


def doubled(x: Any) -> Any:
    """Arguments with their floating tensors in double precision."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, dict) and type(x) is dict:
        return {k: doubled(v) for k, v in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_make"):
        return x._make(map(doubled, x))  # type: ignore[attr-defined]
    if type(x) in (list, tuple):
        return type(x)(map(doubled, x))
    return x
