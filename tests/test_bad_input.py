"""Bad input raises before the first step, names the culprit, and leaves no trace."""

import re
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

import pvi
from pvi.errors import DataError, FitError, GuideError, PviError
from pvi.guides import MeanField
from tests import bad_inputs
from tests.bad_inputs import BadInput, guide, model
from tests.scenarios import local_model, nested_model, param, randn

CASES = bad_inputs.TEN | bad_inputs.MORE
pytestmark = pytest.mark.usefixtures("isolated")


def fit(case: BadInput) -> pvi.Fit:
    options = {"steps": 3, "seed": 0, **case.options}
    return pvi.fit(case.model, case.guide, data=case.data, **options)


@pytest.mark.parametrize("name", CASES)
def test_error_names_the_culprit(name: str) -> None:
    case = CASES[name]()
    with pytest.raises(PviError) as caught:
        fit(case)
    assert issubclass(caught.type, case.error)
    for pattern in case.names:
        assert re.search(pattern, str(caught.value)), pattern


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_behind(name: str) -> None:
    """The global store stays as it was and the caller's random state too."""
    case = CASES[name]()
    mine = pyro.param("mine", torch.tensor(7.0))
    state = torch.get_rng_state()
    with pytest.raises(PviError):
        fit(case)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert float(mine.detach()) == 7.0
    assert torch.equal(torch.get_rng_state(), state)


def test_the_good_twin_is_fitted() -> None:
    """The errors come from what is bad in the cases: without it all is well."""
    good = BadInput(model, guide, (randn(20), randn(20, seed=1)), PviError, ())
    assert len(fit(good).history) == 3
    assert len(pyro.get_param_store()) == 0


class TestAllowed:
    """What looks unusual but is right must pass."""

    @pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal, AutoDelta, MeanField])
    def test_automatic_guides_of_constrained_sites(self, make: Any) -> None:
        """Pyro's guides put a Delta at each site; its values are inside the support."""

        def constrained(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            tau = pyro.sample("tau", dist.HalfCauchy(1.0))
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu * p[..., :1], tau.unsqueeze(-1)), obs=y)

        fitted = pvi.fit(constrained, make(constrained), data=randn(8), steps=3, seed=0)
        assert len(fitted.history) == 3

    @pytest.mark.parametrize(
        "prior",
        [
            dist.TransformedDistribution(
                dist.Normal(0.0, 1.0), [dist.transforms.AffineTransform(1.0, 2.0)]
            ),
            dist.Gumbel(0.0, 1.0),
            dist.StudentT(3.0),
            dist.Logistic(0.0, 1.0),
            dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
            ),
            dist.ImproperUniform(dist.constraints.real, (), ()),
        ],
        ids=lambda prior: type(prior).__name__,
    )
    def test_normal_guide_of_a_real_prior(self, prior: Any) -> None:
        def own_prior(y: Tensor) -> None:
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

        def normal_guide(y: Tensor) -> None:
            pyro.sample("z", dist.Normal(param("z_loc", 0.3), 0.5))

        options = {"args": (torch.tensor(1.0),), "steps": 3, "seed": 0}
        assert len(pvi.fit(own_prior, normal_guide, **options).history) == 3

    def test_missing_values_under_a_mask(self) -> None:
        """NaN that the model masks out does no harm."""
        y = randn(10)
        y[3] = float("nan")

        def masked(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)), pyro.poutine.mask(mask=~y.isnan()):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y.nan_to_num())

        fitted = pvi.fit(masked, data=y, steps=3, seed=0)
        assert bool(torch.tensor(fitted.history["loss"]).isfinite().all())

    @pytest.mark.parametrize("way", ["obs_mask", "poutine.mask"])
    def test_the_advice_about_missing_values_works(self, way: str) -> None:
        """The error at NaN says to leave them out with obs_mask= or poutine.mask: so do."""
        y = randn(10)
        y[3] = float("nan")

        def model(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            keep = ~y.isnan()
            with pyro.plate("data", len(y)):
                if way == "obs_mask":
                    pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=keep)
                else:
                    with pyro.poutine.mask(mask=keep):
                        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        fitted = pvi.fit(model, data=y, steps=300, seed=0)
        assert bool(torch.tensor(fitted.history["loss"]).isfinite().all())
        found = float(fitted.posterior.sample(2000, seed=1)["mu"].mean())
        assert abs(found - float(y.nansum()) / 10) < 0.1  # 9 observations and the prior; sd 0.32

    def test_integers_and_scalars(self) -> None:
        def counts(y: Tensor, exposure: float) -> None:
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Poisson(rate * exposure), obs=y)

        fitted = pvi.fit(counts, data=torch.tensor([1, 2, 3]), args=(2.0,), steps=3, seed=0)
        assert len(fitted.history) == 3

    def test_auxiliary_site(self) -> None:
        def auxiliary(x: Tensor, y: Tensor) -> None:
            u = pyro.sample("u", dist.Normal(param("loc", 0.1), 0.5), infer={"is_auxiliary": True})
            pyro.sample("w", dist.Delta(u))

        data = (randn(20), randn(20, seed=1))
        assert len(pvi.fit(model, auxiliary, data=data, steps=3, seed=0).history) == 3


class TestData:
    def test_stream(self) -> None:
        class Stream(IterableDataset):
            def __iter__(self) -> Iterator[Tensor]:
                yield torch.zeros(1)

        with pytest.raises(DataError, match=r"unknown length.*num_data="):
            pvi.fit(model, data=Stream(), steps=3)

    def test_empty_dataset(self) -> None:
        with pytest.raises(DataError, match="empty"):
            pvi.fit(model, data=TensorDataset(torch.zeros(0)), steps=3)

    def test_unknown_keyword(self) -> None:
        with pytest.raises(DataError, match=r"model takes.*'z'"):
            pvi.fit(model, data={"x": randn(3), "y": randn(3), "z": randn(3)}, steps=3)

    @pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8"])
    def test_batch_size(self, batch_size: Any) -> None:
        with pytest.raises(DataError, match=r"batch_size must be a whole number >= 1, got"):
            pvi.fit(model, data=(randn(9), randn(9)), batch_size=batch_size, steps=3)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
            ({"epochs": 1.5}, "epochs must be a whole number >= 1"),
            ({"steps": 3, "epochs": 3}, "give steps= or epochs=, not both"),
            ({"lr": -0.1}, "lr must be > 0, got -0.1"),
            ({"lr": float("nan")}, "lr must be > 0"),
            ({"optimizer": "adam"}, "optimizer must be 'auto' or a callable.*'adam'"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(FitError, match=message):
            pvi.fit(model, data=(randn(9), randn(9)), **options)

    def test_guide_class(self) -> None:
        with pytest.raises(GuideError, match=r"class AutoNormal.*AutoNormal\(model\)"):
            pvi.fit(model, AutoNormal, data=(randn(9), randn(9)), steps=3)

    def test_guide_that_is_no_program(self) -> None:
        with pytest.raises(GuideError, match="guide must be"):
            pvi.fit(model, "MeanField", data=(randn(9), randn(9)), steps=3)  # type: ignore[arg-type]

    def test_nothing_to_fit(self) -> None:
        def fixed(x: Tensor, y: Tensor) -> None:
            pyro.sample("w", dist.Normal(0.0, 1.0))

        with pytest.raises(GuideError, match="no parameter"):
            pvi.fit(model, fixed, data=(randn(9), randn(9)), steps=3)

    def test_init_scale(self) -> None:
        with pytest.raises(GuideError, match="init_scale must be > 0, got 0"):
            MeanField(model, init_scale=0)


class TestPredict:
    """New data of another length."""

    def test_global_latents_follow(self) -> None:
        fitted = pvi.fit(model, data=(randn(20), randn(20, seed=1)), steps=3, seed=0)
        assert fitted.posterior.predict(randn(7), num_draws=4, seed=0)["y"].shape == (4, 7)

    @pytest.mark.parametrize("make", [MeanField, AutoNormal])
    @pytest.mark.parametrize("program", [local_model, nested_model])
    def test_rows_of_the_guide_do_not(self, program: Any, make: Any) -> None:
        fitted = pvi.fit(program, make(program), data=randn(20), steps=3, seed=0)
        with pytest.raises(GuideError, match=r"site 'z'.*20 rows of plate 'data'.*7.*encoder"):
            fitted.posterior.predict(randn(7), num_draws=4, seed=0)

    def test_too_many_arguments(self) -> None:
        fitted = pvi.fit(model, data=(randn(20), randn(20, seed=1)), steps=3, seed=0)
        with pytest.raises(DataError, match=r"predict got 3 arguments.*\['x', 'y'\]"):
            fitted.posterior.predict(randn(7), randn(7), randn(7))


class TestFailure:
    """The loss turns infinite during the fit."""

    def test_error_holds_the_fit(self) -> None:
        calls = []

        def explosive(y: Tensor) -> None:
            calls.append(1)
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            bad = float("inf") if len(calls) > 20 else 1.0
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
                pyro.factor("f", bad * torch.ones(len(y)), has_rsample=True)

        with pytest.raises(FitError, match=r"step \d+: site 'f'.*last finite values") as caught:
            pvi.fit(explosive, data=randn(5), steps=100, seed=0)
        saved = caught.value.fit  # type: ignore[attr-defined]
        assert not saved.converged
        assert all(bool(p.isfinite().all()) for p in saved.guide.parameters())
        assert len(pyro.get_param_store()) == 0
