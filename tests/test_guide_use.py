"""How guides are made, started, grouped and given to `pvi.fit`; Pyro's guides beside them."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import easy_guide
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.optim import Adam
from torch import Tensor, nn

import pvi
from pvi.errors import GuideError
from pvi.guides import (
    Amortized,
    Flow,
    FullRank,
    Group,
    Laplace,
    LowRank,
    MeanField,
    Mixture,
    Structured,
    init_to_module,
)
from tests.families import GUIDES, make, world
from tests.scenarios import (
    amortised_guide,
    isolated,
    local_model,
    mean_model,
    mean_posterior,
    nested_model,
    randn,
)


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with isolated():
        yield


class TestGroup:
    def test_keys(self) -> None:
        """Names, tuples that share a guide, `...`; each site has its part's parameters."""
        parts = {("mu", "w"): FullRank, "m": LowRank(rank=1), ...: Structured()}
        guide: Any = Group(parts, world).setup(randn(4))
        owned = [sorted(part.latents) for part in guide._parts]
        assert owned == [["mu", "w"], ["m"], ["scale.tau", "z"]]
        assert guide._parts[0].correlation.shape == (3, 3)
        assert isinstance(Group({"mu": FullRank}, world).setup(randn(4))._parts[1], MeanField)

    def test_parts_are_independent(self) -> None:
        guide = Group({"mu": FullRank, ...: MeanField}, world).setup(randn(4))
        draws = guide.sample(3)
        parts = [part.log_prob(draws) for part in guide._parts]
        torch.testing.assert_close(guide.log_prob(draws), parts[0] + parts[1])

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ({}, "needs a dict"),
            ({"mu": FullRank, ("mu", "w"): FullRank}, "site 'mu' twice"),
            ({"mu": 3}, "part for 'mu' must be one of"),
            ({"mu": autoguide.AutoNormal}, "part for 'mu' must be one of"),
            ({"mu": world}, "Pyro program can't be a part"),
            ({"mu": Laplace}, "Laplace needs the mode of all sites"),
            ({3: FullRank}, "keys are site names"),
        ],
    )
    def test_refused(self, parts: Any, message: str) -> None:
        with pytest.raises(GuideError, match=message):
            Group(parts)

    def test_one_object_twice(self) -> None:
        part = FullRank()
        with pytest.raises(GuideError, match="one guide object twice"):
            Group({"mu": part, "w": part})

    def test_unknown_site(self) -> None:
        with pytest.raises(GuideError, match=r"names site 'nu'.*'mu'"):
            Group({"nu": FullRank}, world).setup(randn(4))

    def test_parts_with_joint_draws(self) -> None:
        """A flow and a mixture inside a group keep the engine's density right."""
        x = randn(4)
        for part in (Flow(transforms=1, hidden_features=(4,)), Mixture(2)):
            guide = Group({("mu", "scale.tau"): part})
            posterior = pvi.fit(world, guide, x, steps=2, seed=0).posterior
            draws = posterior.draws(5, seed=0)
            found = guide.log_prob({n: draws.values[n] for n in guide.latents})
            torch.testing.assert_close(found.detach(), draws.log_q)

    def test_exact_kl_under_another_parts_components(self) -> None:
        """The prior of a site may have a dimension for each component of the sites before."""

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)

        x, num = randn(3), 3000
        guide = Group({"z": Mixture(2), "w": FullRank}, model).setup(x)
        with torch.no_grad():
            terms = [pvi.ELBO(num, kl=kl).terms(model, guide, x)["w"] for kl in ("exact", "sample")]  # type: ignore[arg-type]
        assert terms[0].how == "exact"
        kls = [term.per_particle() for term in terms]
        se = float((kls[0].var() + kls[1].var()) / num) ** 0.5
        assert abs(float(kls[0].mean() - kls[1].mean())) < 4 * se


class TestArguments:
    @pytest.mark.parametrize(
        ("depends_on", "message"),
        [
            ({"q": []}, "names site 'q'"),
            ({"z": ["q"]}, "names site 'q'"),
            ({"theta": ["z"]}, r"'theta' depend on 'z'.*holds for none"),
            ({"z": ["z"]}, r"'z' depend on 'z'.*\['theta'\]"),
        ],
    )
    def test_depends_on(self, depends_on: Any, message: str) -> None:
        with pytest.raises(GuideError, match=message):
            Structured(nested_model, depends_on=depends_on).setup(randn(3))

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
    def test_init_scale(self, scale: float) -> None:
        with pytest.raises(GuideError, match="init_scale must be > 0"):
            MeanField(init_scale=scale)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: LowRank(rank=0), "rank must be"),
            (lambda: Mixture(0), "num_components must be"),
            (lambda: Mixture(2, Flow), "density of their own"),
            (lambda: Mixture(2, Laplace), "density of their own"),
            (lambda: Flow(mean_model, kind="Magic").setup(randn(3)), "no flow 'Magic'"),
            (lambda: Flow(nested_model, petals=3).setup(randn(3)), "does not take.*petals"),
            (lambda: MeanField(3), "must be a Pyro program"),  # type: ignore[arg-type]
            (lambda: MeanField().setup(randn(3)), "no model yet"),
            (lambda: MeanField()(randn(3)), "no model yet"),
            (lambda: MeanField(mean_model).log_prob({}), "not set up"),
            (lambda: FullRank(mean_model).covariance(), "not set up"),
            (lambda: MeanField(mean_model).setup(randn(3)).quantiles([0.0]), "between 0 and 1"),
            (lambda: pvi.fit(mean_model, Amortized, randn(3)), "class Amortized, which needs"),
            (lambda: pvi.fit(mean_model, autoguide.AutoNormal, randn(3)), "pass an instance"),
        ],
    )
    def test_refused(self, call: Callable[[], Any], message: str) -> None:
        with pytest.raises(GuideError, match=message):
            call()


class TestStarts:
    def start(self, init: Any, model: Any = mean_model) -> float:
        guide: Any = MeanField(model, init).setup(randn(5) + 1.0)
        return float(guide.loc.mu.detach())

    def test_median(self) -> None:
        assert self.start("median") == 0.0

    def test_mode(self) -> None:
        assert self.start("mode") == pytest.approx(mean_posterior(randn(5) + 1.0)[0], abs=1e-5)

    def test_dict_and_function(self) -> None:
        assert self.start({"mu": 0.7}) == pytest.approx(0.7)
        with pytest.raises(GuideError, match="no latent site 'other'"):
            self.start({"other": 0.7})
        assert self.start(lambda site: torch.tensor(0.3)) == pytest.approx(0.3)

    def test_module(self) -> None:
        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mu = nn.Parameter(torch.tensor(1.2))

            def forward(self, y: Tensor) -> None:
                mean_model(y)

        network = Network()
        assert self.start("module", network) == pytest.approx(1.2)
        assert self.start(init_to_module(network)) == pytest.approx(1.2)
        with pytest.raises(GuideError, match=r"no nn\.Module"):
            self.start("module")

    @pytest.mark.parametrize("init", ["middle", 3, None])
    def test_refused(self, init: Any) -> None:
        with pytest.raises(GuideError, match="init_loc_fn must be"):
            self.start(init)

    def test_wrong_shape(self) -> None:
        with pytest.raises(GuideError, match=r"shape \(2,\) for site 'mu'"):
            self.start({"mu": torch.zeros(2)})


def several(x: Tensor) -> None:
    """As many sites as data."""
    for i, value in enumerate(x):
        z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=value)


class TestSecondSetup:
    @pytest.mark.parametrize("name", [n for n in GUIDES if n not in ("Amortized", "Group")])
    def test_forgets_the_sites_of_the_first(self, name: str) -> None:
        guide, fresh = make(name).bind(several), make(name).bind(several)
        guide.setup(randn(4)), guide.setup(randn(2)), fresh.setup(randn(2))
        assert guide.state_dict().keys() == fresh.state_dict().keys()
        assert sorted(guide.sample(1)) == ["z0", "z1"]

    @pytest.mark.parametrize("name", [n for n in GUIDES if n != "Laplace"])
    def test_in_plain_pyro(self, name: str) -> None:
        """Pyro's global store does not keep training the parameters of the first."""
        x = randn(4)
        guide = make(name).bind(world).setup(x)
        for _ in range(2):
            svi = SVI(world, guide, pyro.optim.Adam({"lr": 0.05}), pvi.ELBO())
            svi.step(x)
            guide.setup(x)
            before = {n: p.detach().clone() for n, p in guide.named_parameters()}
            for _ in range(3):
                svi.step(x)
            for key, parameter in guide.named_parameters():
                assert not torch.equal(parameter, before[key]), key


def test_zuko_is_imported_late_and_harmless() -> None:
    code = (
        "import sys, torch, pvi, pyro, pyro.distributions as dist\n"
        "assert 'zuko' not in sys.modules\n"
        "def model(): pyro.sample('x', dist.Normal(pyro.sample('z', dist.Normal(0., 1.)), 1.),"
        " obs=torch.tensor(0.))\n"
        "before = torch.distributions.Distribution._validate_args\n"
        "pvi.guides.Flow(model, transforms=1).setup()\n"
        "assert 'zuko' in sys.modules\n"
        "assert torch.distributions.Distribution._validate_args is before is True\n"
        "try: torch.distributions.Normal(0., -1.)\n"
        "except ValueError: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr


class TestFit:
    @pytest.mark.parametrize("guide", [FullRank, FullRank(), FullRank(mean_model)], ids=str)
    def test_ways_to_say_it(self, guide: Any) -> None:
        fit = pvi.fit(mean_model, guide, randn(5), steps=3, seed=0)
        assert isinstance(fit.guide, FullRank) and fit.guide.model is mean_model

    def test_laplace_returns_at_once(self) -> None:
        y = randn(5) + 1.0
        mean, sd = mean_posterior(y)
        fit = pvi.fit(mean_model, Laplace, y, seed=0)
        assert fit.converged and fit.reason == "" and len(fit.history) == 1
        guide: Any = fit.guide
        assert float(guide.loc.mu) == pytest.approx(mean, abs=1e-6)
        assert float(guide.covariance()) == pytest.approx(sd**2, abs=1e-8)
        log_w = fit.posterior.log_weights(10, seed=0)
        assert float(log_w.std()) < 1e-6  # exact: every weight is the evidence

    def test_laplace_beside_a_parameter(self) -> None:
        def model(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, pyro.param("wide", torch.tensor(2.0))))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        with pytest.raises(GuideError, match="parameter 'wide'"):
            pvi.fit(model, Laplace, randn(5))


def _list(model: Any) -> Any:
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(pyro.poutine.block(model, hide=["z"])))
    guide.append(autoguide.AutoDelta(pyro.poutine.block(model, expose=["z"])))
    return guide


def _easy(model: Any) -> Any:
    @easy_guide(model)
    def guide(self: Any, x: Tensor) -> None:
        group = self.group(match="theta")
        loc = pyro.param("loc", torch.zeros(group.event_shape))
        group.sample("joint", dist.Normal(loc, 0.5).to_event(1))
        with self.plate("data", len(x)):
            self.map_estimate("z")

    return guide


AUTO: dict[str, Callable[[Any], Any]] = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoDelta": autoguide.AutoDelta,
    "AutoIAFNormal": lambda m: autoguide.AutoIAFNormal(m, hidden_dim=[8]),
    "AutoStructured": autoguide.AutoStructured,
    "AutoGuideList": _list,
    "EasyGuide": _easy,
}


@pytest.mark.parametrize("name", AUTO)
def test_guides_of_pyro(name: str) -> None:
    """They fit as they are, and their bound rises."""
    x = randn(6) + 1.0
    fit = pvi.fit(nested_model, AUTO[name](nested_model), x, steps=80, seed=0)
    bounds = fit.history.losses
    assert sum(bounds[-10:]) < sum(bounds[:10])
    draws = fit.posterior.sample(4, seed=0)
    assert draws["theta"].shape == (4,) and draws["z"].shape == (4, 6)


def test_guide_by_hand() -> None:
    fit = pvi.fit(local_model, amortised_guide, randn(6), steps=200, seed=0)
    z = fit.posterior.sample(4000, seed=0)["z"].mean(0)  # x / 2, by a slope that was fitted
    torch.testing.assert_close(z, randn(6) / 2, atol=0.1, rtol=0)


class TestSupports:
    def test_bound_by_another_latent(self) -> None:
        def model(x: Tensor) -> None:
            top = pyro.sample("top", dist.HalfNormal(1.0))
            u = pyro.sample("u", dist.Uniform(torch.zeros(()), top))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(u, 1.0), obs=x)

        with pytest.raises(GuideError, match="support of site 'u' depends on another latent"):
            pvi.fit(model, data=randn(5), steps=2)

    def test_bounds_of_rows_need_all_rows(self) -> None:
        def model(x: Tensor, top: Tensor) -> None:
            with pyro.plate("data", len(x)):
                u = pyro.sample("u", dist.Uniform(torch.zeros_like(top), top))
                pyro.sample("x", dist.Normal(u, 1.0), obs=x)

        x, top = randn(9), 1.0 + randn(9).square()
        fit = pvi.fit(model, data=(x, top), steps=20, seed=0)
        assert bool((fit.posterior.sample(100, seed=0)["u"] < top).all())
        with pytest.raises(GuideError, match="site 'u' has another bound in each row"):
            pvi.fit(model, data=(x, top), batch_size=4, steps=2)
        with pytest.raises(GuideError, match="site 'u' has another bound in each row"):
            Amortized(nn.Linear(1, 2), model).setup(x.unsqueeze(-1), top)

    def test_bounds_within_an_event(self) -> None:
        """They are the same in each row, so batches and new rows have them too."""

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                u = pyro.sample("u", dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
                pyro.sample("x", dist.Normal(u.sum(-1), 1.0), obs=x)

        fit = pvi.fit(model, data=randn(9), batch_size=4, steps=2, seed=0)
        assert fit.posterior.sample(3)["u"].shape == (3, 9, 2)


@pytest.mark.parametrize("name", ["MeanField", "Group", "Flow"])
def test_copies_are_trained_apart(name: str) -> None:
    """In Pyro's store too, where parameters of one name are one parameter."""
    x = randn(4)
    guide = make(name).bind(world).setup(x)
    other = copy.deepcopy(guide)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    svi = SVI(world, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    other(x)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in guide.state_dict().items())
    assert other.model is guide.model
