"""What `data=` may be, and which rows a step sees."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import pvi
from pvi.engine.data import as_data
from pvi.errors import GuideError
from tests.scenarios import (
    EXACT,
    local_model,
    mean_model,
    randn,
)

pytestmark = pytest.mark.usefixtures("isolated")


class TestInputs:
    """Tensors, datasets and loaders give the same fit of a conjugate model."""

    x, y = randn(40), randn(40, seed=1)

    @staticmethod
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    def bounds(self, data: Any, **options: Any) -> Any:
        return pvi.fit(self.model, data=data, steps=20, seed=0, **options).history["bound"]

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.x.double(), self.y.double()

    def test_all_forms_agree(self) -> None:
        x, y = self.rows()
        expected = self.bounds((x, y), batch_size=8)
        for data in ([x, y], {"x": x, "y": y}, TensorDataset(x, y), (x.numpy(), y.numpy())):
            assert self.bounds(data, batch_size=8) == pytest.approx(expected, abs=EXACT)
        rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
        assert self.bounds(_Items(rows), batch_size=8) == pytest.approx(expected, abs=EXACT)

    def test_loader(self) -> None:
        """A DataLoader's batches count N / B times."""
        data = TensorDataset(*self.rows())
        bounds = self.bounds(DataLoader(data, batch_size=8, shuffle=True))
        assert len(bounds) == 20
        whole = self.bounds(self.rows())
        assert 0.7 < bounds[-5:].mean() / whole[-5:].mean() < 1.4  # 1/5 without the scale

    def test_loader_with_a_batch_sampler(self) -> None:
        """Its batch_size is None, but its batches are no whole data sets either."""
        data = TensorDataset(*self.rows())
        sampler = BatchSampler(SequentialSampler(data), 8, drop_last=True)
        bounds = self.bounds(DataLoader(data, batch_sampler=sampler))
        expected = self.bounds(DataLoader(data, batch_size=8, drop_last=True))
        assert bounds == pytest.approx(expected, abs=EXACT)

    def test_batch_sampler_that_does_not_say_its_size(self) -> None:
        """Where rows are compared without it, batches are of the mean size, not of one row."""
        batches: Any = [range(30), range(30, 36), range(36, 40)]
        loader = DataLoader(TensorDataset(*self.rows()), batch_sampler=batches)
        assert as_data(loader, (), None, self.model).batch_size(None) == 13

    def test_short_last_batch_of_a_loader(self) -> None:
        """Over an epoch every row counts once, also those of a shorter last batch."""
        x, y = self.rows()
        loc = 0.3

        def point(x: Tensor, y: Tensor) -> None:
            pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(loc)), 1e-30))

        options = {"guide": point, "optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "seed": 0}
        loader = DataLoader(TensorDataset(x, y), batch_size=12)  # 12, 12, 12, 4
        epoch = pvi.fit(self.model, data=loader, epochs=1, **options).history["bound"]
        whole = pvi.fit(self.model, data=(x, y), steps=1, **options).history["bound"]
        assert len(epoch) == 4
        assert epoch.mean() == pytest.approx(whole[0], abs=1e-8)

    def test_loader_and_rows_of_the_guide(self) -> None:
        """A loader does not say which rows it gives: guides with rows are refused by name."""
        data = TensorDataset(self.rows()[0])
        with pytest.raises(GuideError, match=r"MeanField.*plate 'data'.*DataLoader"):
            pvi.fit(local_model, data=DataLoader(data, batch_size=8), steps=2, seed=0)

    def test_shuffling_loader_of_one_batch(self) -> None:
        """Also where its only batch is the whole: shuffled rows would meet other rows' latents."""
        x = torch.arange(8.0)
        loader = DataLoader(TensorDataset(x), batch_size=8, shuffle=True)
        try:
            fit = pvi.fit(local_model, data=loader, steps=400, seed=0)
        except GuideError:
            return
        draws = fit.posterior.sample(2000, seed=1)["z"].mean(0)
        assert float((draws - x / 2).abs().max()) < 0.5

    @pytest.mark.parametrize("batch_size", [40, 41, 1000])
    def test_whole_batches_are_never_shuffled(self, batch_size: int) -> None:
        """Pyro skips the indexing where a subsample is the whole: shuffling would mix up rows."""
        x, seen = torch.arange(40.0), []

        def model(x: Tensor) -> None:
            seen.append(x.clone())
            local_model(x)

        pvi.fit(model, data=x, batch_size=batch_size, steps=5, seed=0)
        assert len(seen) > 5
        assert all(torch.equal(s, x) for s in seen)

    def test_batches_are_shuffled_anew(self) -> None:
        seen: list[list[float]] = []

        def model(x: Tensor) -> None:
            seen.append(x.tolist())
            mean_model(x)

        pvi.fit(model, data=torch.arange(40.0), batch_size=10, epochs=3, seed=0)
        epochs = [seen[-12:][i : i + 4] for i in (0, 4, 8)]
        for epoch in epochs:
            assert sorted(value for batch in epoch for value in batch) == list(range(40))
        assert epochs[0] != epochs[1] != epochs[2]


class _Items(torch.utils.data.Dataset):
    """A map-style data set of dicts."""

    def __init__(self, rows: list[dict[str, Tensor]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]
