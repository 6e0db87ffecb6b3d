"""Numbers that are not finite: named, undone, tried again with a shorter step, and never kept."""

import sys
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pvi
from pvi.errors import FitError
from tests.scenarios import mean_model, randn

pytestmark = pytest.mark.usefixtures("isolated")
N, BAD = 40, 17


def values(fit: pvi.Fit) -> dict[str, Tensor]:
    with fit.posterior.params.scope():
        return {k: x.detach().clone() for k, x in fit.posterior.params.tensors().items()}


def finite(fit: pvi.Fit) -> bool:
    return all(bool(x.isfinite().all()) for x in values(fit).values())


class Breaking:
    """A regression whose row `BAD` has a bad density at some steps of the training.

    Args:
        at: whether a step, from 1, is bad.
    """

    def __init__(self, at: Callable[[int], bool]):
        self.at, self.step = at, 1

    def __call__(self, x: Tensor, row: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        w = w.unsqueeze(-1) if w.dim() else w
        with pyro.plate("data", len(x)):
            loc = w * x
            if self.at(self.step) and torch.is_grad_enabled():
                loc = loc + torch.where(row == BAD, torch.nan, 0.0)
            pyro.sample("y", dist.Normal(loc, 1.0), obs=x)

    def count(self, step: Any) -> None:
        self.step = step.step + 1


def run(model: Any, **options: Any) -> pvi.Fit:
    data = (randn(N).double(), torch.arange(N))
    counted = [model.count] if isinstance(model, Breaking) else []
    return pvi.fit(model, data=data, seed=0, progress=False, callbacks=counted, **options)


class TestNames:
    """The site and the row where it began."""

    def test_row_of_a_minibatch(self) -> None:
        """By its number in the whole data, though batches are shuffled."""
        with pytest.raises(FitError, match=rf"step \d+: site 'y' .*NaN at row {BAD} of the data;"):
            run(Breaking(lambda step: step > 20), batch_size=8, steps=400)

    def test_row_of_all_data(self) -> None:
        with pytest.raises(FitError, match=rf"site 'y' .*row {BAD} of the data.*Look at row {BAD}"):
            run(Breaking(lambda step: step > 20), steps=100)

    def test_row_of_a_loader(self) -> None:
        """Which does not tell the numbers of its rows."""
        data = TensorDataset(randn(N).double(), torch.arange(N))
        loader = DataLoader(data, batch_size=8)
        model = Breaking(lambda step: step > 10)
        with pytest.raises(FitError, match=rf"site 'y' .*row {BAD % 8} of its batch"):
            pvi.fit(
                model, data=loader, seed=0, steps=200, callbacks=[model.count], objective=pvi.ELBO()
            )

    def test_gradient(self) -> None:
        """The density is finite, but the derivative of a root at 0 is not."""

        def model(x: Tensor) -> None:
            scale = pyro.param("scale", torch.tensor(1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            w = w.unsqueeze(-1) if w.dim() else w
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(w + (scale * x).sqrt(), 1.0), obs=x)

        x = 1.0 + torch.arange(9.0)
        x[3] = 0.0
        message = r"gradient of parameter 'param:scale' .*from site 'y' at row 3 of the data"
        with pytest.raises(FitError, match=message):
            pvi.fit(model, data=x, steps=50, seed=0)

    def test_what_torch_refuses(self) -> None:
        """A parameter that a distribution refuses, in the words of the site, not of torch."""
        with pytest.raises(FitError, match=rf"site 'y' .*NaN at row {BAD} of the data") as caught:
            run(Breaking(lambda step: step > 5), steps=50)
        assert "Expected parameter loc" in str(caught.value.__cause__)

    def test_decomposition(self) -> None:
        """An error that no rerun avoids says after which site it came."""

        def model(x: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            if torch.is_grad_enabled():
                torch.linalg.cholesky(-torch.eye(2) * w.abs().sum())
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(0.0 * w.sum(), 1.0), obs=x)

        with pytest.raises(FitError, match=r"the model fails after its site 'w' \(linalg.cholesky"):
            pvi.fit(model, data=randn(5), steps=50, seed=0, objective=pvi.ELBO())

    def test_errors_of_the_program_are_its_own(self) -> None:
        def model(x: Tensor) -> None:
            mean_model(x)
            if torch.is_grad_enabled():
                raise ValueError("of the user")

        with pytest.raises(ValueError, match="of the user") as caught:
            pvi.fit(model, data=randn(5), steps=50, seed=0)
        assert not isinstance(caught.value, FitError)


class TestRecovery:
    def test_one_bad_step(self) -> None:
        """It changes nothing, and the fit goes on to the posterior."""
        kept: dict[int, list[Tensor]] = {}

        def keep(step: Any) -> None:
            kept[step.step] = [p.detach().clone() for p in step.params.named().values()]

        model = Breaking(lambda step: step == 30)
        data = (randn(N).double(), torch.arange(N))
        options = {"data": data, "seed": 0, "steps": 600}
        fit = pvi.fit(model, **options, callbacks=[model.count, keep])
        assert all(map(torch.equal, kept[29], kept[30]))
        assert not all(map(torch.equal, kept[30], kept[31]))
        assert fit.notes[0].startswith(
            f"step 30: site 'y' has a log density that is NaN at row {BAD}"
        )
        assert torch.isnan(torch.tensor(fit.history["loss"][29])) and finite(fit)
        x = data[0]
        exact = x.square().sum() / (1.0 + x.square().sum())
        loc, scale = fit.guide.mean()["w"], (1.0 + x.square().sum()).rsqrt()  # type: ignore[attr-defined]
        assert abs(float(loc - exact)) < 0.2 * float(scale)

    @pytest.mark.parametrize("lr", [200.0, 400.0])
    def test_rate_too_high(self, lr: float) -> None:
        """Overflow in the first steps; the rate is lowered and the fit ends at the posterior."""
        y = torch.poisson(torch.full((50,), 3.0), generator=torch.Generator().manual_seed(0))

        def model(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Poisson(mu.exp()), obs=y)

        fit = pvi.fit(model, data=y, steps=700, seed=0, lr=lr, progress=False)
        assert any("lowered the learning rate" in note for note in fit.notes)
        assert fit.history["lr"][-100:].max() < 0.11 * lr
        assert finite(fit)
        rate = float(fit.posterior.sample(4000, seed=0)["mu"].exp().mean())
        assert rate == pytest.approx(float(y.mean()), abs=4 * (float(y.mean()) / 50) ** 0.5)

    def test_own_optimizer_and_scheduler(self) -> None:
        """Their rates are lowered too, and stay lowered."""
        model = Breaking(lambda step: 30 <= step < 33)
        decay = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0)  # noqa: E731
        adam = lambda p: torch.optim.Adam(p, lr=0.05)  # noqa: E731
        fit = run(model, steps=60, optimizer=adam, scheduler=decay)
        assert fit.history["lr"][[0, 31]].tolist() == [0.05, 0.05]
        assert fit.history["lr"][[35, 59]] == pytest.approx(0.005)

    def test_optimizer_state_comes_back(self) -> None:
        """Three bad steps: parameters and moments are those of the last kept step."""
        states: dict[int, list[Tensor]] = {}
        made: list[torch.optim.Optimizer] = []

        def adam(leaves: list[Tensor]) -> torch.optim.Optimizer:
            made.append(torch.optim.Adam(leaves, lr=0.05))
            return made[0]

        def keep(step: Any) -> None:
            moments = [x for s in made[0].state.values() for x in s.values()]
            states[step.step] = [
                x.detach().clone() for x in [*step.params.named().values(), *moments]
            ]

        model = Breaking(lambda step: 80 <= step < 83)
        data = (randn(N).double(), torch.arange(N))
        pvi.fit(model, data=data, seed=0, steps=90, optimizer=adam, callbacks=[model.count, keep])
        assert all(map(torch.equal, states[82], states[50]))
        assert not all(map(torch.equal, states[81], states[50]))

    @pytest.mark.programs
    def test_buffers_are_not_poisoned(self) -> None:
        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
                self.calls = 0

            def forward(self, x: Tensor, row: Tensor) -> None:
                pyro.module("network", self)
                self.calls += torch.is_grad_enabled()
                mean = self.net((x * torch.nan if self.calls in (7, 8) else x).reshape(-1, 1))
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                    pyro.sample("x", dist.Normal(z + mean.flatten(), 0.5), obs=x)

        model = Network().double()
        fit = run(model, steps=40, objective=pvi.ELBO())
        assert finite(fit) and len(fit.notes) == 1
        assert bool(model.net[1].running_mean.isfinite().all())

    def test_lowered_twice_then_stopped(self) -> None:
        """With the fit so far: the parameters of the last finite state."""
        with pytest.raises(FitError, match="lowered 2 times before") as caught:
            run(Breaking(lambda step: step % 60 > 55), steps=1000)
        fit = caught.value.fit  # type: ignore[attr-defined]
        assert finite(fit) and not fit.converged
        assert sum("lowered" in note for note in fit.notes) == 2
        assert len(fit.history) == 60 + 60 + 58

    def test_last_update(self) -> None:
        """No later step would show that the last one was too long."""
        huge = lambda p: torch.optim.SGD(p, lr=1e308)  # noqa: E731
        fit = run(mean_rows, steps=1, optimizer=huge)
        assert finite(fit)

    @pytest.mark.programs
    def test_score_baselines_are_not_poisoned(self) -> None:
        calls = []

        def model(x: Tensor, row: Tensor) -> None:
            coin = pyro.sample("coin", dist.Bernoulli(0.5))
            calls.append(torch.is_grad_enabled())
            with pyro.plate("data", len(x)):
                loc = coin * (torch.nan if sum(calls) == 9 and calls[-1] else 1.0)
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

        def guide(x: Tensor, row: Tensor) -> None:
            pyro.sample("coin", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(()))))

        options = {"guide": guide, "steps": 30, "objective": pvi.ELBO()}
        with pyro.validation_enabled(False):
            fit = run(model, **options)
        assert finite(fit) and len(fit.notes) == 1
        assert int(torch.isnan(torch.tensor(fit.history["loss"])).sum()) == 1


def mean_rows(x: Tensor, row: Tensor) -> None:
    mean_model(x)


class TestAccelerator:
    """Without a look at each step: the same code as on a GPU, here on the CPU."""

    @pytest.fixture(autouse=True)
    def rarely(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules["pvi.fit.training"], "looks", lambda leaf: 16)

    @pytest.mark.programs
    def test_numbers_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sixteen steps are read from the device at once."""
        sizes: list[int] = []
        module = sys.modules["pvi.fit.training"]
        read = module.read
        monkeypatch.setattr(module, "read", lambda rows: sizes.append(len(rows)) or read(rows))
        fit = run(mean_rows, steps=40)
        assert sizes == [1, 16, 16]
        assert len(fit.history["bound"]) == 40

    def test_same_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rare = run(mean_rows, steps=40)
        monkeypatch.setattr(sys.modules["pvi.fit.training"], "looks", lambda leaf: 1)
        each = run(mean_rows, steps=40)
        assert all(torch.equal(x, values(each)[name]) for name, x in values(rare).items())
        assert rare.history["bound"].tolist() == each.history["bound"].tolist()

    def test_recovers(self) -> None:
        """An update made with NaN is undone, and the next steps are looked at one by one."""
        fit = run(Breaking(lambda step: step == 30), steps=300)
        assert finite(fit)
        assert "went back to step 0" in fit.notes[0] and "NaN" in fit.notes[0]
        assert fit.history["bound"][-50:].mean() > fit.history["bound"][:20].mean()

    def test_stops(self) -> None:
        with pytest.raises(FitError, match=rf"site 'y' .*row {BAD} of the data") as caught:
            run(Breaking(lambda step: step > 30), steps=300)
        assert finite(caught.value.fit)  # type: ignore[attr-defined]
