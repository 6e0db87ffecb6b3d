"""Bayesian networks: a linear one against the exact answer, gradients, kinds of modules, saving."""

import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvi
from pvi.errors import ModelError
from pvi.models import bnn
from pvi.models.bnn import layers, network
from tests.scenarios import randn

NOISE = 0.3
KINDS = ("sampled", "local", "flipout")
pytestmark = pytest.mark.usefixtures("isolated")


def program(model: Any, kind: str) -> Any:
    return model if kind == "sampled" else pvi.local_reparam(model, kind=kind)


# Linear regression, where all is known.


class Exact:
    """Linear regression with unit normal priors: posterior, evidence, best factorised bound."""

    def __init__(self) -> None:
        x = randn(40, 3, seed=1).double()
        self.x = torch.stack([x[:, 0], x[:, 1] + 0.7 * x[:, 0], x[:, 2]], -1)
        self.y = self.x @ torch.tensor([1.0, -1.0, 0.5]) + 0.3 + NOISE * randn(40, seed=2).double()
        design = torch.cat([self.x, torch.ones(40, 1)], 1)
        precision = design.T @ design / NOISE**2 + torch.eye(4)
        mean = torch.linalg.solve(precision, design.T @ self.y) / NOISE**2
        cov = design @ design.T + NOISE**2 * torch.eye(40)
        self.posterior = dist.MultivariateNormal(mean, precision_matrix=precision)
        self.log_z = dist.MultivariateNormal(torch.zeros(40), cov).log_prob(self.y)
        self.mean, self.sd = mean, precision.diagonal().rsqrt()  # of the best factorised normal

    def bound(self, mean: Tensor, cov: Tensor) -> Tensor:
        """The ELBO of a normal in closed form, nats."""
        q = dist.MultivariateNormal(mean, cov)
        return self.log_z - torch.distributions.kl_divergence(q, self.posterior)

    @property
    def best(self) -> Tensor:
        return self.bound(self.mean, self.sd.square().diag())


@pytest.fixture
def exact() -> Exact:
    return Exact()


def linear(kind: str) -> Any:
    model = bnn.bayesianize(
        nn.Linear(3, 1), prior=dist.Normal(0.0, 1.0), likelihood=bnn.Gaussian(NOISE)
    )
    return program(model, kind)


def moments(guide: Any) -> tuple[Tensor, Tensor]:
    mean = torch.cat([guide.mean()[n].reshape(-1) for n in ("weight", "bias")])
    scale = torch.cat([getattr(guide.scale, n).detach().reshape(-1) for n in ("weight", "bias")])
    return mean, scale


def set_to(guide: Any, mean: Tensor, sd: Tensor) -> None:
    with torch.no_grad():
        for name, part in (("weight", slice(0, 3)), ("bias", slice(3, 4))):
            for where, x in ((guide.loc, mean[part]), (guide.scale, sd[part].log())):
                leaf = getattr(where, f"{name}_unconstrained")
                leaf.copy_(x.reshape(leaf.shape))


def leaves(guide: Any) -> list[Tensor]:
    return [p for _, p in sorted(guide.named_parameters())]


@pytest.mark.parametrize("num_particles", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_regression_bound_and_gradient(kind: str, num_particles: int, exact: Exact) -> None:
    """At the exact optimum the mean bound is the exact one, and the mean gradient zero."""
    model, objective = linear(kind), pvi.TraceMeanFieldELBO(num_particles)
    guide = pvi.guides.MeanField(model).setup(exact.x, exact.y)
    set_to(guide, exact.mean, exact.sd)
    values, slopes = [], []
    for _ in range(150):
        evaluation = objective.evaluate(model, guide, (exact.x, exact.y))
        values.append(evaluation.bound)
        found = torch.autograd.grad(evaluation.loss, leaves(guide))
        slopes.append(torch.cat([g.reshape(-1) for g in found]))
    v, g = torch.stack(values), torch.stack(slopes)
    se = v.std() / math.sqrt(len(v))
    assert abs(v.mean() - exact.best) < 4.0 * se
    assert se < 0.25
    assert (g.mean(0) / (g.std(0) / math.sqrt(len(g)))).abs().max() < 4.0


def test_sampled_and_local_fits_find_the_optimum(exact: Exact) -> None:
    """Within 0.02 nats and 1 %, by fixed draws and by noise on activations in minibatches."""
    settings: dict[str, dict] = {
        "sampled": {},
        "local": {"steps": 1000, "lr": 0.02, "batch_size": 20, "compile": "graph"},
    }
    for kind, options in settings.items():
        start = {"weight": exact.mean[:3].reshape(1, 3), "bias": exact.mean[3:]}
        fit = pvi.fit(
            linear(kind),
            pvi.guides.MeanField(init_loc_fn=start, init_scale=0.1),
            (exact.x, exact.y),
            objective=pvi.TraceMeanFieldELBO(8),
            seed=0,
            **options,
        )
        mean, sd = moments(fit.guide)
        assert exact.best - exact.bound(mean, sd.square().diag()) < 0.02, kind
        assert (sd / exact.sd - 1.0).abs().max() < (0.01 if kind == "sampled" else 0.04), kind


@pytest.mark.slow
@pytest.mark.parametrize("num_particles", [1, 8])
@pytest.mark.parametrize("kind", ["local", "flipout"])
def test_long_fits_find_the_optimum(kind: str, num_particles: int, exact: Exact) -> None:
    fit = pvi.fit(
        linear(kind),
        pvi.guides.MeanField(init_scale=1e-2),
        (exact.x, exact.y),
        objective=pvi.TraceMeanFieldELBO(num_particles),
        seed=0,
        steps=20_000,
        lr=0.02,
        compile="graph",
    )
    mean, sd = moments(fit.guide)
    assert exact.best - exact.bound(mean, sd.square().diag()) < 0.02
    assert (sd / exact.sd - 1.0).abs().max() < 0.02


def test_full_rank_reaches_the_evidence(exact: Exact) -> None:
    model = linear("local")
    fit = pvi.fit(model, pvi.guides.FullRank(), (exact.x, exact.y), seed=0)
    draws = fit.posterior.sample(20_000, seed=0)
    z = torch.cat([draws[n].reshape(20_000, -1) for n in ("weight", "bias")], 1)
    assert exact.log_z - exact.bound(z.mean(0), z.T.cov()) < 0.02
    text = str(pvi.ELBO().explain(model, fit.guide, exact.x, exact.y))
    assert "sampled: Normal in the guide: weight, bias" in text or "in the guide" in text


@pytest.mark.parametrize("kind", KINDS)
def test_minibatches_average_to_the_whole(kind: str, exact: Exact) -> None:
    model = linear(kind)
    guide = pvi.guides.MeanField(model).setup(exact.x, exact.y)
    set_to(guide, exact.mean + 0.1, 1.5 * exact.sd)
    objective = pvi.TraceMeanFieldELBO(64)

    def bounds(rows: slice) -> Tensor:
        scaled = pyro.poutine.scale(model, 1.0)
        at = (exact.x[rows], exact.y[rows])
        found = [objective.evaluate(scaled, guide, at).bound for _ in range(20)]
        return torch.stack(found)

    def likelihood(rows: slice) -> tuple[Tensor, Tensor]:
        kl = sum(objective.terms(model, guide, exact.x, exact.y).kl().values())
        found = bounds(rows) + kl
        return found.mean(), found.var() / len(found)

    parts = [likelihood(slice(k, k + 10)) for k in range(0, 40, 10)]
    whole = likelihood(slice(0, 40))
    se = (sum(v for _, v in parts) + whole[1]).sqrt()
    assert abs(sum(m for m, _ in parts) - whole[0]) < 4.0 * se


# Gradients of a network with layers, off the optimum.

X, Y = randn(6, 2, seed=4).double(), randn(6, seed=5).double()


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


@cache
def sampled_gradients() -> Tensor:
    return gradients("sampled")


def gradients(kind: str, num: int = 120, kl: Any = "exact") -> Tensor:
    model = program(bnn.bayesianize(two_layers(), likelihood=bnn.Gaussian(0.5)), kind)
    guide = pvi.guides.MeanField(model, "module", init_scale=0.3).setup(X, Y)
    objective = pvi.ELBO(8, kl=kl)
    found = []
    torch.manual_seed(1)
    for _ in range(num):
        loss = objective.evaluate(model, guide, (X, Y)).loss
        slopes = torch.autograd.grad(loss, leaves(guide))
        found.append(torch.cat([g.reshape(-1) for g in slopes]))
    return torch.stack(found)


def check_gradients(kind: str, kl: str = "exact") -> None:
    plain, other = sampled_gradients(), gradients(kind, kl=kl)
    se = (plain.var(0) / len(plain) + other.var(0) / len(other)).sqrt()
    assert ((plain.mean(0) - other.mean(0)) / se).abs().max() < 4.5
    if kl == "exact":
        assert other.var(0).sum() < 0.8 * plain.var(0).sum()


@pytest.mark.parametrize(
    ("kind", "kl"), [("local", "exact"), ("flipout", "exact"), ("local", "sample")]
)
def test_gradients_have_the_same_mean_and_less_variance(kind: str, kl: str) -> None:
    check_gradients(kind, kl)


def test_the_gradient_test_has_teeth(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(layer: Any, *rest: Any) -> layers.Hook:
        return lambda x, output: output

    monkeypatch.setattr(network, "local", silent)
    with pytest.raises(AssertionError):
        check_gradients("local")


# Where draws of activations are refused.


def test_objectives_that_weigh_draws_use_the_weights() -> None:
    model = pvi.local_reparam(bnn.bayesianize(two_layers(), likelihood=bnn.Gaussian(0.5)))
    guide = pvi.guides.MeanField(model, "module", init_scale=0.3).setup(X, Y)
    plain = bnn.bayesianize(two_layers(), likelihood=bnn.Gaussian(0.5))
    for objective in (pvi.IWAE(3), pvi.ELBO(3, gradient="path"), pvi.ELBO(3, gradient="score")):
        text = str(objective.explain(model, guide, X, Y))
        assert "drawn as" not in text
        assert "sampled: " in text
        torch.manual_seed(0)
        one = objective.evaluate(model, guide, (X, Y)).bound
        torch.manual_seed(0)
        two = objective.evaluate(plain, guide, (X, Y)).bound
        assert torch.equal(one, two)
    assert "drawn as activations (local): 0.weight" in str(pvi.ELBO().explain(model, guide, X, Y))


def test_dependent_guides_use_the_weights() -> None:
    """Where another site of the guide follows a draw, activations must follow that draw too."""
    model = pvi.local_reparam(bnn.bayesianize(nn.Linear(2, 1), likelihood=bnn.Gaussian(0.5)))

    def guide(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("weight", dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
        pyro.sample("bias", dist.Normal(w.sum(-1), 1.0).to_event(1))

    text = str(pvi.ELBO().explain(model, guide, X, Y))
    assert "sampled: the guide's 'bias' depends on it: weight" in text


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(ModelError, match="kind must be"):
        pvi.local_reparam(two_layers(), kind="flip")
    with pytest.raises(ModelError, match="Pyro program"):
        pvi.local_reparam(3)  # type: ignore[arg-type]


# Kinds of modules.


class Last(nn.Module):
    """The last output of a recurrent network, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.second(self.norm(h).relu())
        return self.head(h.mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 3), nn.Linear(3, 1)
        self.out = nn.Linear(3, 9, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x).mean(1)
        return self.head(h) + self.out(h).mean(-1, keepdim=True)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "mlp": (two_layers, (2,), ("0.weight", "2.bias")),
    "resnet": (Residual, (1, 4, 4), ("first.weight", "norm.weight", "second.weight")),
    "encoder": (Encoder, (3, 4), ("layer.self_attn.in_proj_weight", "layer.linear1.weight")),
    "embedding": (Words, (4,), ("table.weight",)),
    "lstm": (Last, (3, 2), ("rnn.weight_ih_l0", "head.weight")),
}


def case(name: str, rows: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape, _ = MODULES[name]
    torch.manual_seed(0)
    x = torch.randn(rows, *shape) if name != "embedding" else torch.randint(9, (rows, *shape))
    return make(), x, torch.randn(rows)


@pytest.mark.parametrize("name", MODULES)
def test_modules_run_for_many_draws_and_stay_as_they_are(name: str) -> None:
    module, x, y = case(name)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    for kind in KINDS:
        model = program(bnn.bayesianize(module, likelihood=bnn.Gaussian(0.5)), kind)
        assert set(MODULES[name][2]) <= set(model.sites)
        guide = pvi.guides.MeanField(model, "module", init_scale=0.05).setup(x, y)
        bounds = {}
        for num in (1, 4):
            objective = pvi.TraceMeanFieldELBO(num)
            text = str(objective.explain(model, guide, x, y))
            if num > 1:
                assert ("network run draw by draw" in text) == (name == "lstm")
            many = [objective.evaluate(model, guide, (x, y)) for _ in range(24 // num)]
            torch.autograd.grad(many[0].loss, leaves(guide))
            found = torch.stack([e.bound for e in many])
            bounds[num] = found.mean(), found.var() / len(found)
        se = (bounds[1][1] + bounds[4][1]).sqrt()
        assert abs(bounds[1][0] - bounds[4][0]) < 5.0 * se
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert modes == [m.training for m in module.modules()]
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("name", MODULES)
def test_draws_in_one_run_are_those_one_by_one(name: str) -> None:
    module, x, _ = case(name)
    net = network.Network(module, bnn.selection.select(module, None), 1)
    values = {
        n: w.value + 0.1 * torch.randn(3, 1, *w.shape)
        for n, w in bnn.selection.select(module, None).items()
    }
    together = net((x,), values, {}, {})
    for k in range(3):
        alone = net((x,), {n: v[k, 0] for n, v in values.items()}, {}, {})
        assert torch.allclose(together[k], alone)
    tied = {n: w.value for n, w in bnn.selection.select(module, None).items()}
    assert torch.allclose(net((x,), tied, {}, {}), module.eval()(x))


def test_tied_weights_are_one_site() -> None:
    module, _, _ = case("embedding")
    assert bnn.bayesianize(module).sites == ("table.weight", "head.weight", "head.bias")


# What is random.


@pytest.mark.parametrize(
    ("where", "sites"),
    [
        (None, {"first.weight", "first.bias", "norm.weight", "norm.bias", "second.weight"}),
        ("head.*", {"head.weight", "head.bias"}),
        (nn.Linear, {"head.weight", "head.bias"}),
        ((nn.Conv2d, nn.Linear), {"first.weight", "second.bias", "head.weight"}),
        (bnn.weights, {"first.weight", "second.weight", "head.weight"}),
        (lambda name, owner, parameter: parameter.dim() == 4, {"first.weight", "second.weight"}),
    ],
)
def test_where(where: Any, sites: set[str]) -> None:
    model = bnn.bayesianize(Residual(), where=where)
    assert sites <= set(model.sites)
    if where is not None and not isinstance(where, tuple):
        assert sites == set(model.sites)
    rest = {f"module.{n}" for n, _ in model.module.named_parameters() if n not in model.sites}
    assert {n for n, _ in model.named_parameters()} == rest


def test_the_last_layer() -> None:
    module = Residual()
    assert set(bnn.bayesianize(module, where=bnn.last_layer(module)).sites) == {
        "head.weight",
        "head.bias",
    }


def test_what_is_not_selected_is_learned_or_fixed() -> None:
    module, x, y = two_layers(), X, Y
    module[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    model = pvi.local_reparam(bnn.bayesianize(module, where="2.*", likelihood=bnn.Gaussian(0.5)))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    fit = pvi.fit(model, data=(x, y), steps=20, seed=0)
    after = fit.model.module.state_dict()
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert torch.equal(after["0.bias"], before["0.bias"])
    assert torch.equal(after["2.weight"], before["2.weight"])  # random: its own value stays


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"where": "nothing"}, "selects no parameter"),
        ({"where": 3}, "where must be"),
        ({"prior": 3}, "prior must be"),
        ({"prior": dist.Normal(torch.zeros(2), 1.0)}, "single number"),
        ({"likelihood": 3}, "likelihood must be"),
        ({"copies": 0}, "copies must be"),
    ],
)
def test_wrong_options(options: dict, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        bnn.bayesianize(two_layers(), **options)


def test_norms_of_a_batch_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(ModelError, match="statistics of the batch"):
        bnn.bayesianize(net)


# Copies.


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_networks_of_their_own(kind: str) -> None:
    """Their bound is the sum of those of single networks with the same guide."""
    num = 3
    x, y = torch.randn(5, num, 2), torch.randn(5, num)
    many = program(bnn.bayesianize(two_layers(), likelihood=bnn.Gaussian(), copies=num), kind)
    guide = pvi.guides.MeanField(many, init_scale=0.2).setup(x, y)
    assert guide.loc.state_dict()["0/weight_unconstrained"].shape == (num, 4, 2)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn_like(p))
    objective = pvi.ELBO(50, kl="exact")
    total = torch.stack([objective.evaluate(many, guide, (x, y)).bound for _ in range(12)])
    alone = []
    for s in range(num):
        one = bnn.bayesianize(two_layers(), likelihood=bnn.Gaussian())
        part = pvi.guides.MeanField(one).setup(x[:, s], y[:, s])
        with torch.no_grad():
            for p, q in zip(part.parameters(), guide.parameters(), strict=True):
                p.copy_(q[s])
        found = [objective.evaluate(one, part, (x[:, s], y[:, s])).bound for _ in range(12)]
        alone.append(torch.stack(found))
    se = (total.var() / 12 + sum(a.var() / 12 for a in alone)).sqrt()
    assert abs(total.mean() - sum(a.mean() for a in alone)) < 4.0 * se
    assert pvi.ELBO(2).terms(many, guide, x, y)["y"].tensor.shape == (2, 5, num)


def test_copies_need_a_column_each() -> None:
    model = bnn.bayesianize(two_layers(), copies=3)
    with pytest.raises(ModelError, match="copies=3"):
        model(torch.randn(5, 2))


# Use.


def test_predictions_repeat_and_change_nothing(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
    model = pvi.local_reparam(bnn.bayesianize(net))
    guide = pvi.guides.MeanField(init_loc_fn="module", init_scale=1e-2)
    fit = pvi.fit(model, guide, (X, Y), steps=20, batch_size=3, seed=0)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    one = fit.posterior.predict(X[:4], num_draws=30, seed=1)
    two = fit.posterior.predict(X[:4], num_draws=30, seed=1)
    assert torch.equal(one["y"], two["y"])
    assert one["f"].shape == (30, 4, 1)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert modes == [m.training for m in net.modules()]
    fit.save(tmp_path / "fit")
    torch.manual_seed(9)
    new = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
    again = bnn.bayesianize(new)  # with or without local_reparam
    loaded = pvi.load(tmp_path / "fit", again, pvi.guides.MeanField(), (X, Y))
    three = loaded.posterior.predict(X[:4], num_draws=30, seed=1)
    assert torch.allclose(three["y"], one["y"])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_graph_are_those_of_the_program(kind: str) -> None:
    fits = [
        pvi.fit(
            program(bnn.bayesianize(two_layers(), likelihood=bnn.Gaussian(0.5)), kind),
            pvi.guides.MeanField(init_loc_fn="module", init_scale=0.05),
            (X, Y),
            steps=12,
            seed=0,
            compile=way,
            objective=pvi.TraceMeanFieldELBO(2),
        )
        for way in (False, "graph")
    ]
    assert any("compiled" in note for note in fits[1].notes)
    for a, b in zip(leaves(fits[0].guide), leaves(fits[1].guide), strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


# Priors and likelihoods.

PRIORS: dict[str, Any] = {
    "normal": dist.Normal(0.0, 0.5),
    "fan in": bnn.FanIn(2.0),
    "laplace": bnn.Laplace(),
    "mixture": bnn.ScaleMixture(0.3, 1.0, 0.1),
    "hierarchical": bnn.Hierarchical(),
    "horseshoe": bnn.Horseshoe(),
    "pretrained": bnn.Pretrained(two_layers().double(), 0.1),
    "empirical": bnn.EmpiricalBayes(),
}
SDS: dict[str, float] = {  # of the weights of the second layer, of fan-in 4
    "normal": 0.5,
    "fan in": 1.0,
    "laplace": 0.5,
    "mixture": math.sqrt(0.3 + 0.7 * 0.01),
    "hierarchical": math.sqrt(2.0 / (2.0 - 1.0) / 4.0),
    "pretrained": 0.1,
    "empirical": 0.5,
}


@pytest.mark.parametrize("name", PRIORS)
def test_priors(name: str) -> None:
    model = bnn.bayesianize(two_layers(), prior=PRIORS[name], likelihood=bnn.Gaussian(0.5))
    weight = model.weights["2.weight"]
    with pyro.plate("draws", 20_000, dim=-1):
        w = pyro.sample("w", model.prior(weight))
        assert w.shape == (20_000, 1, 4)
    if name in SDS:
        centre = PRIORS[name].values["2.weight"] if name == "pretrained" else 0.0
        assert abs((w - centre).std() / SDS[name] - 1.0) < (0.1 if name == "hierarchical" else 0.02)
    for num in (1, 3):
        guide = pvi.guides.MeanField(model, init_scale=0.1).setup(X, Y)
        evaluation = pvi.TraceMeanFieldELBO(num).evaluate(model, guide, (X, Y))
        assert evaluation.loss.isfinite()
    assert str(pvi.ELBO(3).explain(model, guide, X, Y)).count("particles: batched") == 1


def test_the_gain_of_a_norm_is_about_one() -> None:
    model = bnn.bayesianize(nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1)))
    assert model.prior(model.weights["0.weight"]).mean.tolist() == [1.0, 1.0]
    assert model.prior(model.weights["1.weight"]).mean.tolist() == [[0.0, 0.0]]


def test_empirical_bayes_learns_the_scale() -> None:
    """The best scale of a prior is the root of the mean square of its weights."""
    model = bnn.bayesianize(
        nn.Linear(2, 1, bias=False), prior=bnn.EmpiricalBayes(), likelihood=bnn.Gaussian(0.5)
    )
    fit = pvi.fit(
        model, data=(X, Y), steps=600, lr=0.05, seed=0, objective=pvi.TraceMeanFieldELBO(8)
    )
    with fit.posterior.params.scope():
        scale = float(pyro.param("weight.scale").detach())
    guide = fit.guide
    second = (guide.loc.weight.square() + guide.scale.weight.square()).mean()
    assert abs(scale / float(second.detach().sqrt()) - 1.0) < 0.03


COUNTS = torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0, 5.0])
LIKELIHOODS: dict[str, tuple[Any, Tensor, int, set[str]]] = {
    "gaussian": (bnn.Gaussian(), Y, 1, {"noise"}),
    "decoded": (bnn.Gaussian("decoded"), Y, 2, set()),
    "student": (bnn.StudentT(), Y, 1, {"noise", "df"}),
    "student, known": (bnn.StudentT(4.0, 0.5), Y, 1, set()),
    "categorical": (bnn.Categorical(3), COUNTS.clamp(max=2), 3, set()),
    "bernoulli": (bnn.Bernoulli(), (COUNTS > 1).double(), 1, set()),
    "poisson": (bnn.Poisson(), COUNTS, 1, set()),
    "negative binomial": (bnn.NegativeBinomial(), COUNTS, 1, {"shape"}),
    "ordinal": (bnn.Ordinal(4), COUNTS.clamp(max=3), 1, {"cutpoints"}),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("copies", [1, 2])
def test_likelihoods(name: str, copies: int) -> None:
    likelihood, y, width, latents = LIKELIHOODS[name]
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, width))
    model = pvi.local_reparam(bnn.bayesianize(net, likelihood=likelihood, copies=copies))
    x = X if copies == 1 else X.unsqueeze(1).expand(-1, copies, -1)
    y = y if copies == 1 else y.unsqueeze(1).expand(-1, copies)
    likelihood.check(y)
    guide = pvi.guides.MeanField(model, init_scale=0.1).setup(x, y)
    assert set(guide.latents) - set(model.sites) == latents
    for num in (1, 3):
        terms = pvi.TraceMeanFieldELBO(num).terms(model, guide, x, y)
        assert terms["y"].tensor.shape == (num, *y.shape)
        assert terms.log_weights().isfinite().all()


def test_several_targets_have_a_noise_each() -> None:
    net = nn.Linear(2, 3)
    model = pvi.local_reparam(bnn.bayesianize(net))
    y = torch.randn(6, 3)
    guide = pvi.guides.MeanField(model).setup(X, y)
    assert guide.latents["noise"].loc.shape == (3,)
    assert pvi.ELBO(4).terms(model, guide, X, y)["y"].tensor.shape == (4, 6)
    decoded = bnn.Gaussian("decoded")(torch.randn(5, 6))
    assert (decoded.batch_shape, decoded.event_shape) == ((5,), (3,))
    with pytest.raises(ModelError, match="gives 3 numbers"):
        bnn.Gaussian("decoded")(torch.randn(5, 3))


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson", "ordinal", "gaussian"])
def test_targets_outside_the_support_are_refused(name: str) -> None:
    with pytest.raises(pvi.DataError, match=r"y\[1\]"):
        LIKELIHOODS[name][0].check(torch.tensor([1.0, torch.inf if name == "gaussian" else -1.0]))


def test_draws_from_the_prior() -> None:
    """A linear function with unit normal weights and bias has the variance 1 + x^2 / fan-in."""
    model = bnn.bayesianize(nn.Linear(1, 1))
    x = torch.tensor([[0.0], [2.0]])
    f = bnn.prior_draws(model, x, 20_000, seed=0)
    assert f.shape == (20_000, 2, 1)
    assert torch.allclose(f.var(0)[:, 0], torch.tensor([1.0, 5.0]), rtol=0.05)
    assert torch.equal(f, bnn.prior_draws(model, x, 20_000, seed=0))
    pytest.importorskip("matplotlib")
    figure = bnn.plot_prior(model, torch.linspace(-1.0, 1.0, 9).unsqueeze(-1), 5)
    assert len(figure.axes[0].lines) == 6


# More guides, and one task after another.


def test_dropout_has_its_density() -> None:
    """Its mass is 1, by the density against that of a wide normal; its moments are the draws'."""
    fn = bnn.dropout.ColumnDropout(torch.tensor([[1.0, -2.0]]), 0.3, 0.25, 2)
    x = fn.rsample((40_000,))
    assert torch.allclose(x.mean(0), fn.mean, atol=0.03)
    assert torch.allclose(x.var(0), fn.variance, rtol=0.04)
    wide = dist.Normal(torch.zeros(1, 2), 1.5).to_event(2)
    z = wide.sample((200_000,))
    ratio = (fn.log_prob(z) - wide.log_prob(z)).exp()
    assert abs(ratio.mean() - 1.0) < 4.0 * ratio.std() / math.sqrt(len(z))
    image = bnn.dropout.ColumnDropout(torch.ones(3, 2, 2, 2), 1e-3, 0.5, 4).rsample((50,))
    there = (image > 0.5).double()
    assert torch.equal(there, there[:, :1, :, :1, :1].expand_as(there))


@pytest.mark.parametrize("guide", [bnn.MCDropout(0.2, init_loc_fn="module"), pvi.guides.Mixture(2)])
def test_other_guides_of_networks(guide: Any) -> None:
    model = bnn.bayesianize(two_layers(), likelihood=bnn.Gaussian(0.5))
    fit = pvi.fit(model, guide, (X, Y), steps=30, seed=0)
    assert fit.posterior.predict(X, num_draws=5)["y"].shape == (5, 6)
    assert math.isfinite(fit.history["bound"][-1])


def test_rank_one() -> None:
    module = two_layers()
    net = bnn.rank_one(module)
    assert torch.allclose(net(X), module(X))
    model = bnn.bayesianize(net, where=bnn.factors, prior=dist.Normal(1.0, 0.1))
    assert len(model.sites) == 4
    guide = pvi.guides.FullRank(init_loc_fn="module", init_scale=0.01)
    fit = pvi.fit(model, guide, (X, Y), steps=30, seed=0)
    assert fit.posterior.predict(X, num_draws=5)["y"].shape == (5, 6)
    with pytest.raises(ModelError, match="linear layers"):
        bnn.rank_one(nn.LayerNorm(2))


def test_one_half_after_the_other_is_all_at_once(exact: Exact) -> None:
    """With orthogonal inputs the posterior factorises, and its halves add up exactly."""
    x = torch.linalg.qr(exact.x[:20] - exact.x[:20].mean(0)).Q * 4.0
    y = exact.y[:20]
    net = nn.Linear(3, 1, bias=False)

    def fitted(prior: Any, rows: list[int]) -> pvi.Fit:
        model = bnn.bayesianize(net, prior=prior, likelihood=bnn.Gaussian(NOISE))
        return pvi.fit(model, data=(x[rows], y[rows]), seed=0)

    both = fitted(dist.Normal(0.0, 1.0), list(range(20)))
    repeated = fitted(dist.Normal(0.0, 1.0), list(range(20)))
    prior = bnn.posterior_as_prior(repeated)
    loc, scale = prior.values["weight"]  # type: ignore[union-attr]
    assert torch.allclose(loc, both.guide.mean()["weight"], atol=1e-3)
    twice = fitted(prior, list(range(20)))
    precision = 16.0 / NOISE**2
    assert torch.allclose(scale, torch.full((1, 3), (precision + 1.0) ** -0.5), rtol=0.01)
    sd = twice.guide.scale.weight.detach()
    assert torch.allclose(sd, torch.full((1, 3), (2.0 * precision + 1.0) ** -0.5), rtol=0.01)
    wide = bnn.bayesianize(nn.Linear(3, 2), prior=bnn.posterior_as_prior(both, bnn.FanIn(9.0)))
    assert wide.prior(wide.weights["bias"]).stddev.tolist() == [9.0, 9.0]


def test_networks_side_by_side() -> None:
    """Two fits of one module do not meet."""
    module = two_layers()
    one = pvi.fit(
        bnn.bayesianize(module, likelihood=bnn.Gaussian(0.5)), data=(X, Y), steps=5, seed=0
    )
    first = one.guide.mean()["0.weight"].clone()
    pvi.fit(bnn.bayesianize(module, prior=bnn.FanIn(3.0)), data=(X, -Y), steps=5, seed=0)
    assert torch.equal(one.guide.mean()["0.weight"], first)


@pytest.mark.parametrize(
    "guide", [pvi.guides.FullRank(), pvi.guides.LowRank(rank=2), bnn.MCDropout(0.2)]
)
def test_a_prior_of_a_guide_with_correlations_has_its_marginals(guide: Any) -> None:
    """Not the moments of a site given a draw of the sites before it."""
    fit = pvi.fit(
        bnn.bayesianize(two_layers(), likelihood=bnn.Gaussian(0.3)),
        guide,
        (X, Y),
        steps=60,
        lr=0.05,
        seed=0,
    )
    prior = fit.posterior.as_prior()
    draws = fit.posterior.sample(4000, seed=0)
    for name, (loc, scale) in prior.items():
        values = draws[name].reshape(4000, *loc.shape)
        z = (values.mean(0) - loc) / scale * 4000**0.5
        assert z.abs().max() < 4.5, name
        # the sd of a column that is dropped or not has a larger error than a normal's
        assert torch.allclose(values.std(0), scale, rtol=0.1), name
    again = bnn.bayesianize(two_layers(), prior=prior)
    assert torch.equal(again.prior(again.weights["0.weight"]).mean, prior["0.weight"][0])


def test_fan_in_of_a_transposed_convolution() -> None:
    """Functions keep their scale: inputs are the first dimension of its weight."""
    layer = nn.ConvTranspose1d(16, 2, 4, stride=2, groups=2, bias=False)
    model = bnn.bayesianize(nn.Sequential(layer, nn.Flatten()), likelihood=bnn.Gaussian(0.1))
    assert model.weights["0.weight"].fan_in == 16
    x = torch.randn(4, 16, 30, generator=torch.Generator().manual_seed(0))
    assert 0.85 < float(bnn.prior_draws(model, x, 200, seed=0).std()) < 1.1


def test_a_fresh_process_predicts_the_same(tmp_path: Path) -> None:
    made = (
        "import sys, torch, pvi\n"
        "from torch import nn\n"
        "from pvi.models import bnn\n"
        "net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))\n"
        "x = torch.linspace(-1.0, 1.0, 12).reshape(6, 2)\n"
        "model = pvi.local_reparam(bnn.bayesianize(net))\n"
    )
    names: dict[str, Any] = {}
    exec(made, names)
    x, guide = names["x"], pvi.guides.MeanField(init_loc_fn="module", init_scale=1e-2)
    fit = pvi.fit(names["model"], guide, (x, x[:, 0]), steps=5, seed=0)
    fit.save(tmp_path / "fit")
    code = made + (
        "fit = pvi.load(sys.argv[1] + '/fit', model, pvi.guides.MeanField(), (x, x[:, 0]))\n"
        "torch.save(fit.posterior.predict(x, num_draws=7, seed=1)['y'], sys.argv[1] + '/y.pt')\n"
    )
    threads = (
        f"import torch\ntorch.set_num_threads({torch.get_num_threads()})\n"
        f"torch.set_default_dtype({torch.get_default_dtype()})\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", threads + code, str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    there = torch.load(tmp_path / "y.pt")
    assert torch.equal(there, fit.posterior.predict(x, num_draws=7, seed=1)["y"])
