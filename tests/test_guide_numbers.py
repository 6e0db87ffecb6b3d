"""States, means, quantiles, KLs and gradients of every guide of `tests.families.GUIDES`."""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import constraints

import pvi
from pvi.errors import GuideError, ObjectiveError
from tests.families import EXACT_KL, GUIDES, TRAINED, linear_world, make, ready
from tests.scenarios import Program, isolated, randn

EXACT = 1e-10
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with isolated():
        yield


def bounded(x: Tensor) -> None:
    """Supports of many kinds: dotted names, tensors as bounds, a decreasing map."""
    a = pyro.sample("level.a", dist.Normal(0.0, 1.0))
    low = dist.Uniform(torch.tensor(-1.0), torch.tensor(2.5))
    b = pyro.sample("b", low)
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    m = pyro.sample("m", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    flat = dist.ImproperUniform(constraints.less_than(2.0), (), ())
    c = pyro.sample("c", flat)
    pyro.sample("c near 1", dist.Normal(c, 0.5), obs=torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        loc = a + b * p[..., 0] + m.sum((-1, -2)) + z
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


FRESH = """
import sys, torch
from tests.families import GUIDES, make
torch.set_default_dtype(torch.float64)
folder = sys.argv[1]
saved = torch.load(f"{folder}/states.pt", weights_only=True)
found = {}
for name, state in saved["states"].items():
    guide = make(name)
    guide.load_state_dict(state)
    torch.manual_seed(7)
    draws = guide.sample(4, saved["x"])
    found[name] = {"draws": draws, "log_prob": guide.log_prob(draws, saved["x"]).detach()}
torch.save(found, f"{folder}/found.pt")
"""


def test_states_in_a_fresh_process(tmp_path: Path) -> None:
    """Neither data nor model nor setup: a saved state is the whole guide (and its encoder's x)."""
    x = randn(4)
    guides = {name: ready(name, bounded, x) for name in GUIDES}
    states = {name: guide.state_dict() for name, guide in guides.items()}
    torch.save({"states": states, "x": x}, tmp_path / "states.pt")
    command = [sys.executable, "-W", "error", "-c", FRESH, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, guide in guides.items():
        torch.manual_seed(7)
        draws = guide.sample(4, x)
        assert found[name]["draws"].keys() == draws.keys()
        for site, value in draws.items():
            assert torch.equal(found[name]["draws"][site], value), (name, site)
        log_prob = guide.log_prob(draws, x).detach()
        assert torch.equal(found[name]["log_prob"], log_prob), name


@pytest.mark.parametrize("name", GUIDES)
class TestState:
    def test_safetensors(self, name: str, tmp_path: Path) -> None:
        guide, other = ready(name, bounded, randn(4)), make(name)
        save_file(guide.state_dict(), tmp_path / "guide.safetensors")
        other.load_state_dict(load_file(tmp_path / "guide.safetensors"))
        for key, value in guide.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key

    def test_into_a_guide_of_other_data(self, name: str) -> None:
        """A state decides about the sites, whatever the guide was set up with before."""
        guide, other = ready(name, bounded, randn(4)), make(name).bind(bounded).setup(randn(6))
        other.load_state_dict(guide.state_dict())
        assert other.sample(2, randn(4))["z"].shape == (2, 4)

    def test_float32(self, name: str) -> None:
        torch.set_default_dtype(torch.float32)
        x = randn(4)
        guide = ready(name, bounded, x)
        assert {p.dtype for p in guide.parameters()} == {torch.float32}
        draws = guide.sample(3, x)
        log_prob = guide.log_prob(draws, x)
        assert {v.dtype for v in [*draws.values(), log_prob]} == {torch.float32}
        assert bool(log_prob.isfinite().all()) or name == "Delta"
        assert math.isfinite(pvi.ELBO(2).bound(bounded, guide, x))


class TestSummaries:
    """Means and quantiles against 50,000 draws; both may come from 10,000 draws themselves."""

    SHARE = 1 / 50_000 + 1 / 10_000

    @pytest.mark.parametrize("name", GUIDES)
    def test_mean(self, name: str) -> None:
        x = randn(3)
        guide = ready(name, bounded, x)
        draws, means = guide.sample(50_000, x), guide.mean(x)
        assert means.keys() == draws.keys()
        for site, mean in means.items():
            assert not mean.requires_grad
            se = draws[site].std(0) * math.sqrt(self.SHARE)
            assert mean.shape == draws[site].shape[1:]
            assert bool(((mean - draws[site].mean(0)).abs() <= 5 * se + EXACT).all()), site

    @pytest.mark.parametrize("name", GUIDES)
    def test_quantiles(self, name: str) -> None:
        x, probs = randn(3), [0.02, 0.5, 0.9]
        guide = ready(name, bounded, x)
        draws, quantiles = guide.sample(50_000, x), guide.quantiles(probs, x)
        for site, found in quantiles.items():
            assert found.shape == (3, *draws[site].shape[1:])
            for p, value in zip(probs, found, strict=True):
                if name == "Delta":
                    torch.testing.assert_close(value, draws[site][0])
                    continue
                below = (draws[site] < value).double().mean(0)
                se = math.sqrt(p * (1 - p) * self.SHARE)
                assert bool(((below - p).abs() < 5 * se).all()), (site, p)
        assert guide.quantiles(0.5, x)["m"].shape == (2, 2)

    @pytest.mark.parametrize("name", ["LowRank", "FullRank", "Laplace"])
    def test_closed_form(self, name: str) -> None:
        """t(m + s z_p), with p turned round where t falls."""
        guide: Any = ready(name, bounded, randn(3))
        sd = guide.covariance().diagonal().sqrt()
        z = torch.special.ndtri(torch.tensor(0.1))
        for site, sign in (("level.a", 1.0), ("b", 1.0), ("z", 1.0), ("c", -1.0)):
            latent = guide.latents[site]
            own = sd[guide._layout.slices[site]].reshape(latent.loc.shape)
            u = getattr(guide.loc, latent.key) + sign * own * z
            expected = latent.transform(u).detach()
            found = guide.quantiles(0.1)[site]
            torch.testing.assert_close(found, expected, atol=EXACT, rtol=EXACT)

    @pytest.mark.parametrize("name", GUIDES)
    def test_mean_sets_up(self, name: str) -> None:
        x = randn(3)
        assert make(name).bind(bounded).mean(x)["z"].shape == (3,)

    def test_means_are_no_parameters(self) -> None:
        guide: Any = ready("MeanField", bounded, randn(3))
        mean = guide.mean()["level.a"]
        with torch.no_grad():
            getattr(guide.loc, "level/a").add_(1.0)
        assert float(guide.mean()["level.a"] - mean) == pytest.approx(1.0)


def scaled_world(x: Tensor) -> None:
    with poutine.scale(scale=2.5):
        linear_world(x)


def missing_world(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.7))
        seen = torch.tensor([True, False, True, True])
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)


def masked_rows(x: Tensor) -> None:
    """Some rows do not exist: neither their latents nor their data count."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=torch.arange(4) < 3):
        z = pyro.sample("z", dist.Normal(mu, 0.7))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


WORLDS: dict[str, Program] = {
    "plain": linear_world,
    "scaled": scaled_world,
    "missing": missing_world,
    "masked rows": masked_rows,
}


@pytest.mark.parametrize("name", EXACT_KL)
@pytest.mark.parametrize("world", WORLDS)
def test_exact_kl(name: str, world: str) -> None:
    """Each site's KL is exact, and its mean that of the sampled one."""
    model, x, num = WORLDS[world], randn(4), 4000
    guide = ready(name, model, x)
    with torch.no_grad():
        exact, sample = (
            pvi.ELBO(num, kl=kl).terms(model, guide, x)
            for kl in ("exact", "sample")  # type: ignore[arg-type]
        )
    for site in guide.latents:
        assert exact[site].how == "exact", site
        # A closed form given the sites before has their noise only, and may have none.
        means, variances = zip(
            *((t.mean(), t.var()) for t in (v[site].per_particle() for v in (exact, sample))),
            strict=True,
        )
        se = math.sqrt(float(sum(v for v in variances if v.isfinite())) / num)
        assert abs(float(means[0] - means[1])) < 4 * se + EXACT, site
        assert float(variances[1]) > 0


@pytest.mark.parametrize("name", ["MeanField", "LowRank", "FullRank", "Structured"])
def test_exact_kl_of_positive_numbers(name: str) -> None:
    """torch has the KL of two LogNormals, and a normal under the same exponential is one."""
    x, num = randn(2), 4000
    guide = ready(name, funnel, x)
    with torch.no_grad():
        exact, sample = (
            pvi.ELBO(num, kl=kl).terms(funnel, guide, x)["s"]
            for kl in ("exact", "sample")  # type: ignore[arg-type]
        )
    assert exact.how == "exact"
    a, b = exact.per_particle(), sample.per_particle()
    se = math.sqrt(float(a.var() + b.var()) / num)
    assert abs(float(a.mean() - b.mean())) < 4 * se + EXACT


def own_masks(x: Tensor) -> None:
    """The same, written with the distributions' own masks."""
    mu, seen = pyro.sample("mu", dist.Normal(0.0, 1.0)), torch.arange(4) < 3
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.7).mask(seen))
        pyro.sample("x", dist.Normal(z, 1.0).mask(seen), obs=x)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("MeanField", masked_rows),
        ("FullRank", masked_rows),
        ("Mixture", masked_rows),
        ("Structured", own_masks),
    ],
)
def test_masked_rows_count_nowhere(name: str, model: Program) -> None:
    """Rows that the model masks out leave the guide's density too: the weights' mean is Z."""
    x = randn(4)
    fit = pvi.fit(model, make(name), x, steps=300, seed=0)
    log_w = fit.posterior.log_weights(4000, seed=0)
    seen = x[:3]
    cov = torch.eye(3) * (0.7**2 + 1.0) + 1.0
    log_z = float(torch.distributions.MultivariateNormal(torch.zeros(3), cov).log_prob(seen))
    ratio = (log_w - log_z).exp()
    assert abs(float(ratio.mean()) - 1.0) < 5 * float(ratio.std()) / 4000**0.5 + 0.01
    assert -0.6 < float(log_w.mean()) - log_z < 0.01


def test_masked_rows_of_a_joint_draw_are_refused() -> None:
    x = randn(4)
    with pytest.raises(GuideError, match="masks elements of site 'z' out"):
        pvi.fit(masked_rows, make("Flow"), x, steps=3)


def funnel(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(a, s))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


PATHS = [name for name in TRAINED if name != "Delta" and "Mixture" not in name]


@pytest.mark.parametrize("name", [name for name in TRAINED if "Mixture" in name])
def test_no_path_through_a_mixture(name: str) -> None:
    """The draws of all components are summed: only the reparameterised ELBO allows that."""
    x = randn(2)
    guide = ready(name, funnel, x)
    for objective in (pvi.ELBO(gradient="path"), pvi.IWAE(3)):
        with pytest.raises(ObjectiveError, match="enumerates site '_component_of_a'"):
            objective.loss(funnel, guide, x)


IWAE = ["FullRank", "Structured", "Flow", "Amortized"]


@pytest.mark.parametrize(
    ("name", "bound"), [*((n, "elbo") for n in PATHS), *((n, "iwae") for n in IWAE)]
)
def test_path_gradients(name: str, bound: str) -> None:
    """Off the optimum too, gradients without the score part have the same mean."""
    x, repeats = randn(2), 30 if bound == "elbo" else 80
    guide = ready(name, funnel, x)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    found = {}
    for gradient in ("reparam", "path"):
        options: Any = {"gradient": gradient}
        objective = pvi.ELBO(40, **options) if bound == "elbo" else pvi.IWAE(5, **options)
        rows = []
        for _ in range(repeats):
            loss = objective.differentiable_loss(funnel, guide, x)
            grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
        found[gradient] = torch.stack(rows)
    one, two = found["reparam"], found["path"]
    se = ((one.var(0) + two.var(0)) / repeats).sqrt()
    gap = (one.mean(0) - two.mean(0)).abs()
    assert bool((gap < 5 * se + EXACT).all())
    assert bool((two.mean(0).abs() > 5 * two.std(0) / repeats**0.5).any())  # off the optimum
