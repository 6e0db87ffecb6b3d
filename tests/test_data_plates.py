"""Which plates are the data, and models that no sum over batches can stand for."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
)
from torch import Tensor, nn

import pvi
from pvi.engine.data import as_data
from pvi.errors import GuideError, ModelError, ObjectiveError
from pvi.fit.minibatch import data_plates
from tests.scenarios import (
    EXACT,
    local_model,
    mean_model,
    randn,
)

pytestmark = pytest.mark.usefixtures("isolated")


class TestDetection:
    """What cannot be summed over batches is refused, by the name of the site or the plate."""

    @staticmethod
    def mean() -> Tensor:
        return pyro.sample("m", dist.Normal(0.0, 1.0))

    def pairs(self, x: Tensor) -> None:
        m, n = self.mean(), len(x)
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)
        with pyro.plate("pairs", n * (n - 1) // 2):
            pyro.sample("d", dist.Exponential(m.exp()), obs=torch.pdist(x.unsqueeze(1)))

    def windows(self, x: Tensor) -> None:
        with pyro.plate("windows", len(x) - 1):
            pyro.sample("x", dist.Normal(self.mean() * x[:-1], 1.0), obs=x[1:])

    def matrix(self, x: Tensor) -> None:
        m, n = self.mean(), len(x)
        with pyro.plate("a", n, dim=-2), pyro.plate("b", n, dim=-1):
            pyro.sample("d", dist.Normal(m, 1.0), obs=x.unsqueeze(1) - x)

    def event(self, x: Tensor) -> None:
        loc = self.mean().expand(len(x))
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def naked(self, x: Tensor) -> None:
        pyro.sample("x", dist.Normal(self.mean().expand(len(x)), 1.0), obs=x)

    def sequence(self, x: Tensor) -> None:
        m = self.mean()
        for t in range(len(x)):
            pyro.sample(f"x{t}", dist.Normal(m, 1.0), obs=x[t])

    def statistic(self, x: Tensor) -> None:
        pyro.sample("s", dist.Normal(self.mean(), len(x) ** -0.5), obs=x.mean())

    def autoregression(self, x: Tensor) -> None:
        m = self.mean()
        with pyro.plate("data", len(x)):
            before = torch.cat([torch.zeros(1), x[:-1]])
            pyro.sample("x", dist.Normal(m * before, 1.0), obs=x)

    def centred(self, x: Tensor) -> None:
        m = self.mean()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m + x.mean(), 1.0), obs=x)

    def scaled_likelihood(self, x: Tensor) -> None:
        m = self.mean()
        with poutine.scale(scale=1 / len(x)), pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def scaled_prior(self, x: Tensor) -> None:
        with poutine.scale(scale=1 / len(x)):
            m = self.mean()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def narrow_prior(self, x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1 / len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def batch_norm(self, x: Tensor) -> None:
        m, norm = self.mean(), nn.BatchNorm1d(1, affine=False)
        with pyro.plate("data", len(x)):
            loc = norm(x.unsqueeze(1)).squeeze(1)
            pyro.sample("y", dist.Normal(m + loc, 1.0), obs=x)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("pairs", "plate 'pairs' changes with the batch"),
            ("windows", "plate 'windows' changes with the batch"),
            ("matrix", r"site 'd' is inside two plates of the batch's length, \['a', 'b'\]"),
            ("event", "site 'x' changes shape with the batch but is in no plate"),
            ("naked", "site 'x' has batch shape .* belongs to no plate"),
            ("sequence", r"sites depend on the batch's length.*'x"),
            ("statistic", "no plate follows the batch"),
            ("autoregression", "site 'x' is not a sum over rows"),
            ("centred", "site 'x' is not a sum over rows"),
            ("scaled_likelihood", "site 'x' is not a sum over rows"),
            ("scaled_prior", "site 'm' is not a sum over rows"),
            ("narrow_prior", "site 'm' is not a sum over rows"),
            ("batch_norm", "site 'y' is not a sum over rows"),
        ],
    )
    @pytest.mark.parametrize("batch_size", [8, 2])
    def test_refused(self, name: str, message: str, batch_size: int) -> None:
        model, x = getattr(self, name), randn(30)
        with pytest.raises(ModelError, match=message):
            pvi.fit(model, data=x, batch_size=batch_size, steps=2, seed=0)

    def test_full_data_are_fine(self) -> None:
        """The same models are right on all the data."""
        for name in ("pairs", "event", "sequence", "centred", "batch_norm"):
            assert len(pvi.fit(getattr(self, name), data=randn(6), steps=2, seed=0).history) == 2

    def test_feature_plate_of_the_batch_size(self) -> None:
        """A plate with as many elements as a batch has rows is no data plate."""

        def model(x: Tensor) -> None:
            with pyro.plate("features", 8):
                m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), dim=-2), pyro.plate("features2", 8, dim=-1):
                pyro.sample("x", dist.Normal(m, 1.0), obs=x)

        data = as_data(randn(30, 8), (), None, model)
        assert data_plates(model, data, 8) == {"data"}
        fitted = pvi.fit(model, data=randn(30, 8), batch_size=8, steps=2, seed=0)
        assert fitted.guide.plate_sizes == {"features": 8}

    def test_constants_are_no_rows(self) -> None:
        """What comes through args= is not cut into batches."""
        seen = []

        def model(x: Tensor, table: Tensor) -> None:
            m = self.mean()
            seen.append((len(x), len(table)))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(m + table.sum(), 1.0), obs=x)

        pvi.fit(model, data=randn(30), args=(torch.zeros(30),), batch_size=8, steps=2, seed=0)
        assert seen[-1] == (8, 30)

    def test_plate_wins(self) -> None:
        """`plate=` is an order: what it names is the data, and nothing is checked."""
        fitted = pvi.fit(self.centred, data=randn(30), batch_size=8, plate="data", steps=2, seed=0)
        assert len(fitted.history) == 2
        fitted = pvi.fit(self.pairs, data=randn(30), batch_size=8, plate=["data"], steps=2, seed=0)
        assert len(fitted.history) == 2

    def test_plate_counts(self) -> None:
        """With plate= the rows count N / B times, as without."""
        bounds = [
            pvi.fit(mean_model, data=randn(32), batch_size=8, plate=p, steps=3, seed=0).history[
                "bound"
            ]
            for p in (None, "data")
        ]
        assert bounds[0] == pytest.approx(bounds[1], abs=EXACT)

    def test_plate_that_does_not_exist(self) -> None:
        """A typing error must not quietly give batches the weight of the whole."""
        with pytest.raises(ModelError, match="'dta'"):
            pvi.fit(mean_model, data=randn(30), batch_size=8, plate="dta", steps=2, seed=0)

    def test_plate_that_is_not_the_batch(self) -> None:
        def model(x: Tensor) -> None:
            with pyro.plate("features", 3, dim=-1):
                m = pyro.sample("m", dist.Normal(0.0, 1.0))
                with pyro.plate("data", len(x), dim=-2):
                    pyro.sample("x", dist.Normal(m, 1.0), obs=x)

        with pytest.raises(ModelError, match="'features'"):
            pvi.fit(model, data=randn(30, 3), batch_size=8, plate="features", steps=2, seed=0)

    def test_joint_guide_of_local_latents(self) -> None:
        with pytest.raises(GuideError, match=r"AutoDiagonalNormal.*plate 'data'.*Structured"):
            guide = AutoDiagonalNormal(local_model)
            pvi.fit(local_model, guide, data=randn(30), batch_size=8, steps=2, seed=0)

    def test_joint_guide_of_global_latents(self) -> None:
        guide = AutoDiagonalNormal(mean_model)
        fitted = pvi.fit(mean_model, guide, data=randn(30), batch_size=8, steps=2, seed=0)
        assert len(fitted.history) == 2

    def test_importance_weights_of_globals(self) -> None:
        with pytest.raises(ObjectiveError, match=r"plate 'data' is subsampled \(8 of 30\)"):
            pvi.fit(
                mean_model, data=randn(30), objective=pvi.IWAE(3), batch_size=8, steps=2, seed=0
            )

    def test_importance_weights_of_locals(self) -> None:
        options = {"objective": pvi.IWAE(3), "batch_size": 8, "steps": 2, "seed": 0}
        assert len(pvi.fit(local_model, data=randn(30), **options).history) == 2
