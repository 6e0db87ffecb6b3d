"""Every row of the table: one clear error that leaves no trace, or acceptance."""

import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

import pvi
from docs import generate_bad_input
from pvi.errors import FitError, GuideError, PviError
from pvi.guides import MeanField
from tests import bad_inputs
from tests.bad.base import BadInput, data, model
from tests.scenarios import local_model, nested_model, param, randn

ROWS = {f"{group}: {name}": make for group, name, make in bad_inputs.rows()}
BAD = [name for name, make in ROWS.items() if make().error is not None]
ACCEPTED = [name for name in ROWS if name not in BAD]
pytestmark = pytest.mark.usefixtures("isolated")


def words(error: BaseException) -> str:
    """The message and the notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


@contextmanager
def untouched() -> Iterator[None]:
    """Pyro's and torch's global state is the same afterwards."""

    def state() -> dict[str, Any]:
        return {
            "store": list(pyro.get_param_store().keys()),
            "handlers": len(_PYRO_STACK),
            "validation": torch.distributions.Distribution._validate_args,
            "gradients": torch.is_grad_enabled(),
            "dtype": torch.get_default_dtype(),
            "device": torch.get_default_device(),
            "filters": len(warnings.filters),
            "random": torch.get_rng_state().tolist(),
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
        }

    pyro.param("mine", torch.tensor(7.0))
    before = state()
    yield
    assert state() == before
    assert float(pyro.param("mine").detach()) == 7.0


@pytest.mark.parametrize("name", BAD)
def test_error(name: str) -> None:
    """It names the culprit, leaves no trace, and the same call put right works."""
    case = ROWS[name]()
    assert case.error is not None
    with untouched(), pytest.raises(case.error) as caught:
        case.run()
    for pattern in (re.escape(case.culprit), *case.names):
        assert re.search(pattern, words(caught.value)), (pattern, words(caught.value))
    assert len(str(caught.value).splitlines()) == 1
    if case.mend:
        assert len(case.mended().history) > 0


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    case = ROWS[name]()
    fitted = case.run()
    assert bool(torch.tensor(fitted.history["loss"]).isfinite().all())
    assert case.how


def test_the_table_is_large_enough_to_be_worth_its_name() -> None:
    assert len(ROWS) >= 40
    assert all(make().mend or make().use for name, make in ROWS.items() if name in BAD[:40])


def test_the_page_is_in_step() -> None:
    """Else run `python -m benchmarks bad_input` and `python -m docs.generate_bad_input`."""
    assert generate_bad_input.PAGE.read_text(encoding="utf-8") == generate_bad_input.page()


def test_errors_are_pvis_own_or_the_users() -> None:
    """No row may let an error of torch or Pyro through as it is."""
    own = {"a model that raises", "a model that raises later", "a guide that raises"}
    own |= {"a callback that raises", "shapes that torch can't multiply"}  # a line of the user's
    for name in BAD:
        kinds = ROWS[name]().error
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        mine = name.partition(": ")[2] in own
        assert mine or all(issubclass(kind, PviError) for kind in kinds), name


class TestOwnErrors:
    """An error of the user's own comes through: the object itself, its traceback, and a note."""

    def test_the_same_object(self) -> None:
        mine = KeyError("mine")

        def broken(x: Tensor, y: Tensor) -> None:
            raise mine

        with pytest.raises(KeyError) as caught:
            pvi.fit(broken, data=data(), steps=3)
        assert caught.value is mine
        assert caught.traceback[-1].name == "broken"
        assert [n for n in mine.__notes__ if n.startswith("pvi: ")] == [
            "pvi: raised in the model, given x: (20,) float64, y: (20,) float64"
        ]

    @pytest.mark.parametrize("make", [MeanField, AutoNormal])
    @pytest.mark.parametrize("kind", [ValueError, RuntimeError, TypeError])
    def test_nothing_is_read_into_it(self, make: Any, kind: Any) -> None:
        """Not even with NaN in the data, nor in the handler of another error."""

        def broken(x: Tensor, y: Tensor) -> None:
            model(x, y)
            try:
                {}["mine"]
            except KeyError:
                raise kind("to satisfy the constraint of mine")  # noqa: B904

        x, y = data()
        y[0] = float("nan")
        with untouched(), pytest.raises(kind) as caught:
            pvi.fit(broken, make(broken), data=(x, y), steps=3)
        assert str(caught.value) == "to satisfy the constraint of mine"

    def test_torchs_own_errors_in_the_middle_of_training(self) -> None:
        """A scale that turns negative after some steps."""
        left = [30]

        def sinking(x: Tensor, y: Tensor) -> None:
            left[0] -= 1
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample(
                    "y", dist.Normal(w * x, torch.tensor(1.0 if left[0] > 0 else -2.0)), obs=y
                )

        with untouched(), pytest.raises(pvi.FitError) as caught:
            pvi.fit(sinking, data=data(), steps=50, objective=pvi.ELBO(), seed=0)
        pattern = r"step \d+: site 'y' has a log density that is NaN at row 0 of the data"
        assert re.match(pattern, str(caught.value))

    def test_further_problems_are_notes(self) -> None:
        x, y = data()
        call = {"data": (x / 0, y / 0), "steps": 3}
        with pytest.raises(pvi.DataError, match="argument 'x' has inf") as caught:
            pvi.fit(model, **call)
        assert "besides: argument 'y' has inf" in words(caught.value)

    def test_data_that_a_model_wrote_into_are_put_back(self) -> None:
        def writer(x: Tensor, y: Tensor) -> None:
            x += 1
            model(x, y)

        x, y = data()
        with pytest.raises(pvi.ModelError, match="in place"):
            pvi.fit(writer, data=(x, y), steps=3)
        assert torch.equal(x, data()[0])

    @pytest.mark.parametrize("make", [MeanField, AutoNormal])
    def test_a_guide_is_as_new_after_an_error(self, make: Any) -> None:
        """It was set up for 20 rows when the NaN was found; the right data have 7."""
        guide = make(local_model)
        y = randn(20)
        y[3] = float("nan")
        with pytest.raises(pvi.DataError):
            pvi.fit(local_model, guide, data=y, steps=3)
        fitted = pvi.fit(local_model, guide, data=randn(7), steps=3, seed=0)
        assert fitted.posterior.sample(2, seed=0)["z"].shape[1] == 7


def test_control_flow_on_draws_with_score_gradients_may_change_the_sites() -> None:
    """Only where every draw is reparameterised can no draw decide about a site, but chance can."""

    def flips(y: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(0.0, 1.0)) if k > 0 else torch.tensor(0.0)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def flips_guide(y: Tensor) -> None:
        probs = param("p", 0.5, constraint=dist.constraints.unit_interval)
        if pyro.sample("k", dist.Bernoulli(probs)) > 0:
            pyro.sample("z", dist.Normal(param("z_loc", 0.1), 1.0))

    call = {"args": (torch.tensor(0.3),), "objective": pvi.ELBO(), "steps": 20, "seed": 0}
    assert len(pvi.fit(flips, flips_guide, **call).history) == 20


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

    @pytest.mark.parametrize(
        ("prior", "guide"),
        [
            (dist.HalfNormal(1.0), dist.Gamma(2.0, 2.0)),
            (dist.Uniform(0.0, 1.0), dist.Beta(2.0, 2.0)),
            (dist.Uniform(-1.0, 3.0), dist.Uniform(0.0, 2.0)),
            (dist.LogNormal(0.0, 1.0), dist.Weibull(1.0, 2.0)),
            (dist.LogNormal(0.0, 1.0), dist.LogNormal(0.0, 0.5)),
        ],
        ids=lambda fn: type(fn).__name__,
    )
    def test_a_guide_inside_the_support(self, prior: Any, guide: Any) -> None:
        def own_prior(y: Tensor) -> None:
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z * pyro.param("a", torch.tensor(1.0)), 1.0), obs=y)

        def inside(y: Tensor) -> None:
            pyro.sample("z", guide)

        options = {"args": (torch.tensor(1.0),), "steps": 3, "seed": 0}
        assert len(pvi.fit(own_prior, inside, **options).history) == 3

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

    def test_truth_values_are_worth_0_and_1(self) -> None:
        """The same bound as with floats: they are not merely taken."""

        def coin(y: Tensor) -> None:
            p = pyro.sample("p", dist.Beta(1.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Bernoulli(p), obs=y)

        heads = randn(30) > -0.5
        runs = [pvi.fit(coin, data=y, steps=5, seed=0) for y in (heads, heads.double())]
        assert runs[0].history["bound"].tolist() == runs[1].history["bound"].tolist()

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

        assert len(pvi.fit(model, auxiliary, data=data(), steps=3, seed=0).history) == 3


def test_init_scale() -> None:
    with pytest.raises(GuideError, match="init_scale must be > 0, got 0"):
        MeanField(model, init_scale=0)


class TestPredict:
    """New data of another length."""

    def test_global_latents_follow(self) -> None:
        fitted = BadInput({}).run()
        assert fitted.posterior.predict(randn(7), num_draws=4, seed=0)["y"].shape == (4, 7)

    @pytest.mark.parametrize("make", [MeanField, AutoNormal])
    @pytest.mark.parametrize("program", [local_model, nested_model])
    def test_rows_of_the_guide_do_not(self, program: Any, make: Any) -> None:
        fitted = pvi.fit(program, make(program), data=randn(20), steps=3, seed=0)
        with pytest.raises(GuideError, match=r"site 'z'.*20 rows of plate 'data'.*7.*encoder"):
            fitted.posterior.predict(randn(7), num_draws=4, seed=0)


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


def test_the_recorded_results_fit_the_table() -> None:
    """What the page and the benchmark's file say of a row is what its test demands."""
    found = {(r["group"], r["input"]): r for r in generate_bad_input.results()}
    for group, name, make in bad_inputs.rows():
        case, record = make(), found[group, name]
        assert record["left in the store"] == "-"
        if case.error is None:
            assert (record["pvi"], record["message"]) == ("accepted", case.how)
        else:
            for pattern in (re.escape(case.culprit), *case.names):
                assert re.search(pattern, record["message"]), (name, pattern)
