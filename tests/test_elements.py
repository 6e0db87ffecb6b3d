"""Latents in plates: verdicts by the weights of single elements, where the truth is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from tests.scenarios import isolated, param, randn

SD = 0.5**0.5  # of z given x, if both are N(0, 1) and N(z, 1)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def posterior(x: Tensor, off: Tensor | float = 0.0, narrow: Tensor | float = 1.0) -> pvi.Posterior:
    """A guide that is off the posteriors N(x/2, 1/2) by so many sds, and narrower."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + off * SD, narrow * SD * torch.ones(len(x))))

    return pvi.Posterior(model, guide, (x,))


def evidence(x: Tensor) -> float:
    return dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()


@pytest.mark.parametrize("rows", [50, 1500])
def test_exact_local_posteriors_are_good_in_any_number(rows: int) -> None:
    with isolated():
        x = randn(rows)
        got = pvi.diagnose(posterior(x), 2000)
    assert got.verdict == "good"
    assert got.num_draws == 2000
    assert len(got.elements) == min(rows, 500)
    assert got.evidence == pytest.approx(evidence(x), abs=1e-3)
    assert got.bound == pytest.approx(evidence(x), abs=1e-3)
    assert got.ess == pytest.approx(2000)


def test_small_errors_of_many_elements_are_good_though_the_joint_weights_fail() -> None:
    """0.05 sds in each of 400 elements: one sd in all, and the joint ESS is S/e."""
    with isolated():
        x = randn(400)
        got = pvi.diagnose(posterior(x, off=0.05 * torch.ones(400)), 4000)
    assert got.verdict == "good"
    assert got.sd_log_ratio == pytest.approx(0.05 * 20, rel=0.1)
    assert got.evidence == pytest.approx(evidence(x), abs=0.1)
    assert got.bound == pytest.approx(evidence(x) - 400 * 0.05**2 / 2, abs=4 * got.bound_se)


def test_names_the_worst_elements() -> None:
    off, narrow = torch.zeros(100), torch.ones(100)
    narrow[[7, 31]] = 0.3
    with isolated():
        got = pvi.diagnose(posterior(randn(100), off, narrow), 4000)
        many = pvi.diagnose(posterior(randn(100), narrow=0.1), 4000)
        moved = pvi.diagnose(posterior(randn(100), off=0.4), 4000)
    assert got.verdict == "good"
    assert "2 of 100 elements of 'data'" in got.reasons[1]
    assert {"data[7]", "data[31]"} == {e.name for e in got.elements if e.khat > 0.7 or e.ess < 0.1}
    assert many.verdict == "unreliable"
    assert sum(e.khat > 0.7 or e.ess < 0.1 for e in many.elements) > 90
    assert math.isnan(many.evidence)
    assert moved.verdict == "correctable"
    assert all(e.shift == pytest.approx(-0.4, abs=0.15) for e in moved.elements)


def test_several_numbers_in_an_element_and_two_plates() -> None:
    def nested(x: Tensor) -> None:
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            loc = x / 2
            loc[2, 1, 1] += 0.5 * SD
            pyro.sample("z", dist.Normal(loc, SD).to_event(1))

    with isolated():
        got = pvi.diagnose(pvi.Posterior(nested, guide, (randn(4, 3, 2),)), 4000)
    rows = {row.name: row.shift for row in got.table}
    assert len(rows) == 24
    assert rows["z[2, 1, 1]"] == pytest.approx(-0.5, abs=0.1)
    assert all(abs(s) < 0.1 for name, s in rows.items() if name != "z[2, 1, 1]")
    (worst,) = [e for e in got.elements if abs(e.shift) > 0.1]
    assert worst.name == "columns, rows[2, 1]"


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("group", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@pytest.mark.parametrize(("narrow", "verdict"), [(1.0, "not assessed"), (0.1, "unreliable")])
def test_many_latents_beside_global_ones(narrow: float, verdict: str) -> None:
    """Given mu, theta is N((y + mu)/2, 1/2): the guide knows that, or is too narrow."""

    def guide(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(param("m", 0.3), 0.1))
        with pyro.plate("group", len(y)):
            pyro.sample("theta", dist.Normal((y + mu) / 2, narrow * SD))

    with isolated():
        guide(randn(1100))
        got = pvi.diagnose(pvi.Posterior(hierarchy, guide, (randn(1100),)))
    assert got.verdict == verdict
    assert "given the other latents, " in got.reasons[0]
    assert "of 500 elements of 'group' (1,100 in all)" in got.reasons[0]
    failing = sum(e.khat > 0.7 or e.ess < 0.1 for e in got.elements)
    assert failing == 0 if verdict == "not assessed" else failing > 450


def test_a_guide_that_ties_elements_together_is_judged_jointly() -> None:
    def whole(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        root = torch.linalg.cholesky(0.3 * torch.eye(3) + 0.2)
        pyro.sample("z", dist.MultivariateNormal(x / 2, scale_tril=root))

    with isolated():
        got = pvi.diagnose(pvi.Posterior(whole, guide, (randn(3),)), 4000)
    assert got.elements == ()
