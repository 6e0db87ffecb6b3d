"""What once gave a wrong posterior without a word: each is right now, or refused by name."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoLaplaceApproximation, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import pvi
from pvi.engine.params import Params
from pvi.errors import DataError, GuideError, ModelError

pytestmark = pytest.mark.usefixtures("isolated")


def mean_model(y: Tensor | None = None, size: int = 20) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("data", size if y is None else len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def data(size: int = 20) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1)) + 1.0


def test_deterministic_sites_that_cannot_broadcast_are_drawn_one_by_one() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("feature", 3):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.deterministic("total", b.sum())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(b.sum(-1, keepdim=True), 1.0), obs=y)

    draws = pvi.fit(model, data=data(), steps=20, seed=0).posterior.sample(50, seed=0)
    torch.testing.assert_close(draws["total"], draws["b"].sum(-1))


@pytest.mark.parametrize("kind", ["laplace", "list"])
def test_a_point_is_never_judged_by_weights(kind: str) -> None:
    if kind == "laplace":
        guide = AutoLaplaceApproximation(mean_model)
    else:
        guide = AutoGuideList(mean_model)
        guide.append(AutoNormal(poutine.block(mean_model, hide=["sigma"])))
        guide.append(AutoDelta(poutine.block(mean_model, expose=["sigma"])))
    fit = pvi.fit(mean_model, guide, data=data(), steps=50, seed=0)
    diagnosis = fit.diagnose(500)
    assert diagnosis.verdict == "not assessed"
    assert any("a point (Delta) at site 'sigma'" in reason for reason in diagnosis.reasons)


def test_restated_draws_are_no_points() -> None:
    fit = pvi.fit(mean_model, AutoNormal(mean_model), data=data(), steps=50, seed=0)
    assert fit.posterior.caveats() == []


def test_scaled_guides_are_not_assessed() -> None:
    model = poutine.scale(mean_model, scale=0.05)
    guide = poutine.scale(AutoNormal(mean_model), scale=0.05)
    fit = pvi.fit(model, guide, data=data(), steps=20, seed=0)
    assert fit.diagnose(500).verdict == "not assessed"
    with pytest.raises(pvi.ObjectiveError, match="the guide scales site"):
        fit.posterior.log_weights(10)


def test_tempered_fits_are_not_assessed() -> None:
    fit = pvi.fit(mean_model, data=data(), objective=pvi.BetaELBO(0.5), steps=20, seed=0)
    assert fit.diagnose(500).verdict == "not assessed"


def test_masked_out_observations_do_not_run_away() -> None:
    """obs_mask= leaves latents that nothing uses: their entropy must not count.

    The latents of the 4 missing rows are used, as nodes beside mu: independent normals see them as
    data, so the best sd of mu is that of 20 rows.
    """
    y, keep = data(20), torch.arange(20) >= 4

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=keep)

    fit = pvi.fit(model, data=y, steps=500, seed=0)
    draws = fit.posterior.sample(4000, seed=0)["mu"]
    count = int(keep.sum())
    assert float(draws.mean()) == pytest.approx(float(y[keep].sum()) / (count + 1), abs=0.05)
    assert float(draws.std()) == pytest.approx(21**-0.5, rel=0.05)
    scale = fit.guide.scale.y_unobserved.detach()  # type: ignore[attr-defined]
    assert float(scale[keep].max()) < 0.2  # it starts at 0.1
    torch.testing.assert_close(scale[~keep], torch.ones(4), atol=0.05, rtol=0)


def offset_model(x: Tensor, z: Tensor, y: Tensor | None = None, offset: float = 0.0) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 0.01))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mu + x + 10 * z + offset, 0.01), obs=y)


def test_predict_takes_new_constants_and_names() -> None:
    zeros = torch.zeros(4)
    by_name = {"z": zeros, "x": zeros, "y": zeros}
    fit = pvi.fit(offset_model, data=by_name, kwargs={"offset": 0.0}, steps=20, seed=0)
    new = fit.posterior.predict(x=zeros + 1, z=zeros, offset=100.0, num_draws=20, seed=0)["y"]
    assert float(new.mean()) == pytest.approx(101.0, abs=0.5)
    with pytest.raises(DataError, match="by name"):
        fit.posterior.predict(zeros, zeros)


def test_predict_checks_new_rows() -> None:
    zeros = torch.zeros(4)
    fit = pvi.fit(offset_model, data=(zeros, zeros, zeros), steps=20, seed=0)
    with pytest.raises(DataError, match="'x' has 4, 'z' has 3"):
        fit.posterior.predict(zeros, zeros[:3])
    with pytest.raises(DataError, match="'x' has inf"):
        fit.posterior.predict(zeros + float("inf"), zeros)


def test_predict_says_which_argument_is_missing() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu * x, 1.0), obs=y)

    fit = pvi.fit(model, data=(data(), data()), steps=5, seed=0)
    with pytest.raises(DataError, match=r"such as the outcome.*len\(x\)"):
        fit.posterior.predict(data(3))


def own_guide(y: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.tensor(-3.0))
    pyro.sample("mu", dist.Normal(loc, 0.3))
    pyro.sample("sigma", dist.LogNormal(0.0, 0.1))


@pytest.mark.parametrize("kind", ["param", "auto"])
def test_untrained_parameters_are_refused(kind: str) -> None:
    guide = own_guide if kind == "param" else AutoNormal(mean_model)
    fit = pvi.fit(mean_model, own_guide, data=data(), steps=5, seed=0)
    with pytest.raises(GuideError, match="no trained value"):
        pvi.Posterior(mean_model, guide, data())
    assert set(fit.posterior.on(data(5)).sample(3, seed=0)) == {"mu", "sigma"}


def test_modules_with_a_common_parameter_name_are_refused() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)

        def forward(self, y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu, self.scale), obs=y)

    class Guide(Model):
        def forward(self, y: Tensor) -> None:
            pyro.sample("mu", dist.Normal(0.0, self.scale))

    with pytest.raises(GuideError, match=r"'scale_unconstrained'.*[Rr]ename"):
        pvi.fit(Model(), Guide(), data=data(), steps=2, seed=0)


def test_networks_in_closures_are_evaluated_without_dropout() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1))

    def model(y: Tensor) -> None:
        pyro.module("net", net)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.deterministic("f", net(torch.ones(len(y), 1)).squeeze(-1), event_dim=0)
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fit = pvi.fit(model, data=data(), steps=5, seed=0)
    net.train()
    before = net[1].running_mean.clone()  # type: ignore[union-attr, operator]
    f = fit.posterior.sample(20, seed=0)["f"]
    assert float(f.std()) < 1e-6
    assert torch.equal(before, net[1].running_mean)  # type: ignore[arg-type]
    assert net.training


def test_networks_that_nobody_trains_are_refused() -> None:
    net = nn.Linear(1, 1)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu + net(torch.ones(1)), 1.0), obs=y)

    with pytest.raises(ModelError, match=r"pyro\.module"):
        pvi.fit(model, data=data(), steps=2, seed=0)
    net.requires_grad_(False)
    pvi.fit(model, data=data(), steps=2, seed=0)


def test_a_loaders_collate_makes_the_data() -> None:
    def centred(items: list) -> list:
        return [default_collate(items)[0] - 50.0]

    loader = DataLoader(TensorDataset(data() + 50.0), batch_size=5, collate_fn=centred)
    fit = pvi.fit(mean_model, data=loader, steps=5, seed=0)
    (rows,), _ = fit.posterior.data.whole()
    torch.testing.assert_close(rows, data())


def test_an_objective_carries_nothing_between_fits() -> None:
    def model(y: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(3 * k, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        probs = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        pyro.sample("k", dist.Bernoulli(probs))

    objective = pvi.ELBO()
    runs = [pvi.fit(model, guide, data(), objective=objective, steps=5, seed=0) for _ in range(2)]
    assert runs[0].history["grad_norm"].tolist() == runs[1].history["grad_norm"].tolist()


def test_path_gradients_across_dtypes() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    torch.set_default_dtype(torch.float32)
    objective = pvi.IWAE(3, gradient="path")
    pvi.fit(model, data=data().double(), objective=objective, steps=3, seed=0)


def test_nan_under_a_mask_in_minibatches() -> None:
    y = data(40)
    y[3] = float("nan")

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fit = pvi.fit(model, data=y, batch_size=8, steps=50, seed=0)
    assert bool(torch.tensor(fit.history["bound"]).isfinite().all())


def test_an_error_in_a_callback_leaves_the_guide_whole() -> None:
    guide = AutoNormal(mean_model)

    def fail(step: object) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        pvi.fit(mean_model, guide, data=data(40), batch_size=8, callbacks=[fail], seed=0)
    assert all(frame.size == frame.full_size for frame in guide._prototype_frames.values())


def test_models_without_latents() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    fit = pvi.fit(model, lambda y: None, data=data(), steps=50, seed=0)
    assert fit.diagnose(100).verdict == "not assessed"
    assert "posterior_predictive" in fit.posterior.to_datatree(20, seed=0).children


def test_factors_are_no_data() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("f", -(mu**2))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    tree = pvi.fit(model, data=data(), steps=5, seed=0).posterior.to_datatree(10, seed=0)
    for group in ("posterior_predictive", "observed_data", "log_likelihood"):
        assert set(tree[group].data_vars) == {"y"}


def test_dims_may_include_the_plate() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("col", 2):
            b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(b.sum((-1, -2), keepdim=True).squeeze(-1), 1.0), obs=y)

    fit = pvi.fit(model, data=data(), steps=2, seed=0)
    for dims in (["col", "k"], ["k"]):
        tree = fit.posterior.to_datatree(5, seed=0, dims={"b": dims})
        assert tree["posterior"]["b"].dims == ("chain", "draw", "col", "k")


def test_which_parameters_are_networks() -> None:
    class Program(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.lin = PyroModule[nn.Linear](1, 1)
            self.own = PyroParam(torch.tensor(1.0), dist.constraints.positive)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))
            self.net = nn.Linear(1, 1)

    params = Params(Program(), Plain())
    found = {name.split(":")[1]: params.is_network(name) for name in params.names()}
    assert found == {
        "lin.weight": True,
        "lin.bias": True,
        "own_unconstrained": False,
        "loc": False,
        "net.weight": True,
        "net.bias": True,
    }


def test_the_same_seed_gives_the_same_draws_whatever_is_exported() -> None:
    fit = pvi.fit(mean_model, data=data(), steps=5, seed=0)
    plain = fit.posterior.sample(30, seed=3)["mu"]
    for predictive in (True, False):
        tree = fit.posterior.to_datatree(30, seed=3, predictive=predictive)
        assert torch.equal(torch.tensor(tree["posterior"]["mu"].values[0]), plain)


@pytest.mark.parametrize("optimizer", ["auto", "adam"])
def test_latents_without_elements(optimizer: str) -> None:
    """A vector of effects whose factor has no levels is no error, alone or with others."""

    def model(y: Tensor, levels: int) -> None:
        pyro.sample("effects", dist.Normal(torch.zeros(levels), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    options = {"data": torch.ones(5), "args": (0,), "optimizer": optimizer}
    fit = pvi.fit(model, callbacks=[lambda step: step.step == 20], **options)
    assert fit.posterior.sample(3)["effects"].shape == (3, 0)
