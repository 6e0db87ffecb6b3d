"""`Fit.save` and `pvi.load`: the same draws again, in another process and from code alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

import pvi
from pvi.errors import CheckpointError, PviError
from tests.families import GUIDES, make, world
from tests.scenarios import mean_model, randn

pytestmark = pytest.mark.usefixtures("isolated")
X = randn(16).double()


def scale_model(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, sigma), obs=x)


def function_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(2))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    pyro.sample("mu", dist.Normal(loc[0], scale[0]))
    pyro.sample("sigma", dist.LogNormal(loc[1], scale[1]))


class ModuleGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))
        self.scale = PyroParam(torch.ones(2), constraints.positive)

    def forward(self, x: Tensor) -> None:
        loc, scale = self.loc, self.scale
        pyro.sample("mu", dist.Normal(loc[0], scale[0]))
        pyro.sample("sigma", dist.LogNormal(loc[1], scale[1]))


class Decoder(nn.Module):
    """A model with weights and with buffers that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(self.net(z.reshape(-1, 1)).reshape(z.shape), 0.5), obs=x)


def registered(net: nn.Module) -> Callable[[Tensor], None]:
    """A function guide with a network in its closure."""

    def guide(x: Tensor) -> None:
        pyro.module("encoder", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x.unsqueeze(-1)).squeeze(-1), 0.3))

    return guide


def wrapped() -> Callable[[Tensor], Any]:
    """A function around a guide of ours, whose names in the store count upwards."""
    inner = pvi.guides.MeanField(scale_model)
    return lambda x: inner(x)


PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "function": lambda: (scale_model, function_guide),
    "module": lambda: (scale_model, ModuleGuide()),
    "default": lambda: (scale_model, None),
    "wrapped": lambda: (scale_model, wrapped()),
    "AutoNormal": lambda: (scale_model, AutoNormal(scale_model)),
    "AutoDiagonalNormal": lambda: (scale_model, AutoDiagonalNormal(scale_model)),
    "networks": lambda: (Decoder(), registered(nn.Linear(1, 1))),
} | {name: lambda name=name: (world, make(name)) for name in GUIDES}


def same(one: pvi.Fit, two: pvi.Fit) -> bool:
    a, b = (fit.posterior.sample(20, seed=3) for fit in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def fitted(name: str, folder: Path, **options: Any) -> pvi.Fit:
    torch.manual_seed(1)
    model, guide = PAIRS[name]()
    fit = pvi.fit(model, guide, X, steps=12, seed=0, **options)
    fit.save(folder)
    return fit


@pytest.mark.parametrize("name", PAIRS)
def test_same_draws(name: str, tmp_path: Path) -> None:
    """Fresh objects from the same code draw the same, and know the fit's history and verdict."""
    fit = fitted(name, tmp_path / "fit")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    model, guide = PAIRS[name]()
    expected = torch.get_rng_state() if name == "networks" else before
    loaded = pvi.load(tmp_path / "fit", model, guide, X)
    assert torch.equal(torch.get_rng_state(), expected), "the caller's random state"
    assert same(fit, loaded)
    assert (loaded.history["bound"] == fit.history["bound"]).all()
    assert (loaded.reason, loaded.converged, loaded.seed) == (fit.reason, fit.converged, 0)
    assert loaded.objective == fit.objective
    assert not pyro.get_param_store()


def test_other_process(tmp_path: Path) -> None:
    fit = fitted("wrapped", tmp_path / "fit")
    code = (
        "import sys, torch, pvi, tests.test_save as t\n"
        "torch.set_default_dtype(torch.float64)\n"
        "pvi.guides.MeanField(), pvi.guides.MeanField()\n"
        "fit = pvi.load(sys.argv[1], *t.PAIRS['wrapped'](), t.X)\n"
        "print(fit.posterior.sample(3, seed=0)['mu'].tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "fit"], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == fit.posterior.sample(3, seed=0)["mu"].tolist()


def test_saved_as_it_was_then(tmp_path: Path) -> None:
    """A fit keeps its values when its guide is trained on; saving takes those."""
    guide = ModuleGuide()
    first = pvi.fit(scale_model, guide, X, steps=5, seed=0)
    pvi.fit(scale_model, guide, X, steps=5, seed=1)
    first.save(tmp_path / "fit")
    assert same(first, pvi.load(tmp_path / "fit", scale_model, ModuleGuide(), X))


def test_caveats_and_coordinates(tmp_path: Path) -> None:
    """A tempered fit stays tempered; `reparam=` has to be passed again."""
    options: dict[str, Any] = {"objective": pvi.ELBO(beta=0.5), "reparam": "noncentered"}
    fit = pvi.fit(world, data=X, steps=5, seed=0, **options)
    fit.save(tmp_path / "fit")
    loaded = pvi.load(tmp_path / "fit", world, data=X, reparam="noncentered")
    assert loaded.posterior.caveats() == fit.posterior.caveats() != []
    assert same(fit, loaded) and loaded.objective == fit.objective
    with pytest.raises(CheckpointError, match="same reparam="):
        pvi.load(tmp_path / "fit", world, data=X)


def test_schedules_are_code(tmp_path: Path) -> None:
    objective = pvi.ELBO(beta=pvi.schedules.linear(2))
    pvi.fit(scale_model, data=X, steps=5, objective=objective).save(tmp_path / "fit")
    assert pvi.load(tmp_path / "fit", scale_model, data=X).objective is None
    given = pvi.load(tmp_path / "fit", scale_model, data=X, objective=objective)
    assert given.objective is objective


def test_saved_twice(tmp_path: Path) -> None:
    fitted("function", tmp_path / "fit")
    fit = fitted("module", tmp_path / "fit")
    assert same(fit, pvi.load(tmp_path / "fit", scale_model, ModuleGuide(), X))
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("work of years")
    with pytest.raises(CheckpointError, match="other files"):
        fit.save(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").exists()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))


def _replace(old: bytes, new: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new)) and None


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut tensors": ("tensors.safetensors", _cut, "cut off or changed"),
    "changed tensors": ("tensors.safetensors", _flip, "cut off or changed"),
    "no tensors": ("tensors.safetensors", Path.unlink, "can't be read"),
    "pickle": ("tensors.safetensors", lambda p: torch.save({}, p), "cut off or changed"),
    "cut state": ("state.json", _cut, "cut off"),
    "no state": ("state.json", Path.unlink, "can't be read"),
    "foreign": ("state.json", lambda p: p.write_text('{"a": 1}'), "no state that pvi wrote"),
    "edited": ("state.json", _replace(b'"seed": 0', b'"seed": 1'), "was changed after"),
    "later": ("state.json", _replace(b'"format": 1', b'"format": 2'), "reads format 1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(damage: str, tmp_path: Path) -> None:
    """Whatever happened to a file, the error names it, and nothing is unpickled."""
    fitted("function", tmp_path / "fit")
    name, spoil, message = DAMAGES[damage]
    spoil(tmp_path / "fit" / name)
    with pytest.raises(CheckpointError, match=message) as error:
        pvi.load(tmp_path / "fit", scale_model, function_guide, X)
    assert name in str(error.value)


def test_mismatches(tmp_path: Path) -> None:
    """Other programs than those of the fit are refused, and keep their values."""
    fitted("function", tmp_path / "fit")
    load = lambda *args: pvi.load(tmp_path / "fit", *args)  # noqa: E731
    with pytest.raises(CheckpointError, match=r"latents \['mu', 'sigma'\], but .* \['mu'\]"):
        load(mean_model, None, X)
    guide = ModuleGuide()
    with pytest.raises(CheckpointError, match=r"no value of 'guide:loc'.* has param:loc"):
        load(scale_model, guide, X)
    assert float(guide.loc.detach().abs().sum()) == 0.0

    def longer(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(loc[0], scale[0]))
        pyro.sample("sigma", dist.LogNormal(loc[1], scale[1]))

    with pytest.raises(CheckpointError, match=r"'param:loc' is float64 of shape \(2,\) there"):
        load(scale_model, longer, X)
    with pytest.raises(PviError):
        pvi.load(tmp_path / "nowhere", scale_model, function_guide, X)
