"""Verdicts beside true errors, on regressions whose posterior is a normal in closed form.

The long version, over published posteriors as well, is `python -m benchmarks.verdicts`.
"""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi.guides import FullRank, MeanField
from tests.scenarios import isolated, randn

NOISE = 0.7


def model(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * beta.unsqueeze(-2)).sum(-1), NOISE), obs=y)


def judged(guide: type, steps: int | None, seed: int) -> tuple[str, float]:
    """The verdict, and the largest error of a mean in sds or relative error of an sd."""
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    with isolated(torch.float32), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = randn(40, 4, seed=seed) + 1.5 * randn(40, 1, seed=seed + 50)
        y = x.sum(1) + NOISE * randn(40, seed=seed + 100)
        fit = pvi.fit(model, guide, args=(x, y), seed=seed, progress=False, **options)
        verdict = fit.diagnose(seed=seed).verdict
        beta = fit.posterior.sample(20_000, seed=seed)["beta"].double()
        x, y = x.double(), y.double()
        cov = torch.linalg.inv(x.T @ x / NOISE**2 + torch.eye(4) / 4)
        sd = cov.diagonal().sqrt()
        mean = (beta.mean(0) - cov @ x.T @ y / NOISE**2).abs() / sd
        return verdict, float(torch.maximum(mean, (beta.std(0) / sd - 1).abs()).max())


@pytest.mark.parametrize("seed", range(3))
def test_exact_guides_are_good_and_others_are_not(seed: int) -> None:
    verdict, error = judged(FullRank, None, seed)
    assert error < 0.05
    assert verdict == "good"
    for guide, steps in ((MeanField, None), (FullRank, 10), (MeanField, 40)):
        verdict, error = judged(guide, steps, seed)
        assert error > 0.2
        assert verdict in ("correctable", "unreliable")
        assert verdict == "unreliable" or error < 1
