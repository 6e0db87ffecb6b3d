"""The export to arviz: names, groups, weights, files; on both arviz lines."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi.errors import DataError, GuideError, ObjectiveError
from pvi.posterior.arviz import load
from pvi.posterior.store import CHUNK, _chunks

N, S, SD = 20, 400, 0.5
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -1.0]) + SD * torch.randn(N, generator=torch.Generator().manual_seed(1))
NEW = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
COVARIANCE = torch.linalg.inv(torch.eye(2) + X.T @ X / SD**2)
MEAN = COVARIANCE @ (X.T @ Y) / SD**2


def model(x: Tensor, y: Tensor | None = None) -> None:
    event: Any = {"event_dims": ["feature"]}
    w = pyro.sample("net/w", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer=event)
    with pyro.plate("row", len(x)):
        pyro.sample("y.obs", dist.Normal((x * w).sum(-1), SD), obs=y)


def exact(x: Tensor, y: Tensor | None = None, wide: float = 1.0) -> None:
    scale = torch.linalg.cholesky(COVARIANCE * wide)
    pyro.sample("net/w", dist.MultivariateNormal(MEAN, scale_tril=scale))


def wide(x: Tensor, y: Tensor | None = None) -> None:
    exact(x, y, 2.0)


POSTERIOR = pvi.Posterior(model, exact, (X, Y))
EVERY = {
    "coords": {"feature": ["a", "b"]},
    "prior": True,
    "predictions": (NEW,),
    "pred_coords": {"row": ["p", "q", "r"]},
    "seed": 0,
}
GROUPS = {
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "predictions",
    "predictions_constant_data",
    "log_likelihood",
    "log_prior",
    "observed_data",
    "constant_data",
    "sample_stats",
}


@pytest.fixture(scope="module")
def tree() -> Any:
    return POSTERIOR.to_datatree(S, **EVERY)


def test_groups_and_names(tree: Any) -> None:
    assert set(tree.children) == GROUPS
    w = tree["posterior"]["net_w"]
    assert w.dims == ("chain", "draw", "feature")
    assert list(w["feature"].values) == ["a", "b"]
    assert w.attrs["site"] == "net/w"
    assert tree["predictions"]["y.obs"].dims == ("chain", "draw", "row")
    assert list(tree["predictions"]["row"].values) == ["p", "q", "r"]
    assert list(tree["posterior_predictive"]["row"].values) == list(range(N))


def test_known_values(tree: Any) -> None:
    draws = torch.tensor(tree["posterior"]["net_w"].values[0])
    assert ((draws.mean(0) - MEAN).abs() < 4 * (COVARIANCE.diagonal() / S).sqrt()).all()
    log_prior = dist.Normal(0.0, 1.0).log_prob(draws).sum(-1)
    assert np.allclose(tree["log_prior"]["net_w"].values[0], log_prior, atol=1e-5)
    stats = tree["sample_stats"]
    whole = tree["log_likelihood"]["y.obs"].values.sum(-1) + tree["log_prior"]["net_w"].values
    assert np.allclose(stats["log_p"].values, whole, atol=1e-3)
    assert np.allclose(stats["log_weight"].values, -math.log(S), atol=1e-3)  # the guide is exact
    prior = tree["prior"]["net_w"].values[0]
    assert (np.abs(prior.mean(0)) < 4 / math.sqrt(S)).all()
    assert (np.abs(prior.std(0) - 1) < 4 / math.sqrt(2 * S)).all()


def test_predictions_are_of_the_same_draws(tree: Any) -> None:
    draws = torch.tensor(tree["posterior"]["net_w"].values[0])
    error = tree["predictions"]["y.obs"].values[0] - (draws @ NEW.T).numpy()
    assert abs(error.std() - SD) < 4 * SD / math.sqrt(2 * error.size)
    data = tree["predictions_constant_data"]["x"]
    assert data.dims[0] == "row" and np.array_equal(data.values, NEW)


@pytest.mark.parametrize(
    ("option", "group"),
    [
        ("predictive", "posterior_predictive"),
        ("log_likelihood", "log_likelihood"),
        ("log_prior", "log_prior"),
    ],
)
def test_groups_can_be_left_out(option: str, group: str) -> None:
    assert group not in POSTERIOR.to_datatree(5, seed=0, **{option: False}).children


def test_index_origin() -> None:
    posterior = POSTERIOR.to_datatree(5, seed=0, index_origin=1)["posterior"]
    assert posterior["feature"].values.tolist() == [1, 2]
    assert posterior["draw"].values.tolist() == [1, 2, 3, 4, 5]


def test_names_that_become_one_are_refused() -> None:
    def clash(y: Tensor) -> None:
        a = pyro.sample("a/b", dist.Normal(0.0, 1.0))
        b = pyro.sample("a_b", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    fit = pvi.fit(clash, data=Y, steps=2, seed=0)
    with pytest.raises(DataError, match=r"'a/b' and 'a_b' would both be called 'a_b'"):
        fit.to_datatree(5)


def test_correct_follows_the_posterior() -> None:
    posterior, num = pvi.Posterior(model, wide, (X, Y)), 2_000
    tree = posterior.to_datatree(num, correct="psis", **EVERY)
    draws = torch.tensor(tree["posterior"]["net_w"].values[0])
    ratio = draws.var(0) / COVARIANCE.diagonal()
    assert ((ratio - 1).abs() < 5 * math.sqrt(2 / num)).all()  # the guide's is 2
    stats = tree["sample_stats"]
    log_q = dist.MultivariateNormal(MEAN, 2 * COVARIANCE).log_prob(draws)
    assert np.allclose(stats["log_q"].values[0], log_q, atol=1e-3)
    assert "log_weight" not in stats and stats.attrs["khat"] < stats.attrs["khat_threshold"]
    assert "PSIS" in tree["posterior"].attrs["sampling"]
    assert torch.equal(posterior.sample(num, seed=0, correct="psis")["net/w"], draws)


def test_correct_is_refused() -> None:
    def narrow(x: Tensor, y: Tensor | None = None) -> None:
        exact(x, y, 0.05)

    def point(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("net/w", dist.Delta(MEAN).to_event(1))

    with pytest.raises(GuideError, match="khat is"):
        pvi.Posterior(model, narrow, (X, Y)).to_datatree(500, seed=0, correct="psis")
    at_point = pvi.Posterior(model, point, (X, Y))
    with pytest.raises(ObjectiveError, match="net/w"):
        at_point.to_datatree(500, seed=0, correct="psis")
    stats = at_point.to_datatree(5, seed=0)["sample_stats"]
    assert "log_weight" not in stats and "point" in stats.attrs["no_log_weight"]
    with pytest.raises(DataError, match="correct must be"):
        POSTERIOR.to_datatree(5, correct="yes")


@pytest.mark.parametrize("correct", [None, "psis"])
def test_pieces_on_disk_are_the_draws_in_memory(
    correct: str | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pvi.posterior.draws.CHUNK", 40 * (N + 5))  # several pieces
    posterior = pvi.Posterior(model, wide, (X, Y))
    plain = posterior.to_datatree(60, correct=correct, **EVERY)
    with posterior.to_datatree(60, correct=correct, path=tmp_path / "d.nc", **EVERY) as stored:
        assert set(stored.children) == GROUPS
        for group in GROUPS:
            assert plain[group].to_dataset().identical(stored[group].to_dataset()), group
    assert [p.name for p in tmp_path.iterdir()] == ["d.nc"]
    with pytest.raises(DataError, match=r"must end in .nc"):
        posterior.to_datatree(5, path=tmp_path / "d.zarr")


@pytest.mark.parametrize("correct", [None, "psis"])
def test_predictions_leave_the_draws_alone(
    correct: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for so many new rows that they need smaller runs than the training data."""
    monkeypatch.setattr("pvi.posterior.draws.CHUNK", 40 * (N + 5))
    many = torch.randn(12 * N, 2, generator=torch.Generator().manual_seed(3))
    posterior = pvi.Posterior(model, wide, (X, Y))
    plain = posterior.to_datatree(60, correct=correct, seed=0)
    both = posterior.to_datatree(60, correct=correct, seed=0, predictions=(many,))
    for group in plain.children:
        assert plain[group].to_dataset().identical(both[group].to_dataset()), group
    draws = torch.tensor(both["posterior"]["net_w"].values[0])
    error = both["predictions"]["y.obs"].values[0] - (draws @ many.T).numpy()
    assert abs(error.std() - SD) < 4 * SD / math.sqrt(2 * error.size)


def test_predictions_in_small_runs_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that the model sums out keeps, draw by draw, the value of the training data."""

    def mixture(x: Tensor, y: Tensor | None = None) -> None:
        far = pyro.sample("far", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(100 * far, SD), obs=y)

    def nothing(x: Tensor, y: Tensor | None = None) -> None:
        pass

    monkeypatch.setattr("pvi.posterior.draws.CHUNK", 40)
    y = torch.tensor([50.0, 50.0])  # so that both values are as likely
    tree = pvi.Posterior(mixture, nothing, (y, y)).to_datatree(
        30, seed=0, predictions=(torch.zeros(15),)
    )
    far = tree["posterior"]["far"].values[0]
    assert 0 < far.mean() < 1
    assert (np.abs(tree["predictions"]["y"].values[0] - 100 * far[:, None]) < 10 * SD).all()


@pytest.mark.parametrize("late", ["model", "name", "end"])
def test_a_failure_leaves_the_old_file(
    late: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, failing = [], False

    def breaking(x: Tensor, y: Tensor | None = None) -> None:
        runs.append(1)
        if failing and late == "model" and len(runs) > 8:
            raise RuntimeError("out of paper")
        model(x, y)

    def full(*args: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("pvi.posterior.draws.CHUNK", 2 * (N + 5))
    posterior, path = pvi.Posterior(breaking, exact, (X, Y)), tmp_path / "d.nc"
    with posterior.to_datatree(20, path=path, seed=0) as tree:
        old = tree["posterior"]["net_w"].load()
    before, random, failing = path.read_bytes(), torch.get_rng_state(), True
    runs.clear()
    if late == "end":
        monkeypatch.setattr("pvi.posterior.arviz.add", full)
    options = {"coords": {"fature": ["a", "b"]}} if late == "name" else {}
    with pytest.raises((RuntimeError, OSError, DataError), match=r"paper|disk|fature"):
        posterior.to_datatree(20, path=path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["d.nc"] and path.read_bytes() == before
    assert torch.equal(torch.get_rng_state(), random)
    if late == "name":
        assert len(runs) < 8  # before the long work
    monkeypatch.undo()
    failing = False
    with posterior.to_datatree(20, path=path, seed=1) as new:
        assert not np.array_equal(new["posterior"]["net_w"].values, old.values)


@pytest.mark.parametrize("shape", [(11_000, 50), (300_000,), (3, 100_001), (7,)])
def test_chunks_on_disk_are_hardly_padded(shape: tuple[int, ...]) -> None:
    import xarray

    full = (1, 6, *shape)
    array = xarray.Variable([f"d{i}" for i in range(len(full))], np.broadcast_to(0.0, full))
    sizes = _chunks(xarray.Dataset({"z": array}))["z"]["chunksizes"]
    assert 1 <= math.prod(sizes) <= CHUNK
    stored = math.prod(-(-n // c) * c for n, c in zip(full[2:], sizes[2:], strict=True))
    assert stored < 1.01 * math.prod(shape)


@pytest.mark.filterwarnings("ignore:The data type")  # zarr 3 on labels that are strings
@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_round_trip(tree: Any, kind: str, tmp_path: Any) -> None:
    import xarray

    path = tmp_path / "all"
    if kind == "zarr":
        pytest.importorskip("zarr")
        tree.to_zarr(path, zarr_format=2)
        back = xarray.open_datatree(path, engine="zarr")
    else:
        tree.to_netcdf(path, engine="h5netcdf")
        back = xarray.open_datatree(path, engine="h5netcdf")
    with back:
        assert set(back.children) == GROUPS
        for group in GROUPS:
            assert tree[group].to_dataset().identical(back[group].to_dataset()), group


@pytest.mark.filterwarnings("ignore")
def test_power_scaling_and_loo_warning() -> None:
    az, data = load(), POSTERIOR.to_arviz(S, seed=0)
    if az.__version__.startswith("0."):
        found = az.psens(data, component="prior")["net_w"]
    else:
        found = az.psense(data, group="prior")["net_w"]
    assert found.dims == ("feature",) and bool((found > 0).all() & (found < 0.2).all())
    assert "az.loo" in data["log_likelihood"].attrs["warning"]
