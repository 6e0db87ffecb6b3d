"""Encoders and minibatches: which guides read rows, of which data, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvi
from pvi.errors import GuideError
from pvi.guides import (
    Amortized,
    Delta,
    Flow,
    FullRank,
    Group,
    Guide,
    LowRank,
    MatrixNormal,
    MeanField,
    Mixture,
    Structured,
)
from tests.scenarios import Program, isolated, nested_model, randn

LOADING = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, -0.6]])


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with isolated():
        yield


def factors(x: Tensor) -> None:
    """z_i ~ N(0, I_2), x_i ~ N(W z_i, I_3)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADING.to(z).T, 1.0).to_event(1), obs=x)


def topics(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=x)


class Parts(nn.Module):
    """A network's raw numbers through a function to an encoder's output."""

    def __init__(self, width: int, then: Any = lambda raw: raw):
        super().__init__()
        self.layer, self.then = nn.Linear(3, width), then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.layer(x))


def pair(raw: Tensor) -> tuple[Tensor, Tensor]:
    loc, scale = raw.chunk(2, -1)
    return loc, scale.exp()


def cholesky(raw: Tensor) -> tuple[Tensor, Tensor]:
    tril = torch.zeros(*raw.shape[:-1], 2, 2) + torch.eye(2)
    return raw, tril


FAMILIES: dict[str, tuple[Program, str, nn.Module]] = {
    "normal": (factors, "normal", Parts(4)),
    "normal, tuple": (factors, "normal", Parts(4, pair)),
    "full": (factors, "full", Parts(5)),
    "full, tuple": (factors, "full", Parts(2, cholesky)),
    "flow": (factors, "flow", Parts(7)),
    "normal on the simplex": (topics, "normal", Parts(4)),
    "logistic_normal": (topics, "logistic_normal", Parts(4)),
    "logistic_normal, tuple": (topics, "logistic_normal", Parts(4, pair)),
    "dirichlet": (topics, "dirichlet", Parts(3)),
}


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    def guide(self, name: str) -> tuple[Program, Amortized]:
        model, family, encoder = FAMILIES[name]
        options: Any = {"transforms": 1, "hidden_features": (8,)} if family == "flow" else {}
        return model, Amortized(encoder.double(), model, family=family, **options)

    def test_rows_follow_the_data(self, name: str) -> None:
        """Fits, batches, predicts other rows; a row's distribution depends on that row alone."""
        x = randn(6, 3)
        model, guide = self.guide(name)
        fit = pvi.fit(model, guide, x, steps=4, batch_size=2, seed=0)
        assert all(p.grad is not None for p in guide.parameters())
        assert fit.posterior.predict(randn(9, 3, seed=1), num_draws=2)["x"].shape == (2, 9, 3)
        draws = guide.sample(3, x)
        assert draws["z"].shape[:2] == (3, 6)
        alone = sum(guide.log_prob({"z": draws["z"][:, i : i + 1]}, x[i : i + 1]) for i in range(6))
        torch.testing.assert_close(guide.log_prob(draws, x), alone)
        assert guide.quantiles([0.1, 0.9], x)["z"].shape == (2, *draws["z"].shape[1:])

    def test_engine_agrees(self, name: str) -> None:
        x = randn(6, 3)
        model, guide = self.guide(name)
        posterior = pvi.fit(model, guide, x, steps=1, seed=0).posterior
        draws = posterior.draws(5, seed=0)
        torch.testing.assert_close(guide.log_prob(draws.values, x).detach(), draws.log_q)


def test_linear_factor_model() -> None:
    """The posterior is N(A W'x, A), A = (I + W'W)^-1: a linear encoder contains it."""
    x = randn(12, 3)
    a = (torch.eye(2) + LOADING.double().T @ LOADING.double()).inverse()

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.tril = nn.Linear(3, 2), nn.Parameter(torch.eye(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.tril.tril().expand(len(x), 2, 2)

    encoder = Linear()
    guide = Amortized(encoder, family="full")
    objective = pvi.ELBO(8, gradient="path")
    pvi.fit(factors, guide, x, objective=objective, steps=600, lr=0.05, seed=0)
    torch.testing.assert_close(encoder.layer.weight, a @ LOADING.double().T, atol=1e-3, rtol=0)
    tril = encoder.tril.tril().detach()
    torch.testing.assert_close(tril @ tril.T, a, atol=1e-3, rtol=0)


class TestSites:
    @staticmethod
    def model(x: Tensor, flag: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.LogNormal(flag.squeeze(), 1.0))
            pyro.sample("y", dist.Normal(a, b), obs=x[:, 0])

    def test_several_by_dict(self) -> None:
        encoder = Parts(4, lambda raw: {"a": raw[..., :2], "b": pair(raw[..., 2:])}).double()
        guide = Amortized(encoder, sites={"a": "full", "b": "normal"}, inputs=["x"])
        data = (randn(6, 3), torch.zeros(1))
        fit = pvi.fit(self.model, guide, data[0], args=data[1:], steps=3, seed=0)
        assert fit.posterior.sample(2)["b"].shape == (2, 6)

    @pytest.mark.parametrize(
        ("encoder", "options", "message"),
        [
            (Parts(3), {}, r"site 'z' rows of \[3\] numbers; it needs one tensor with 4"),
            (Parts(4), {"family": "full"}, r"site 'z' rows of \[4\].*one tensor with 5"),
            (Parts(4, lambda r: r.mean(0)), {}, "site 'z'"),
            (Parts(4, lambda r: r[:3]), {}, "site 'z' 3 rows, but plate 'data' has 6"),
            (Parts(4, lambda r: r[0, 0]), {}, r"site 'z' a tensor of shape \(\)"),
            (Parts(4, lambda r: r * torch.inf), {}, "output for site 'z' is no valid parameter"),
            (
                Parts(4, lambda r: (r[:, :2] * 0, 1e-320 + 0 * r[:, :2])),
                {},
                "'z' gives.*not finite",
            ),
            (Parts(4, lambda r: {"y": r}), {}, r"nothing for site 'z'.*\['y'\]"),
            (Parts(4), {"sites": "q"}, "site 'z' is none of Amortized's sites"),
            (Parts(4), {"family": "logistic_normal"}, "needs a site on the simplex.*'z'"),
            (Parts(4), {"inputs": ["w"]}, "inputs names 'w'"),
        ],
    )
    def test_refused(self, encoder: Any, options: Any, message: str) -> None:
        with pytest.raises(GuideError, match=message):
            Amortized(encoder.double(), factors, **options).setup(randn(6, 3))

    def test_no_plate(self) -> None:
        with pytest.raises(GuideError, match="site 'theta' is in no plate"):
            Amortized(nn.Linear(1, 2), nested_model).setup(randn(4))

    def test_arguments(self) -> None:
        with pytest.raises(GuideError, match=r"must be an nn\.Module"):
            Amortized(lambda x: x)  # type: ignore[arg-type]
        with pytest.raises(GuideError, match="family must be one of"):
            Amortized(nn.Linear(1, 2), family="gamma")


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(-1))


BATCHED = {
    "MeanField": MeanField,
    "Structured": Structured,
    "Delta": Delta,
    "MatrixNormal": MatrixNormal,
    "Group": lambda: Group({"theta": FullRank, ...: Structured}),
    "Amortized": lambda: Group({"z": Amortized(Rows()), ...: FullRank}),
}
JOINT = {
    "FullRank": FullRank,
    "LowRank": LowRank,
    "Flow": lambda: Flow(transforms=1, hidden_features=(4,)),
    "Mixture": lambda: Mixture(2),
    "Group": lambda: Group({"z": FullRank}),
}


class TestMinibatches:
    @pytest.mark.parametrize("name", BATCHED)
    def test_gradients(self, name: str) -> None:
        """Over all batches of 2 of 6 rows the mean gradient is the full one, row by row."""
        from pvi.engine.data import as_data
        from pvi.fit.minibatch import Minibatches

        x = randn(6)
        torch.manual_seed(0)
        guide = BATCHED[name]().bind(nested_model).setup(x)
        parameters = dict(guide.named_parameters())
        data = as_data(x, (), {}, nested_model, None)
        batched = Minibatches(nested_model, guide, frozenset({"data"}), data)

        def gradient(rows: Tensor | None, particles: int) -> dict[str, Tensor]:
            batched.select(rows)
            args, _ = data.whole() if rows is None else data.rows(rows)
            objective = pvi.ELBO(particles, kl="exact")
            loss = objective.differentiable_loss(batched.model, batched.guide, *args)
            grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            return dict(zip(parameters, grads, strict=True))

        gradient(None, 1)
        whole, parts = [], []
        for _ in range(30):
            whole.append(gradient(None, 20))
            three = [gradient(torch.tensor(rows), 20) for rows in ([0, 3], [5, 1], [2, 4])]
            parts.append({k: sum(g[k] for g in three) / 3 for k in three[0]})
            for key, value in three[1].items():
                if len(value.shape) > 0 and value.shape[0] == 6 and "correlation" not in key:
                    hit = {int(i) for i in value.reshape(6, -1).any(1).nonzero()}
                    assert hit <= {1, 5}, key
                    assert hit or "on." in key or "within" in key, key
        for key in parameters:
            a, b = (torch.stack([g[key] for g in rows]) for rows in (whole, parts))
            se = ((a.var(0) + b.var(0)) / len(a)).sqrt()
            assert bool(((a.mean(0) - b.mean(0)).abs() < 5 * se + 1e-9).all()), key

    @pytest.mark.parametrize("name", JOINT)
    def test_joint_ones_are_refused(self, name: str) -> None:
        with pytest.raises(GuideError, match=r"one joint distribution.*plate 'data'"):
            pvi.fit(nested_model, JOINT[name](), randn(20), batch_size=4, steps=2)

    @pytest.mark.parametrize("name", [n for n in BATCHED if n != "Amortized"])
    def test_rows_do_not_extrapolate(self, name: str) -> None:
        posterior = pvi.fit(nested_model, BATCHED[name](), randn(8), steps=2, seed=0).posterior
        with pytest.raises(GuideError, match=r"site 'z' belongs to the 8 rows"):
            posterior.predict(randn(3))

    @pytest.mark.parametrize("name", BATCHED)
    def test_model_that_subsamples(self, name: str) -> None:
        def model(x: Tensor) -> None:
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), subsample_size=4) as rows:
                z = pyro.sample("z", dist.LogNormal(theta, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

        x = randn(10)
        guide: Guide = pvi.fit(model, BATCHED[name](), x, steps=5, seed=0).guide  # type: ignore[assignment]
        draws = guide.sample(3, x)
        assert draws["z"].shape == (3, 10)
        assert guide.log_prob(draws, x).shape == (3,)
        assert guide.mean(x)["z"].shape == (10,)

    @pytest.mark.parametrize("name", JOINT)
    def test_joint_ones_refuse_subsamples(self, name: str) -> None:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x), subsample_size=4) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

        guide = JOINT[name]().bind(model)
        with pytest.raises(GuideError, match=r"site 'z' in all 10 elements of plate 'data'"):
            guide.setup(randn(10))
