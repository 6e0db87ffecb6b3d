"""A fit that was interrupted and resumed is the uninterrupted fit, bit by bit."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pvi
from pvi.errors import CheckpointError, FitError
from pvi.fit.random import random_state, set_random_state
from tests.scenarios import mean_model, randn

pytestmark = pytest.mark.usefixtures("isolated")
X = randn(24).double()


def coin_model(x: Tensor) -> None:
    coin = pyro.sample("coin", dist.Bernoulli(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(coin, 1.0), obs=x)


def coin_guide(x: Tensor) -> None:
    pyro.sample("coin", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(()))))


def late_guide() -> Callable[[Tensor], None]:
    """A guide that makes a parameter only after a while, and by a path of its own."""

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        if float(loc.detach()) != 0.0:
            start = lambda: torch.tensor(0.5)  # noqa: E731
            positive = dist.constraints.positive
            scale = pyro.param("scale", start, constraint=positive)
        else:
            scale = torch.ones(())
        pyro.sample("mu", dist.Normal(loc, scale))

    return guide


class Network(nn.Module):
    """Weights, dropout, and buffers that training changes."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(1, 4), nn.Dropout(0.2), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> None:
        pyro.module("network", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(self.net(z.reshape(-1, 1)).reshape(z.shape), 0.5), obs=x)


def loader(own: bool) -> DataLoader:
    generator = torch.Generator().manual_seed(5) if own else None
    return DataLoader(TensorDataset(X), batch_size=5, shuffle=True, generator=generator)


def momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def contested() -> dict[str, Any]:
    """With an adversary that starts late and draws random numbers of its own."""
    network = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.2), nn.BatchNorm1d(4), nn.Linear(4, 1))
    adversary = pvi.Adversary(network, weight=0.3, start=2, unit="epoch", lr=0.01)

    def model(x: Tensor) -> None:
        scale = pyro.param("spread", torch.ones(()), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            adversary((mu + scale * torch.randn(len(x))).unsqueeze(-1), x.unsqueeze(-1))
            pyro.sample("x", dist.Normal(mu, scale), obs=x)

    options = {"data": X, "steps": STEPS, "batch_size": 5, "accumulate": 2}
    return {"model": model, "adversaries": [adversary], **options}


Case = Callable[[], dict[str, Any]]
STEPS = 30
CASES: dict[str, Case] = {
    "all rows": lambda: {"model": mean_model, "data": X, "steps": STEPS},
    "minibatches": lambda: {"model": mean_model, "data": X, "steps": STEPS, "batch_size": 5},
    "loader": lambda: {"model": mean_model, "data": loader(False), "steps": STEPS},
    "loader with a stream": lambda: {"model": mean_model, "data": loader(True), "steps": STEPS},
    "score": lambda: (
        {"model": coin_model, "guide": coin_guide, "data": X, "steps": STEPS}
        | {"objective": pvi.ELBO()}
    ),
    "networks": lambda: {"model": Network(), "data": X, "steps": STEPS},
    "momentum": lambda: {"model": mean_model, "data": X, "steps": STEPS, "optimizer": momentum},
    "late": lambda: {"model": mean_model, "guide": late_guide(), "data": X, "steps": STEPS},
    "schedule": lambda: (
        {"model": mean_model, "data": X, "steps": STEPS}
        | {"objective": pvi.ELBO(beta=pvi.schedules.linear(20))}
    ),
    "many particles": lambda: (
        {"model": mean_model, "data": X, "steps": STEPS} | {"objective": pvi.IWAE(4)}
    ),
    "own scheduler": lambda: (
        {"model": mean_model, "data": X, "steps": STEPS, "optimizer": momentum, "clip_norm": 5.0}
        | {"scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, STEPS)}
    ),
    "accumulated": lambda: (
        {"model": mean_model, "data": X, "steps": STEPS, "batch_size": 5, "accumulate": 3}
    ),
    "validated": lambda: (
        {"model": mean_model, "data": X, "steps": STEPS, "batch_size": 5, "optimizer": momentum}
        | {"validation_data": X[:7] + 1, "validate_every": 3, "patience": 99}
    ),
    "rates": lambda: {"model": mean_model, "data": X, "steps": STEPS, "lr": {"*scale*": 0.01}},
    "adversary": lambda: contested(),
    "AutoNormal": lambda: (
        {"model": mean_model, "data": X, "steps": STEPS}
        | {"guide": pyro.infer.autoguide.AutoNormal(mean_model)}
    ),
}


class Failing:
    """Bad at some evaluations with a gradient, of which a fault makes some more."""

    def __init__(self, *at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, x: Tensor) -> None:
        mean_model(x)
        bad = torch.is_grad_enabled() and self.calls in self.at
        pyro.factor("f", torch.tensor(torch.nan if bad else 0.0))

    def see(self, step: Any) -> None:
        self.calls = step.step


def disturb() -> None:
    """Another process has other random states and other names of guides."""
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    pvi.guides.MeanField()


def until(last: int, error: type[BaseException] = KeyboardInterrupt) -> list[Any]:
    def callback(step: Any) -> None:
        if step.step == last:
            raise error

    return [callback]


def run(case: Case, **options: Any) -> pvi.Fit:
    torch.manual_seed(11)
    given = case()
    disturb()
    return pvi.fit(**{"seed": 0, "progress": False, **given, **options})


def values(fit: pvi.Fit) -> dict[str, Tensor]:
    with fit.posterior.params.scope():
        return {k: x.detach().clone() for k, x in fit.posterior.params.tensors().items()}


def identical(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def assert_same(one: pvi.Fit, two: pvi.Fit) -> None:
    assert identical(values(one), values(two))
    for key, column in one.history.tensors().items():
        if key == "seconds":
            continue
        assert np.array_equal(column, two.history[key], equal_nan=True), key
    assert (one.converged, one.reason) == (two.converged, two.reason)
    assert identical(one.posterior.sample(5, seed=1), two.posterior.sample(5, seed=1))


@pytest.mark.filterwarnings("ignore:training ended after:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_resumed(name: str, tmp_path: Path) -> None:
    """Twice interrupted, in the middle of an epoch and at its end, and run once more at the end."""
    folder = tmp_path / "run"
    whole = run(CASES[name])
    for last in (7, 20):
        part = run(CASES[name], checkpoint=folder, every=5, callbacks=until(last))
        assert (part.reason, len(part.history)) == ("interrupted", last)
    resumed = run(CASES[name], checkpoint=folder, every=5)
    assert_same(whole, resumed)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000025", "step-000030"]
    steps: list[Any] = []
    again = run(CASES[name], checkpoint=folder, callbacks=[steps.append])
    assert_same(whole, again)
    assert steps == []


@pytest.mark.programs
@pytest.mark.parametrize("last", [3, 5, 12, 14, 20])
def test_faults(last: int, tmp_path: Path) -> None:
    """Steps left out, the state to go back to, and rates that were lowered."""

    def attempt(stop: list[Any], **options: Any) -> pvi.Fit:
        model = Failing(2, 4, 11, 12, 13)  # two apart, then three in a row
        case = {"model": model, "data": X, "steps": STEPS, "objective": pvi.ELBO()}
        # What the model remembers is in no checkpoint.
        first = [int(p.name[5:]) for p in tmp_path.iterdir()]
        model.calls = max(first, default=0)
        return run(lambda: case, callbacks=[model.see, *stop], **options)

    whole = attempt([])
    assert [("left out" in n, "lowered" in n) for n in whole.notes] == [(True, False)] * 4 + [
        (False, True)
    ]
    assert attempt(until(last), checkpoint=tmp_path).reason == "interrupted"
    resumed = attempt([], checkpoint=tmp_path)
    assert_same(whole, resumed)
    assert whole.notes == resumed.notes


def test_patience(tmp_path: Path) -> None:
    """The best parameters and the validations without a better one are remembered."""

    def case() -> dict[str, Any]:
        options = {"model": mean_model, "data": X, "steps": 200, "batch_size": 5, "lr": 0.3}
        return options | {"validation_data": X[:7], "validate_every": 3, "patience": 4}

    whole = run(case)
    assert whole.reason.startswith("stopped early")
    best = len(whole.history) - 12
    for last in (best + 1, best + 7):
        assert run(case, checkpoint=tmp_path, callbacks=until(last)).reason == "interrupted"
    assert_same(whole, run(case, checkpoint=tmp_path))
    assert_same(whole, run(case, checkpoint=tmp_path))  # ended: no step more


@pytest.mark.parametrize(
    "left",
    [pytest.param(50, marks=pytest.mark.slow), 330, pytest.param(620, marks=pytest.mark.slow)],
)
def test_stages(left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The averages of "adam" in its stages, and the way that the parameters have gone."""
    ways: list[Any] = []
    keep = lambda leaves, way, bound: ways.append(way) or ""  # noqa: E731
    monkeypatch.setattr(sys.modules["pvi.fit.trainer"], "rise_ahead", keep)
    case: Case = lambda: {"model": mean_model, "data": X, "optimizer": "adam"}  # noqa: E731
    whole = run(case)
    part = run(case, checkpoint=tmp_path, callbacks=until(len(whole.history) - left))
    assert part.reason == "interrupted"
    assert_same(whole, run(case, checkpoint=tmp_path))
    assert len(ways) == 2 and all(map(torch.equal, *ways))


@pytest.mark.programs
def test_other_process(tmp_path: Path) -> None:
    """Nothing in a checkpoint depends on addresses, hashes or counters of a process."""
    code = (
        "import sys, torch, tests.test_checkpoint as t\n"
        "torch.set_default_dtype(torch.float64)\n"
        "t.run(t.CASES['networks'], checkpoint=sys.argv[1], callbacks=t.until(13))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000013"]
    resumed = run(CASES["networks"], checkpoint=tmp_path)
    assert_same(run(CASES["networks"]), resumed)


def test_without_a_seed(tmp_path: Path) -> None:
    """The caller's random state is the stream then."""
    case = CASES["minibatches"]
    torch.manual_seed(4)
    whole = pvi.fit(**case(), progress=False)
    torch.manual_seed(4)
    pvi.fit(**case(), progress=False, checkpoint=tmp_path, callbacks=until(8))
    disturb()
    assert_same(whole, pvi.fit(**case(), progress=False, checkpoint=tmp_path))


@pytest.mark.parametrize("name", ["minibatches", "networks"])
def test_single_precision(name: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    data = X.float()
    whole = run(CASES[name], data=data)
    assert run(CASES[name], data=data, checkpoint=tmp_path, callbacks=until(8)).reason
    assert_same(whole, run(CASES[name], data=data, checkpoint=tmp_path))


def test_stopped_by_a_callback(tmp_path: Path) -> None:
    """Without the callback the same call goes on."""
    case = CASES["minibatches"]
    part = run(case, checkpoint=tmp_path, callbacks=[lambda step: step.step == 8])
    assert part.reason == "stopped by a callback"
    assert_same(run(case), run(case, checkpoint=tmp_path))


class Remembering(torch.optim.SGD):
    """An optimiser with something in its state that is no plain data."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["memory"] = {1, 2}


def test_what_needs_pickle(tmp_path: Path) -> None:
    """No checkpoint and a word about it, but the fit is not lost."""
    with pytest.warns(UserWarning, match=r"is a set, which can't be saved without pickle"):
        fit = run(CASES["all rows"], optimizer=lambda p: Remembering(p, 1e-3), checkpoint=tmp_path)
    assert len(fit.history) == STEPS
    assert list(tmp_path.iterdir()) == []


def test_errors_of_callbacks_lose_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(CASES["all rows"], checkpoint=tmp_path, callbacks=until(13, ZeroDivisionError))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000013"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is listened to, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.programs
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_the_step(tmp_path: Path) -> None:
    """A signal in the middle of a step is answered at its end, with a checkpoint."""

    def model(x: Tensor) -> None:
        mean_model(x)
        if armed and torch.is_grad_enabled():
            armed.clear()
            os.kill(os.getpid(), signal.SIGINT)

    armed: list[bool] = []
    arm = lambda step: armed.append(True) if step.step == 9 else None  # noqa: E731
    case: Case = lambda: {"model": model, "data": X, "steps": STEPS}  # noqa: E731
    whole = run(case)
    part = run(case, checkpoint=tmp_path, callbacks=[arm])
    assert (part.reason, len(part.history)) == ("interrupted", 10)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000010"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(whole, run(case, checkpoint=tmp_path))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut tensors": lambda p: _cut(p / "tensors.safetensors"),
    "cut state": lambda p: _cut(p / "state.json"),
    "no state": lambda p: (p / "state.json").unlink(),
    "pickle": lambda p: torch.save({}, p / "tensors.safetensors"),
    "edited": lambda p: (p / "state.json").write_text(
        (p / "state.json").read_text().replace('"step": 12', '"step": 11')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(damage: str, tmp_path: Path) -> None:
    """The one before is used, with a word about it; without one it is an error."""
    case = CASES["minibatches"]
    run(case, checkpoint=tmp_path, every=6, callbacks=until(12))
    DAMAGES[damage](tmp_path / "step-000012")
    with pytest.warns(UserWarning, match=r"step-000012.*Going on from step-000006"):
        resumed = run(case, checkpoint=tmp_path, every=6)
    assert_same(run(case), resumed)
    for folder in tmp_path.iterdir():
        _cut(folder / "state.json")
    with pytest.raises(CheckpointError, match=r"step-000030.*Delete the folder"):
        run(case, checkpoint=tmp_path)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": X + 1}, "data 'y' was"),
    "rows": ({"data": X[:20]}, "rows was 24, but here it is 20"),
    "batch_size": ({"batch_size": 4}, "batch_size was 5, but here it is 4"),
    "objective": ({"objective": pvi.IWAE(2)}, "objective was"),
    "guide": ({"guide": pvi.guides.FullRank()}, "guide was MeanField, but here it is FullRank"),
    "seed": ({"seed": 1}, "seed was 0, but here it is 1"),
    "steps": ({"steps": 40}, "steps was 30, but here it is 40"),
    "lr": ({"lr": 0.1}, "lr was None, but here it is 0.1"),
    "accumulate": ({"accumulate": 2}, "accumulate was None, but here it is 2"),
    "validation": ({"validation_data": X}, "validation_data 'y' was None"),
    "optimizer": ({"optimizer": momentum}, "optimizer was auto"),
    "model": ({"model": coin_model, "guide": coin_guide}, r"data 'y' was .* None"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_fit(other: str, tmp_path: Path) -> None:
    """Never continued, never overwritten."""
    run(CASES["minibatches"], checkpoint=tmp_path, callbacks=until(12))
    options, message = OTHERS[other]
    with pytest.raises(CheckpointError, match=message):
        run(CASES["minibatches"], checkpoint=tmp_path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000012"]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning; the fit goes on, and so does writing once there is room."""
    full, fsync = [True, True], os.fsync

    def failing(handle: int) -> None:
        if full:
            full.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.warns(UserWarning, match="No space left on device.*make room"):
        fit = run(CASES["all rows"], checkpoint=tmp_path, every=10)
    assert_same(run(CASES["all rows"]), fit)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000030"]


def test_options(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options, message in (
        ({"every": 5}, "give checkpoint="),
        ({"checkpoint": tmp_path, "every": 0}, "every must be a whole number"),
        ({"checkpoint": tmp_path / "file"}, "is a file"),
    ):
        with pytest.raises(FitError, match=message):
            run(CASES["all rows"], **options)


def test_a_checkpoint_is_no_saved_fit(tmp_path: Path) -> None:
    fit = run(CASES["all rows"], checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="no saved fit but a checkpoint"):
        pvi.load(tmp_path / "step-000030", mean_model, data=X)
    fit.save(tmp_path / "step-000040")
    with pytest.warns(UserWarning, match="is no checkpoint"):
        run(CASES["all rows"], checkpoint=tmp_path)


def test_random_streams() -> None:
    """Torch's, numpy's and Python's go on where they were."""
    state = random_state()
    draw = lambda: (float(torch.randn(())), random.gauss(0, 1), np.random.randn())  # noqa: E731
    first = draw()
    disturb()
    set_random_state(state)
    assert draw() == first


def test_kills(tmp_path: Path) -> None:
    """`kill -9` at random moments, also inside a write: see the benchmark."""
    command = [sys.executable, "-m", "benchmarks.checkpoints", "--kills", "3", "--steps", "600"]
    subprocess.run([*command, "--results", tmp_path], check=True, capture_output=True)
    rows = json.loads((tmp_path / "checkpoints.json").read_text())["rows"]
    assert sum(row["kills"] for row in rows) == 3
    for row in rows:
        assert row["bit-identical"] is True
        assert row["most steps lost"] <= row["every"]
