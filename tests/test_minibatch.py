"""Minibatches of an unchanged model: they sum to the whole, or an error says why not."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoNormal,
    init_to_value,
)
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pvi
from pvi.engine.data import Data, as_data
from pvi.errors import GuideError, ModelError
from pvi.fit.minibatch import Minibatches, check_additive, data_plates
from pvi.guides import MeanField
from tests.scenarios import (
    EXACT,
    FixedNoise,
    gradients,
    nested_model,
    param,
    positive,
    randn,
)

pytestmark = pytest.mark.usefixtures("isolated")

SIZE, BATCH = 12, 4
POINT = 1e-30  # a scale so small that loc + scale * noise is loc: nothing is random any more
OBJECTIVES = {
    "elbo": pvi.ELBO(),
    "exact": pvi.ELBO(kl="exact"),
    "elbo, 3 batched": pvi.ELBO(3, vectorize_particles=True),
    "elbo, 3 looped": pvi.ELBO(3, vectorize_particles=False),
    "iwae": pvi.IWAE(3),
}


# Guides of `nested_model` with a row of parameters for every datum, or computed from the datum.


def _start() -> dict[str, Tensor]:
    return {"theta": torch.tensor(0.4), "z": torch.linspace(-1.0, 1.3, SIZE)}


def _theta() -> None:
    pyro.sample("theta", dist.Normal(param("theta_loc", 0.4), POINT))


def _param_in_plate(x: Tensor) -> None:
    _theta()
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(param("loc", _start()["z"], event_dim=0), POINT))


def _param_by_index(x: Tensor) -> None:
    _theta()
    loc = param("loc", _start()["z"])
    with pyro.plate("data", len(x)) as rows:
        pyro.sample("z", dist.Normal(loc[rows], POINT))


class _Rows(PyroModule):
    """Parameters of the module: declared with `event_dim`, or indexed."""

    def __init__(self, indexed: bool):
        super().__init__()
        self.indexed = indexed
        self.loc = nn.Parameter(_start()["z"]) if indexed else PyroParam(_start()["z"], event_dim=0)

    def forward(self, x: Tensor) -> None:
        _theta()
        with pyro.plate("data", len(x)) as rows:
            loc = self.loc[rows] if self.indexed else self.loc
            pyro.sample("z", dist.Normal(loc, POINT))


def _amortised(x: Tensor) -> None:
    _theta()
    slope = param("slope", 0.3)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, POINT))


def _amortised_by_index(x: Tensor) -> None:
    _theta()
    slope = param("slope", 0.3)
    with pyro.plate("data", len(x)) as rows:
        pyro.sample("z", dist.Normal(slope * x[rows], POINT))


def _list() -> AutoGuideList:
    guide = AutoGuideList(nested_model)
    options = {"init_loc_fn": init_to_value(values=_start()), "init_scale": POINT}
    guide.append(AutoNormal(poutine.block(nested_model, hide=["z"]), **options))
    guide.append(AutoNormal(poutine.block(nested_model, hide=["theta"]), **options))
    return guide


ROW_GUIDES: dict[str, Callable[[], Callable[..., Any]]] = {
    "MeanField": lambda: MeanField(nested_model, init_to_value(values=_start()), init_scale=POINT),
    "AutoNormal": lambda: AutoNormal(
        nested_model, init_loc_fn=init_to_value(values=_start()), init_scale=POINT
    ),
    "AutoDelta": lambda: AutoDelta(nested_model, init_loc_fn=init_to_value(values=_start())),
    "AutoGuideList": _list,
    "param in plate": lambda: _param_in_plate,
    "param by index": lambda: _param_by_index,
    "module in plate": lambda: _Rows(indexed=False),
    "module by index": lambda: _Rows(indexed=True),
}
GUIDES = ROW_GUIDES | {
    "amortised": lambda: _amortised,
    "amortised by index": lambda: _amortised_by_index,
}


class Split:
    """A model and a guide on batches of the data, as `pvi.fit` prepares them."""

    def __init__(self, model: Any, guide: Any, x: Tensor, batch_size: int = BATCH):
        self.model, self.guide = model, guide
        self.data: Data = as_data(x, (), None, model)
        guide(x)
        plates = data_plates(model, self.data, batch_size)
        check_additive(model, self.data, batch_size, plates)
        self.batches = Minibatches(model, guide, plates, self.data)
        self.batches.probe(batch_size)

    def loss(self, objective: pvi.Objective, rows: Tensor | None = None) -> Tensor:
        """On some rows, or on all the data."""
        self.batches.select(rows)
        args, kwargs = self.data.whole() if rows is None else self.data.rows(rows)
        loss = objective.evaluate(self.batches.model, self.batches.guide, args, kwargs).loss
        self.batches.select(None)
        return loss


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guides of pvi know their noise however small the scale: draw them without any."""

    def zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    monkeypatch.setattr("pvi.guides.normals._standard_normal", zeros)


def is_loc(name: str) -> bool:
    return "scale" not in name


class TestPartition:
    """The mean over a partition of the data into batches is the full batch."""

    @pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
    @pytest.mark.parametrize("name", GUIDES)
    def test_without_noise(self, quiet: None, name: str, objective: pvi.Objective) -> None:
        split = Split(nested_model, GUIDES[name](), randn(SIZE))
        whole = split.loss(objective)
        parts = [split.loss(objective, rows) for rows in torch.randperm(SIZE).split(BATCH)]
        mean = torch.stack(parts).mean()
        assert float(mean.detach()) == pytest.approx(float(whole.detach()), abs=EXACT)
        got, want = gradients(mean), gradients(whole)
        for key in filter(is_loc, want):  # those of scales still see the noise
            torch.testing.assert_close(got[key], want[key], atol=EXACT, rtol=EXACT)
            assert bool((want[key] != 0.0).all()), key
        assert abs(float(parts[0].detach()) - float(whole.detach())) > 1e-3

    @pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
    def test_same_noise(self, objective: pvi.Objective) -> None:
        """With the draws of every row held fixed, the gradients of the scales agree as well."""
        noise, outer = randn(3, SIZE, seed=1), randn(1, seed=2)

        def guide(x: Tensor) -> None:
            scale = positive("theta_scale", 0.7)
            pyro.sample("theta", FixedNoise(param("theta_loc", 0.4), scale, outer.expand(3)))
            with pyro.plate("data", len(x)) as rows:
                loc = param("loc", _start()["z"])[rows]
                scale = positive("scale", torch.linspace(0.5, 1.5, SIZE))[rows]
                pyro.sample("z", FixedNoise(loc, scale, noise[:, rows]))

        split = Split(nested_model, guide, randn(SIZE))
        whole = split.loss(objective)
        parts = [split.loss(objective, rows) for rows in torch.randperm(SIZE).split(BATCH)]
        mean = torch.stack(parts).mean()
        assert float(mean.detach()) == pytest.approx(float(whole.detach()), abs=EXACT)
        torch.testing.assert_close(gradients(mean), gradients(whole), atol=EXACT, rtol=EXACT)

    def test_batches_of_different_length(self) -> None:
        """The scale follows the batch's own length."""
        split = Split(nested_model, ROW_GUIDES["MeanField"](), randn(SIZE))
        whole = split.loss(pvi.ELBO(kl="exact"))
        pieces = torch.arange(SIZE).split([3, 5, 4])
        parts = torch.stack([split.loss(pvi.ELBO(kl="exact"), rows) for rows in pieces])
        mean = (parts * torch.tensor([3.0, 5.0, 4.0])).sum() / SIZE
        assert float(mean.detach()) == pytest.approx(float(whole.detach()), abs=EXACT)

    def test_local_latents_above_features(self, quiet: None) -> None:
        """Rows x columns, latents in both plates, as many columns as rows in a batch."""
        start = {"z": torch.linspace(0.3, 1.2, SIZE * BATCH).reshape(SIZE, BATCH)}

        def model(x: Tensor) -> None:
            with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        for make in (MeanField, AutoNormal):
            pyro.clear_param_store()
            guide = make(model, init_loc_fn=init_to_value(values=start), init_scale=POINT)
            split = Split(model, guide, randn(SIZE, BATCH))
            whole = split.loss(pvi.ELBO())
            parts = [split.loss(pvi.ELBO(), rows) for rows in torch.randperm(SIZE).split(BATCH)]
            mean = torch.stack(parts).mean()
            assert float(mean.detach()) == pytest.approx(float(whole.detach()), abs=EXACT)


@pytest.mark.parametrize("name", ROW_GUIDES)
@pytest.mark.parametrize("objective", [pvi.ELBO(), pvi.IWAE(3)], ids=["elbo", "iwae"])
def test_gradients_hit_the_rows_of_the_batch(name: str, objective: pvi.Objective) -> None:
    split = Split(nested_model, ROW_GUIDES[name](), randn(SIZE))
    rows = torch.tensor([10, 3, 7, 0])
    found = gradients(split.loss(objective, rows))
    tables = {n: g for n, g in found.items() if is_loc(n) and g.shape == (SIZE,)}
    assert len(tables) == 1
    for gradient in tables.values():
        assert sorted(gradient.nonzero().flatten().tolist()) == [0, 3, 7, 10]


@pytest.mark.parametrize("kind", ["param", "module", "network"])
def test_guide_that_reads_the_data_and_its_own_rows_by_index(kind: str) -> None:
    """`x[i]` wants numbers in the batch, `loc[i]` in the data: refuse it, or do both right."""
    table = nn.Embedding.from_pretrained(_start()["z"].unsqueeze(1), freeze=False)

    def guide(x: Tensor) -> None:
        _theta()
        slope = param("slope", 0.2)
        if kind == "network":
            pyro.module("table", table)
        loc = param("loc", _start()["z"]) if kind == "param" else None
        with pyro.plate("data", len(x)) as rows:
            own = table(rows).squeeze(-1) if loc is None else loc[rows]
            pyro.sample("z", dist.Normal(own + slope * x[rows], POINT))

    class Module(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(_start()["z"])

        def forward(self, x: Tensor) -> None:
            _theta()
            slope = param("slope", 0.2)
            with pyro.plate("data", len(x)) as rows:
                pyro.sample("z", dist.Normal(self.loc[rows] + slope * x[rows], POINT))

    try:
        split = Split(nested_model, Module() if kind == "module" else guide, randn(SIZE))
    except (GuideError, ModelError):
        return
    whole = split.loss(pvi.ELBO())
    parts = [split.loss(pvi.ELBO(), rows) for rows in torch.arange(SIZE).split(BATCH)]
    mean = torch.stack(parts).mean()
    assert float(mean.detach()) == pytest.approx(float(whole.detach()), abs=EXACT)


def test_parameters_in_the_model() -> None:
    """The look whether rows add up makes numbers of densities that have gradients."""

    def model(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    pvi.fit(model, data=torch.zeros(SIZE), batch_size=BATCH, steps=2, progress=False)
