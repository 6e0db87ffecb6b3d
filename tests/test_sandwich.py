"""Bounds from both sides on simulated data, and the simulation of data."""

import math
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pvi
from pvi.diagnostics.evidence import Options
from pvi.diagnostics.sandwich import bounds
from pvi.diagnostics.weights import make_target
from pvi.engine.simulate import simulate
from pvi.engine.traces import hidden
from pvi.errors import ObjectiveError
from tests.linear import regression, regression_guide, regression_log_z, vae, vae_guide, vae_log_z
from tests.scenarios import (
    local_guide,
    local_model,
    mean_se,
    nested_model,
    normal_log_z,
    randn,
    switch_guide,
    switch_log_z,
    switch_model,
)

pytestmark = pytest.mark.usefixtures("isolated")


def nested_near_guide(x: Tensor) -> None:
    """A little off the posterior whatever the data, so that weights have a variance."""
    theta = pyro.sample("theta", dist.Normal(0.6 * x.mean(), 0.6))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.45 * x + 0.4 * theta, 0.73))


def nested_log_z(x: Tensor) -> Tensor:
    return torch.tensor(normal_log_z(x, shared=1.0))


# model, guide, shape of the data, exact answer, simulations
MODELS: dict[str, tuple[Callable, Callable, tuple[int, ...], Callable, int]] = {
    "global": (regression, regression_guide, (20,), regression_log_z, 150),
    "local": (vae, vae_guide, (1000, 4), vae_log_z, 1),
    "nested": (nested_model, nested_near_guide, (4,), nested_log_z, 200),
    "discrete": (switch_model, switch_guide, (1000,), switch_log_z, 1),
}


def errors(name: str, simulations: int | None = None, **options: int | str) -> tuple[Tensor, ...]:
    """Lower and upper bounds minus the truth, one for each simulated data set or datum, nats."""
    model, guide, shape, log_z, usual = MODELS[name]
    checked = Options(progress=False, **options)  # type: ignore[arg-type]
    found: list[list[Tensor]] = [[], []]
    torch.manual_seed(0)
    with hidden():
        torch.manual_seed(0)
        plan = make_target(model, guide, (torch.zeros(shape),), {}).plan
        for _ in range(simulations or usual):
            made = simulate(model, (torch.zeros(shape),), {})
            target = make_target(made.model, guide, made.args, made.kwargs, plan)
            for values, bound in zip(found, bounds(target, made, checked), strict=True):
                values.append((bound - log_z(made.args[0])).reshape(-1))
    return tuple(map(torch.cat, found))


FEW = {
    "iwae, one draw": ("global", "local", "nested", "discrete"),
    "iwae": ("global", "local", "nested", "discrete"),
    "ais": ("global", "local", "nested"),
}
OPTIONS = {
    "iwae, one draw": {"method": "is", "num_samples": 1, "num_outer": 1},
    "iwae": {"method": "is", "num_samples": 4, "num_outer": 3},
    "ais": {"method": "ais", "num_chains": 8, "num_steps": 3},
}


@pytest.mark.parametrize(("how", "name"), [(how, name) for how in FEW for name in FEW[how]])
def test_identities_with_few_draws(how: str, name: str) -> None:
    """E exp(lower) = p(x) and E exp(-upper) = 1 / p(x), for any number of draws or steps."""
    options = {k: v for k, v in OPTIONS[how].items() if name == "nested" or k != "num_outer"}
    lower, upper = errors(name, 20 if how == "ais" and name != "local" else None, **options)
    for ratio in (lower.exp(), (-upper).exp()):
        mean, se = mean_se(ratio)
        assert abs(mean - 1) < 3 * se
    for error, sign in ((lower, -1), (upper, 1)):
        mean, se = mean_se(error)
        assert sign * mean > -3 * se
    if name == "local":  # enough data to see the gap
        assert lower.mean() < -3 * mean_se(lower)[1] and upper.mean() > 3 * mean_se(upper)[1]


@pytest.mark.parametrize("name", ["global", "local"])
@pytest.mark.parametrize("method", ["is", "ais"])
def test_tight_with_many(name: str, method: str) -> None:
    options = {"num_samples": 1000, "num_chains": 8, "num_steps": 20}
    lower, upper = errors(name, 4 if name == "global" else 1, method=method, **options)
    for error, sign in ((lower, -1), (upper, 1)):
        mean, se = mean_se(error)
        assert sign * mean > -3 * se
    assert (upper - lower).mean() < 0.1


class TestSandwich:
    def test_result(self) -> None:
        x = randn(50, 4)
        options = {"method": "iwae", "num_samples": 500, "num_simulations": 2, "progress": False}
        found = pvi.sandwich(vae, vae_guide, x, seed=0, **options)
        assert found.lower.shape == found.upper.shape == (2, 50)
        assert 0 < found.gap < 5 and abs(found.own.total - float(vae_log_z(x).sum())) < 5
        assert torch.equal(found.lower, pvi.sandwich(vae, vae_guide, x, seed=0, **options).lower)
        text = str(found)
        assert "2 simulated data sets" in text and "of your data: at least" in text
        assert "on average over draws" in text and "simulated data only" in text

    def test_bad_guide_has_a_gap(self) -> None:
        guide = partial(vae_guide, shift=3.0, width=0.4)
        options = {"num_simulations": 1, "seed": 0, "progress": False}
        by_iwae = pvi.sandwich(vae, guide, randn(50, 4), method="iwae", num_samples=100, **options)
        by_ais = pvi.sandwich(vae, guide, randn(50, 4), num_steps=20, **options)
        assert by_iwae.gap > 10 * by_ais.gap and not by_iwae.own.reliable

    def test_prior_as_guide(self) -> None:
        options = {"num_steps": 20, "num_simulations": 1, "seed": 0}
        assert abs(pvi.sandwich(local_model, None, randn(6), **options).gap) < 0.5

    def test_state(self) -> None:
        x = randn(6)
        local_guide(x)
        store, rng = pyro.get_param_store(), torch.get_rng_state()
        before = {name: value.tolist() for name, value in store.items()}
        pvi.sandwich(local_model, local_guide, x, method="iwae", num_samples=9, seed=0)
        assert {name: value.tolist() for name, value in store.items()} == before
        assert torch.equal(torch.get_rng_state(), rng)

    def test_refusals(self) -> None:
        x = randn(6)

        def factor_model(x: Tensor) -> None:
            local_model(x)
            pyro.factor("f", torch.tensor(0.3))

        def known(x: Tensor) -> None:
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([6]).to_event(1), obs=x)

        cases = [
            (local_model, AutoNormal(local_model), {}, "'z' through an auxiliary"),
            (factor_model, local_guide, {}, r"site 'f' comes from pyro\.factor"),
            (known, lambda x: None, {}, "no latent site"),
            (local_model, local_guide, {"method": "is"}, "'ais' or 'iwae'"),
            (local_model, local_guide, {"num_simulations": 0}, "num_simulations"),
        ]
        for model, guide, options, message in cases:
            guide(x)  # its parameters now exist
            with pytest.raises(ObjectiveError, match=message):
                pvi.sandwich(model, guide, x, **{"method": "iwae", "num_samples": 5, **options})


class TestSimulate:
    """Simulated observations take the place of the old ones, wherever the arguments hold them."""

    def test_slices_of_one_argument(self) -> None:
        def model(x: Tensor) -> None:
            z = torch.zeros(3)
            with pyro.plate("data", 3):
                for t in range(x.shape[1]):
                    z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])

        old = randn(3, 4)
        kept = old.clone()
        made = simulate(model, (old,), {})
        new = made.args[0]
        assert torch.equal(old, kept) and not made.hidden and not bool((new == old).any())
        for t in range(4):
            assert torch.equal(new[:, t], made.trace.nodes[f"x{t}"]["value"])

    def test_other_shape_copy_and_containers(self) -> None:
        def model(images: Tensor, rest: dict) -> None:
            pyro.sample(
                "a", dist.Normal(0.0, 1.0).expand([2, 4]).to_event(2), obs=images.view(2, 4)
            )
            pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=rest["y"][0] * 1)

        made = simulate(model, (randn(2, 2, 2), {"y": [randn(3)], "n": 5}), {})
        assert torch.equal(made.args[0].view(2, 4), made.trace.nodes["a"]["value"])
        assert torch.equal(made.args[1]["y"][0], made.trace.nodes["b"]["value"])
        assert made.args[1]["n"] == 5 and not made.hidden

    def test_unrelated_arguments_stay(self) -> None:
        x, weight = randn(6), randn(6, seed=1)
        made = simulate(lambda x, weight: local_model(x), (x,), {"weight": weight})
        assert made.kwargs["weight"] is weight and not torch.equal(made.args[0], x)

    def test_observations_from_a_closure_condition_the_model(self) -> None:
        x = randn(6)
        made = simulate(lambda: local_model(x), (), {})
        assert made.hidden == ("x",)
        trace = poutine.trace(made.model).get_trace()
        assert torch.equal(trace.nodes["x"]["value"], made.trace.nodes["x"]["value"])
        assert trace.nodes["x"]["is_observed"]

    def test_missing_data_stay_missing(self) -> None:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)), poutine.mask(mask=~x.isnan()):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = torch.tensor([0.5, math.nan, -0.2])
        made = simulate(model, (x,), {})
        assert torch.equal(made.args[0].isnan(), x.isnan()) and not made.hidden
        found = pvi.sandwich(model, None, x, num_steps=20, num_simulations=1, seed=0)
        assert not found.lower.isnan().any() and abs(found.gap) < 1
