"""Wrong answers that the checks of a posterior once gave, each as small as it can be."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi import diagnose
from pvi.errors import ModelError

pytestmark = pytest.mark.usefixtures("isolated")


def series(y: Tensor) -> None:
    """Each value is drawn around the *given* one before it, not around the one just drawn."""
    phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    before = torch.cat([torch.zeros(1), y[:-1]])
    pyro.sample("y", dist.Normal(phi * before, 1.0).to_event(1), obs=y)


def prior_of_series(y: Tensor) -> None:
    pyro.sample("phi", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("method", ["iwae", "ais"])
def test_sandwich_refuses_what_it_cannot_simulate(method: str) -> None:
    """Its upper bound needs an exact posterior draw, and there was none."""
    with pytest.raises(ModelError, match="'y' has another density"):
        pvi.sandwich(series, prior_of_series, torch.ones(9), method=method, num_steps=20, seed=0)


def encoder_of_series(y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("phi", dist.Normal(loc + y.mean(), 1.0))


def test_sleep_refuses_what_it_cannot_simulate() -> None:
    """Its latents would be no draws given the simulated data."""
    with pytest.raises(ModelError, match="'y' has another density"):
        pvi.ReweightedWakeSleep(4, insomnia=0.5).differentiable_loss(
            series, encoder_of_series, torch.ones(9)
        )


def two_signs(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.3, 3.0))
    pyro.sample("y", dist.Normal(z.abs(), 0.3), obs=y)


def test_modes_and_time_outlive_saving(tmp_path: Path) -> None:
    """A fit that misses a mode was good once it had been saved; fixed draws had no time."""
    y = torch.tensor(3.0)
    fit = pvi.fit(two_signs, pvi.guides.MeanField(two_signs, init_scale=0.1), y, restarts=4, seed=0)
    assert len(fit.modes) == 2 and 0.3 < fit.modes[0].share < 0.7
    fit.save(tmp_path / "fit")
    loaded = pvi.load(tmp_path / "fit", two_signs, pvi.guides.MeanField(two_signs), y)
    for one in (fit, loaded):
        assert one.diagnose(2000).verdict == "unreliable"
        assert 0.0 < one.seconds < 60.0
    assert [vars(m) for m in loaded.modes] == [vars(m) for m in fit.modes]
    assert diagnose(replace(loaded, modes=()), 2000).verdict == "good"  # by the weights alone


def far_from_zero(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, 1e7))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def narrower_than_rounding(y: Tensor) -> None:
    """3 sds off, and float32 has steps of 0.06 there."""
    with pyro.plate("rows", len(y)):
        pyro.sample("x", dist.Normal(torch.full_like(y, 1e6), 1e-3))


@pytest.mark.parametrize("rows", [1, 10])
def test_draws_that_are_all_the_same_are_no_evidence(rows: int) -> None:
    """Equal weights made this "good", for the joint weights and for those of single rows."""
    y = torch.full((rows,), 1e6 + 3.0, dtype=torch.float32)
    found = diagnose(pvi.Posterior(far_from_zero, narrower_than_rounding, y), 2000)
    assert found.verdict == "not assessed"
    assert "numbers of 'x' are the same in all draws" in found.reasons[0]
    exact = pvi.Posterior(far_from_zero, exact_far_from_zero, y)
    assert diagnose(exact, 2000).verdict == "good"


def exact_far_from_zero(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        pyro.sample("x", dist.Normal(y, 1.0))


def simplex_and_factor() -> None:
    """Numbers of a site that can't move: a triangle of zeros."""
    pyro.sample("p", dist.Dirichlet(torch.ones(2)))
    pyro.sample("root", dist.LKJCholesky(2, 1.0))


def test_structural_constants_are_no_fault() -> None:
    def model() -> None:
        simplex_and_factor()
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    assert diagnose(pvi.Posterior(model, simplex_and_factor), 500).verdict == "good"


def test_the_fit_says_what_to_do_next() -> None:
    """`raise steps` was said of fits by fixed draws, which have no steps, and of stopped ones."""
    posterior = pvi.fit(two_signs, data=torch.tensor(3.0), steps=50, seed=0).posterior
    for why in ("interrupted", "with 64 fixed draws ...; give steps= to train on fresh draws"):
        fit = SimpleNamespace(posterior=posterior, converged=False, reason=why)
        assert diagnose(fit, 500).reasons[0] == f"stopped before converging: {why}"


def test_short_fits_say_raise_steps() -> None:
    short = pvi.fit(two_signs, data=torch.tensor(3.0), steps=50, seed=0)
    assert "; raise steps" in short.reason
    assert diagnose(short, 500).reasons[0] == f"stopped before converging: {short.reason}"


def slope(x: Tensor, y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)


def prior_of_slope(x: Tensor, y: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def test_resampled_draws_are_those_that_were_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With predictions of many rows draws came in smaller pieces, other ones than were weighed."""
    monkeypatch.setattr(pvi.posterior.draws, "CHUNK", 4000)
    posterior = pvi.Posterior(slope, prior_of_slope, (torch.ones(2), torch.tensor([1.5, 1.2])))
    options = {"correct": "psis", "predictions": {"x": torch.ones(50), "y": None}, "seed": 0}
    z = posterior.to_datatree(1000, **options)["posterior"]["z"].values
    error = (1 / 3 / 1000) ** 0.5  # and the weights of 10,000 draws add less
    assert abs(z.mean() - 0.9) < 5 * error  # that of the guide is 0


def observes(*order: str) -> Callable:
    """Data a and b, observed in this order."""

    def model(a: Tensor, b: Tensor) -> None:
        data = {"a": (a, 1.0), "b": (b, 5.0)}
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for name in order:
            value, scale = data[name]
            with pyro.plate(f"rows_{name}", len(value)):
                pyro.sample(name, dist.Normal(mu, scale), obs=value)

    return model


def test_paired_differences_are_of_the_same_data() -> None:
    """Of one model whose sites stand in another order the difference was 0 +- 13 nats."""
    a, b = torch.randn(20), 5 * torch.randn(30)

    def guide(a: Tensor, b: Tensor) -> None:
        precision = 1 + 20 + 30 / 25
        pyro.sample("mu", dist.Normal((a.sum() + b.sum() / 25) / precision, precision**-0.5))

    fits = {order: pvi.Posterior(observes(*order), guide, args=(a, b)) for order in ("ab", "ba")}
    found = pvi.compare(fits, num_draws=500, loo_draws=500)
    assert all(abs(e.elpd_diff) < 1e-4 and e.diff_se < 1e-4 for e in found.entries)


def bounded(y: Tensor) -> None:
    top = pyro.sample("top", dist.Pareto(1.0, 1.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Uniform(0.0, top, validate_args=False), obs=y)


def around_the_bound(y: Tensor) -> None:
    pyro.sample("top", dist.Uniform(1.6, 2.6))


def test_draws_that_make_a_datum_impossible() -> None:
    """They have no weight without it, so LOO is not reliable; predictive checks broke on them."""
    posterior = pvi.Posterior(bounded, around_the_bound, torch.tensor([0.3, 0.9, 1.7, 1.2]))
    found = pvi.loo(posterior, 1000)
    assert not found.reliable and "give a datum the density 0" in found.reasons[0]
    assert pvi.check_predictive(posterior, num_draws=500)["y"].log_score < 0.0


def test_two_draws_make_nothing_good() -> None:
    """Their log ratios differ by less than 0.1 nats often enough."""

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    def half_an_sd_off() -> None:
        pyro.sample("z", dist.Normal(0.5, 1.0))

    posterior = pvi.Posterior(model, half_an_sd_off)
    assert {diagnose(posterior, 2, seed=seed).verdict for seed in range(12)} == {"unreliable"}
