"""The mode of a density."""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_ITER, RESTARTS = 100, 5


def maximize(
    f: Callable[[Tensor], Tensor], start: Tensor, max_iter: int = MAX_ITER, restarts: int = RESTARTS
) -> Tensor:
    """The best finite point that L-BFGS with a strong Wolfe line search finds from `start`.

    Args:
        f: a smooth function of a vector.
        max_iter: iterations of one search; where one has failed or not ended, the next goes on
            from its best point, without its memory.

    Reference:
        Liu and Nocedal 1989.

    >>> f = lambda x: -((x - 1.0) ** 4).sum() - (x - 1.0).square().sum()
    >>> bool((maximize(f, torch.zeros(3)) - 1.0).abs().max() < 1e-3)
    True
    """
    best, best_value = start.detach().clone(), -torch.inf
    for _ in range(restarts):
        x = best.clone().requires_grad_()
        search = torch.optim.LBFGS(
            [x],
            max_iter=max_iter,
            history_size=20,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )
        before = best_value

        def closure(x: Tensor = x, search: torch.optim.Optimizer = search) -> Tensor:
            nonlocal best, best_value
            search.zero_grad()
            loss = -f(x)
            loss.backward()
            value = -float(loss.detach())
            if x.grad is None or not (loss.isfinite() and bool(x.grad.isfinite().all())):
                x.grad = torch.zeros_like(x)
                return torch.full_like(loss, torch.inf)
            if value > best_value:
                best, best_value = x.detach().clone(), value
            return loss

        search.step(closure)  # type: ignore[arg-type]
        if not best_value > before + 1e-9 * (1.0 + abs(before)):
            break
    return best
