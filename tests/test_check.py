"""`pvi.check` says what a fit would, all at once, and leaves nothing behind."""

import re
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pvi
from pvi.engine.describe import COLUMNS
from pvi.guides import MeanField
from tests import bad_inputs
from tests.bad.base import BadInput, data, guide, model
from tests.scenarios import param, randn
from tests.test_bad_input import untouched

pytestmark = pytest.mark.usefixtures("isolated")
TAKEN = ("model", "guide", "data", "args", "kwargs", "objective", "batch_size", "plate", "reparam")


def rows_of(found: pvi.Check) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in found.sites}


def before_training() -> dict[str, Any]:
    """The rows whose mistake shows before the first step, in arguments that `check` takes."""
    found = {}
    for group, name, make in bad_inputs.rows():
        case = make()
        kinds = case.error if isinstance(case.error, tuple) else (case.error,)
        ours = case.error is not None and all(issubclass(kind, pvi.PviError) for kind in kinds)
        known = case.use is None and set(case.call) <= set(TAKEN)
        if group != bad_inputs.programs.CHANGES and ours and known:
            found[f"{group}: {name}"] = make
    return found


CASES = before_training()


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_a_fit_says(name: str) -> None:
    case: BadInput = CASES[name]()
    call = {"model": model, **case.call}
    call.setdefault("data", data())
    with untouched():
        found = pvi.check(**call)
    assert not found.ok
    text = "\n".join(str(problem) for problem in found.problems)
    for pattern in (re.escape(case.culprit), *case.names):
        assert re.search(pattern, text), (pattern, text)
    with pytest.raises(pvi.PviError):
        found.raise_problems()


def test_the_table() -> None:
    def program(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        offset = pyro.param("offset", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            mean = pyro.deterministic("mean", (w.unsqueeze(-2) * x).sum(-1) + offset, event_dim=0)
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    with untouched():
        found = pvi.check(program, data=(randn(30, 2), randn(30)), batch_size=7)
    assert found.ok and not found.hints
    rows = rows_of(found)
    assert list(rows) == ["w", "sigma", "y", "mean", "offset"]
    assert [rows[n]["kind"] for n in rows] == [
        "latent",
        "latent",
        "observed",
        "deterministic",
        "param",
    ]
    w = dict(rows["w"])
    assert (w["distribution"], w["batch"], w["event"]) == ("Normal.to_event(1)", "()", "(2,)")
    assert (w["support"], w["KL"]) == ("real", "exact")
    assert rows["sigma"]["support"] == ">= 0"
    assert rows["sigma"]["KL"] == "sample: no closed form"
    assert (rows["y"]["batch"], rows["y"]["plates"]) == ("(30,)", "data (30)")
    text = str(found)
    assert "batches of 7 of 30 rows, which plate 'data' follows" in text
    assert "parameters: 7 numbers in 5 tensors" in text
    assert "particles: " in text


def test_all_problems_at_once() -> None:
    def partial(x: Tensor, y: Tensor) -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))

    x, y = data()
    y[3] = float("nan")
    found = pvi.check(model, partial, (x, y))
    text = str(found)
    for part in ("site 'w'", "site 'other'", "observed site 'y' has NaN", "no parameters"):
        assert part in text
    assert len(found.problems) == 4
    options = pvi.check(model, 3, objective="elbo", batch_size=0, plate=4)  # type: ignore[arg-type]
    assert len(options.problems) == 4


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("make", [MeanField, AutoNormal, lambda model: guide])
def test_a_fit_after_a_check_is_the_fit_without_it(make: Any, batch_size: int | None) -> None:
    options = {"data": data(), "batch_size": batch_size}
    plain = pvi.fit(model, make(model), steps=5, seed=0, **options)
    family = make(model)
    with untouched():
        assert pvi.check(model, family, **options).ok
    checked = pvi.fit(model, family, steps=5, seed=0, **options)
    assert checked.history["loss"].tolist() == plain.history["loss"].tolist()


def test_a_guide_is_not_set_up_by_a_check() -> None:
    family = MeanField()
    pvi.check(model, family, data())
    assert family.model is None and not family.latents
    assert not list(family.parameters())


def test_weights_and_gradients_of_a_network_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

        def forward(self, x: Tensor, y: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(w + self.layer(x[:, None])[:, 0], 1.0), obs=y)

    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = pvi.check(net, data=data())
    assert found.ok
    assert "13 of them a network's" in str(found) or "16 of them a network's" in str(found)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert net.training


class TestHints:
    def texts(self, *args: Any, **options: Any) -> str:
        found = pvi.check(*args, **options)
        assert found.ok, found
        return "\n".join(found.hints)

    def test_columns(self) -> None:
        def regression(x: Tensor, y: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(torch.zeros(4), 1e-3).to_event(1))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 1.0), obs=y)

        x = randn(40, 4)
        x[:, 1] = 2000.0 + 5 * x[:, 1]
        x[:, 2] *= 1e5
        text = self.texts(regression, data=(x, randn(40)))
        assert re.search(r"x\[:, 1\] has mean 200\d and sd \d.*subtract the mean", text)
        assert re.search(r"x\[:, 2\] has sd .*e\+0[45]: divide", text)
        assert "x[:, 0]" not in text and "x[:, 3]" not in text

    def test_counts_under_a_normal(self) -> None:
        y = torch.arange(20.0) % 4
        assert "site 'y' holds whole numbers only" in self.texts(model, data=(randn(20), y))
        assert self.texts(model, data=data()) == ""

    def test_a_parameter_that_does_nothing(self) -> None:
        def idle(x: Tensor, y: Tensor) -> None:
            guide(x, y)
            param("idle", 1.0)

        assert self.texts(model, idle, data()) == (
            "parameter 'idle' does not reach the loss, so it will stay where it is"
        )

    def test_scales_that_differ(self) -> None:
        x, y = data()
        text = self.texts(model, data=(x, 1e4 * y))
        assert "observed site 'y' has a log density of -" in text and "different scales" in text

    def test_dtypes(self) -> None:
        torch.set_default_dtype(torch.float32)
        text = self.texts(model, data=tuple(v.double() for v in data()))
        assert "x is float64 where torch's default is float32" in text


def test_particles_that_need_a_loop_are_told_with_the_reason() -> None:
    def rigid(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(float(w.detach().mean()) * x, 1.0), obs=y)

    text = str(pvi.check(rigid, data=data(), objective=pvi.ELBO(4)))
    assert re.search(r"particles: looped: site 'y' has another log density", text)


def test_errors_of_the_model_come_through() -> None:
    def broken(x: Tensor, y: Tensor) -> None:
        raise KeyError("mine")

    with untouched(), pytest.raises(KeyError, match="mine"):
        pvi.check(broken, data=data())
