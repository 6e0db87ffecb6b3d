"""What a fit records of its course: arrays, errors, export and pictures."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi.errors import PviError
from pvi.fit import History
from pvi.fit.history import Row
from pvi.fit.plot import plot_fit
from tests.scenarios import mean_model, randn

pytestmark = pytest.mark.usefixtures("isolated")
RNG = np.random.default_rng(0)


def model(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b.c", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal((a + b).unsqueeze(-1) if a.dim() else a + b, 1.0), obs=x)


@pytest.fixture(scope="module")
def fit() -> pvi.Fit:
    from tests.scenarios import isolated

    with isolated():
        options: dict[str, Any] = {"validation_data": randn(9, seed=1).double(), "seed": 0}
        return pvi.fit(model, data=randn(20).double(), steps=120, validate_every=20, **options)


def of(bound: np.ndarray) -> History:
    history = History()
    for value in bound:
        history.add({"bound": value, "loss": -value})
    return history


class TestColumns:
    def test_all(self, fit: pvi.Fit) -> None:
        columns = {"bound", "loss", "lr", "grad_norm", "seconds", "log_likelihood", "bound_se"}
        assert columns | {"kl/a", "kl/b.c", "validation_bound"} == set(fit.history.keys())
        assert all(fit.history[name].shape == (120,) for name in fit.history)
        parts = fit.history["log_likelihood"] - fit.history["kl/a"] - fit.history["kl/b.c"]
        assert fit.history["bound"] == pytest.approx(parts)
        assert 0 < fit.history["seconds"].min() < fit.history["seconds"].max() < 10
        assert list(np.flatnonzero(~np.isnan(fit.history["validation_bound"]))) == [
            *range(19, 120, 20)
        ]

    def test_unknown(self, fit: pvi.Fit) -> None:
        with pytest.raises(KeyError, match="'elbo' was not recorded; there are bound, loss"):
            fit.history["elbo"]

    def test_rows_that_wait(self) -> None:
        """They are read when someone asks, and keep their order among others."""
        history = History()
        history.add({"bound": 1.0, "loss": 1.0})
        for value in (2.0, 3.0):
            history.append(Row(("bound", "loss"), torch.tensor([value, value]), {"lr": 0.5}))
        assert len(history) == 3
        history.amend({"validation_bound": 7.0})
        assert history["bound"].tolist() == [1.0, 2.0, 3.0]
        assert history["lr"].tolist()[1:] == [0.5, 0.5]
        assert history.value("validation_bound", 2) == 7.0 and np.isnan(history.value("no", 0))


class TestErrors:
    def test_covers_the_mean(self) -> None:
        """Of white noise on a rising bound: the z values have mean square 1."""
        trend = 50.0 * (1.0 - np.exp(-np.arange(400) / 100.0))
        z = []
        for _ in range(200):
            mean, se = of(trend + RNG.normal(0.0, 3.0, 400)).smoothed(window=40)
            center = trend[180:220].mean()
            z.append((mean[200] - center) / se[200])
        square = float(np.mean(np.square(z)))
        assert square == pytest.approx(1.0, abs=4 * (2.0 / 200) ** 0.5)

    def test_gaps_and_ends(self) -> None:
        bound = np.array([1.0, np.nan, 3.0, 4.0, np.inf])
        mean, se = of(bound).smoothed(window=5)
        assert mean[2] == pytest.approx(8.0 / 3.0)
        assert se[2] == pytest.approx(np.sqrt(0.5 * 1.0 / 3.0))
        assert np.isnan(of(np.array([1.0]))["bound_se"][0])
        assert of(np.array([]))["bound_se"].shape == (0,)

    def test_of_a_fit(self, fit: pvi.Fit) -> None:
        assert repr(fit).startswith("Fit(120 steps") and " ± " in repr(fit)


class TestExport:
    def test_datatree(self, fit: pvi.Fit, tmp_path: Any) -> None:
        tree = fit.to_datatree(10, seed=0)
        group = tree["fit_history"]
        assert group["bound"].dims == ("step",) and group["kl"].dims == ("step", "site")
        assert group["step"].values[0] == 1
        assert (group["kl"].sel(site="b.c").values == fit.history["kl/b.c"]).all()
        attrs = tree["posterior"].attrs
        assert (attrs["converged"], attrs["steps"]) == (int(fit.converged), 120)
        assert attrs["reason"] == fit.reason
        assert attrs["bound"] == pytest.approx(fit.history["bound"][-120:].mean(), rel=0.1)
        tree.to_netcdf(tmp_path / "fit.nc", engine="h5netcdf")
        import xarray

        with xarray.open_datatree(tmp_path / "fit.nc", engine="h5netcdf") as back:
            assert (back["fit_history"]["lr"].values == fit.history["lr"]).all()

    def test_arviz(self, fit: pvi.Fit) -> None:
        from pvi.posterior.arviz import load

        data, arviz = fit.to_arviz(20, seed=0), load()
        assert len(data["fit_history"]["bound"]) == 120
        assert float(arviz.summary(data, var_names=["a"], kind="stats")["mean"].iloc[0]) != 0.0

    def test_not_of_a_posterior_alone(self, fit: pvi.Fit) -> None:
        assert "fit_history" not in fit.posterior.to_datatree(5, seed=0).children

    def test_saved(self, fit: pvi.Fit, tmp_path: Any) -> None:
        fit.save(tmp_path / "run")
        back = pvi.load(tmp_path / "run", model, data=randn(20).double())
        assert back.notes == fit.notes
        assert set(back.history.keys()) == set(fit.history.keys())


class TestPlot:
    def test_panels(self, fit: pvi.Fit) -> None:
        figure = fit.plot()
        labels = [axes.get_ylabel() for axes in figure.axes]
        expected = ["bound (nats)", "KL (nats)", "learning\nrate", "gradient\nnorm"]
        assert labels == [*expected, "validation bound (nats)"]
        top, kl, rate, norm, validation = figure.axes
        assert top.lines[0].get_ydata().tolist() == fit.history["bound"].tolist()
        assert {line.get_label() for line in kl.lines} == {"a", "b.c"}
        assert np.asarray(rate.lines[0].get_ydata()) == pytest.approx(fit.history["lr"])
        assert len(validation.lines[0].get_ydata()) == 6
        assert norm.get_yscale() == "log"

    def test_many_sites_and_gaps(self) -> None:
        history = History()
        for i in range(60):
            kl = {f"kl/site{k}": float(k) for k in range(20)}
            bad = np.nan if i == 30 else 1.0
            history.add({"bound": bad, "loss": bad, "lr": 0.1, "grad_norm": bad, **kl})
        figure = plot_fit(history)
        labels = [line.get_label() for line in figure.axes[1].lines]
        assert labels == [*(f"site{k}" for k in range(19, 12, -1)), "13 others"]
        assert figure.axes[1].lines[-1].get_ydata()[5] == pytest.approx(sum(range(13)))

    def test_nothing_to_draw(self) -> None:
        with pytest.raises(PviError, match="finite bounds"):
            plot_fit(History())


def test_minibatches_count_the_whole_data() -> None:
    """The bound of a batch is scaled: its mean is that of all rows."""
    x = randn(24).double()
    options: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "seed": 0}
    some = pvi.fit(mean_model, data=x, batch_size=4, steps=600, **options).history
    whole = pvi.fit(mean_model, data=x, steps=600, **options).history
    mean, se = some.smoothed(window=1200)
    other, error = whole.smoothed(window=1200)
    assert abs(mean[300] - other[300]) < 4 * np.hypot(se[300], error[300])
