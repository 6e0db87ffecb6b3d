"""The mode of a density."""

from collections.abc import Callable

import torch
from torch import Tensor

from pvi.optim.lbfgs import Search

MAX_ITER, STEEP = 500, 1e-7


def maximize(f: Callable[[Tensor], Tensor], start: Tensor, max_iter: int = MAX_ITER) -> Tensor:
    """The best finite point that L-BFGS finds from `start`.

    Args:
        f: a smooth function of a vector.

    >>> f = lambda x: -((x - 1.0) ** 4).sum() - (x - 1.0).square().sum()
    >>> bool((maximize(f, torch.zeros(3)) - 1.0).abs().max() < 1e-3)
    True
    """

    def descent(x: Tensor) -> tuple[float, Tensor]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = -f(x)
            (gradient,) = torch.autograd.grad(loss, x)
        return float(loss.detach()), gradient

    return Search(descent, start).run(STEEP, max_iter).x
