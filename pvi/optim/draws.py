"""Fixed draws that stand for a standard normal."""

import torch
from torch import Tensor


def matched_normals(num: int, size: int, seed: int) -> Tensor:
    """Draws whose first moments, and where it can be the second, are those of a standard normal.

    They come in pairs $\\pm\\epsilon$, so every odd moment is 0. With at least 4 `size` draws they
    are whitened, $\\frac1K \\sum_k \\epsilon_k \\epsilon_k^\\top = I$; with fewer each number has
    variance 1. The average of a quadratic function over them is then exact, and the optimum of a
    Gaussian posterior's bound over them is the posterior.

    Args:
        num: K, even.

    Returns:
        `(num, size)`, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    like = {"dtype": torch.float64, "device": "cpu"}
    half = torch.randn(num // 2, size, generator=generator, **like)
    if num >= 4 * size:
        root = torch.linalg.cholesky(half.mT @ half / len(half))
        half = torch.linalg.solve_triangular(root, half.mT, upper=False).mT
    else:
        half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half])
