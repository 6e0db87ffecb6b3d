"""The mutual information gap where the information is known."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pvi.diagnostics.disentangling import mutual_information_gap
from pvi.errors import DataError, GuideError


def factors() -> Tensor:
    """All pairs of a bit and one of three values, ten times."""
    return torch.cartesian_prod(torch.arange(2), torch.arange(3)).repeat(10, 1)


def latents(means: Tensor, sd: float = 0.05) -> dist.Independent:
    return dist.Normal(means.float(), sd).to_event(1)


def test_each_factor_alone() -> None:
    v = factors()
    found = mutual_information_gap(latents(v), v, num_draws=200)
    assert found.gap == pytest.approx(1.0, abs=1e-6)
    logs = torch.tensor([math.log(2), math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(found.entropy, logs)
    diagonal = found.information.diagonal()
    assert (diagonal - logs).abs().max() < 4 * found.se.diagonal().max() + 1e-6
    assert found.information.fliplr().diagonal().abs().max() < 0.2


def test_two_latents_for_one_factor() -> None:
    """The bit is in two latents: no gap. The other factor is in one, which is half of the mean."""
    v = factors()
    found = mutual_information_gap(latents(v[:, [0, 0, 1]]), v, num_draws=500)
    torch.testing.assert_close(found.gaps, torch.tensor([0.0, 1.0]).double(), atol=1e-6, rtol=0)
    assert found.gap == pytest.approx(0.5, abs=1e-6)


def test_information_of_overlapping_normals() -> None:
    """One bit in N(0, 1) or N(2, 1): the integral by quadrature."""
    v = torch.arange(2).repeat(50)[:, None]
    means = torch.stack([2.0 * v[:, 0], torch.zeros(100)], 1)
    found = mutual_information_gap(latents(means, 1.0), v, num_draws=4000, seed=1)
    grid = torch.linspace(-9.0, 11.0, 20_001, dtype=torch.float64)
    p, q = (dist.Normal(m, 1.0).log_prob(grid).exp() for m in (0.0, 2.0))
    mixture = (p + q) / 2
    exact = torch.trapezoid((p * (p / mixture).log() + q * (q / mixture).log()) / 2, grid)
    assert float(found.se[0, 0]) < 0.01
    assert abs(float(found.information[0, 0] - exact)) < 4 * float(found.se[0, 0])
    assert float(found.information[1].abs().max()) < 1e-6
    assert found.gap == pytest.approx(float(exact) / math.log(2), abs=0.06)


def test_some_draws_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    v = factors()
    whole = mutual_information_gap(latents(v, 0.5), v, num_draws=100)
    monkeypatch.setattr("pvi.diagnostics.disentangling.NUMBERS", 700)
    parts = mutual_information_gap(latents(v, 0.5), v, num_draws=100)
    torch.testing.assert_close(parts.information, whole.information)


def test_refused() -> None:
    v = factors()
    with pytest.raises(DataError, match="two values or more"):
        mutual_information_gap(latents(v), v.clone().fill_(1))
    with pytest.raises(DataError, match=r"shape \(60, K\)"):
        mutual_information_gap(latents(v), v[:5])
    with pytest.raises(GuideError, match="independent"):
        mutual_information_gap(dist.MultivariateNormal(v.float(), torch.eye(2)), v)
    with pytest.raises(GuideError, match="two or more"):
        mutual_information_gap(latents(v[:, :1]), v)
