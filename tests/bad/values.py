"""NaN and infinity, and other values that can't be used."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvi
from pvi.errors import DataError, GuideError, ModelError
from tests.bad.base import BadInput, changed, data, model, row
from tests.scenarios import param, positive, randn

NAN, INF = float("nan"), float("inf")
GROUP = "values"


def scaled(x: Tensor, y: Tensor, sigma: float | Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, sigma), obs=y)


@row(GROUP, "NaN in y")
def _() -> BadInput:
    names = ("observed site 'y'", "NaN in 1 of 20", r"index \[3\]", "obs_mask")
    return BadInput({"data": changed(1, 3, NAN)}, DataError, "y", names, {"data": data()})


@row(GROUP, "NaN in x")
def _() -> BadInput:
    names = ("argument 'x'", "NaN in 1 of 20")
    return BadInput({"data": changed(0, 2, NAN)}, DataError, "x", names, {"data": data()})


@row(GROUP, "inf in x")
def _() -> BadInput:
    names = ("argument 'x'", "inf in 1 of 20", r"index \[5\]", "Remove or clip")
    return BadInput({"data": changed(0, 5, INF)}, DataError, "x", names, {"data": data()})


@row(GROUP, "-inf in y")
def _() -> BadInput:
    names = ("argument 'y'", "inf in 1 of 20", "Remove or clip")
    return BadInput({"data": changed(1, 5, -INF)}, DataError, "y", names, {"data": data()})


@row(GROUP, "NaN in args=")
def _() -> BadInput:
    call = {"model": scaled, "args": (torch.tensor(NAN),)}
    names = (r"argument 'args\[0\]'", "NaN")
    return BadInput(call, DataError, "args", names, {"args": (torch.tensor(1.0),)})


@row(GROUP, "inf in kwargs=")
def _() -> BadInput:
    call = {"model": scaled, "kwargs": {"sigma": torch.tensor(INF)}}
    mend = {"kwargs": {"sigma": torch.tensor(1.0)}}
    return BadInput(call, DataError, "sigma", ("argument 'sigma' has inf",), mend)


@row(GROUP, "NaN as a plain number in kwargs=")
def _() -> BadInput:
    call = {"model": scaled, "kwargs": {"sigma": NAN}}
    return BadInput(
        call, DataError, "sigma", ("argument 'sigma' is nan",), {"kwargs": {"sigma": 1.0}}
    )


@row(GROUP, "a scale of -1")
def _() -> BadInput:
    call = {"model": scaled, "kwargs": {"sigma": -1.0}}
    names = ("in the model, after site 'w'", "parameter scale", "GreaterThan", "-1")
    return BadInput(call, ModelError, "w", names, {"kwargs": {"sigma": 1.0}})


@row(GROUP, "NaN as a guide's start")
def _() -> BadInput:
    call = {"guide": pvi.guides.MeanField(init_loc_fn={"w": NAN})}
    names = ("init_loc_fn put site 'w'", "finite value")
    return BadInput(call, GuideError, "w", names, {"guide": pvi.guides.MeanField()}, pyro=False)


@row(GROUP, "a guide's start for no site")
def _() -> BadInput:
    call = {"guide": pvi.guides.MeanField(init_loc_fn={"weight": 0.0})}
    names = ("init_loc_fn", "no latent site 'weight'", "'w'")
    mend = {"guide": pvi.guides.MeanField(init_loc_fn={"w": 0.0})}
    return BadInput(call, GuideError, "weight", names, mend, pyro=False)


@row(GROUP, "NaN in a pyro.param")
def _() -> BadInput:
    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(param("start", NAN), positive("w_scale", 0.3)))

    names = ("parameter 'start'", "NaN", "guide")
    return BadInput({"guide": guide}, GuideError, "start", names, {"guide": None})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w + self.layer(x[:, None])[:, 0], 1.0), obs=y)


@row(GROUP, "NaN in a network's weights")
def _() -> BadInput:
    net = Net()
    with torch.no_grad():
        net.layer.weight.fill_(NAN)
    names = ("'layer.weight'", "NaN", "model")
    return BadInput({"model": net}, ModelError, "layer.weight", names, {"model": Net()})


@row(GROUP, "a density that overflows")
def _() -> BadInput:
    def degenerate(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(1e200 * w * x, 1.0), obs=y)

    names = ("site 'y'", "not finite", "scale")
    return BadInput({"model": degenerate}, ModelError, "y", names, {"model": model})


@row(GROUP, "data that want gradients")
def _() -> BadInput:
    x, y = data()
    names = ("argument 'x' requires gradients", r"\.detach\(\)")
    return BadInput({"data": (x.requires_grad_(), y)}, DataError, "x", names, {"data": data()})


@row(GROUP, "complex numbers")
def _() -> BadInput:
    x, y = data()
    names = ("argument 'x' is complex", "real")
    call = {"data": (x.to(torch.complex128), y)}
    return BadInput(call, DataError, "x", names, {"data": data()})


@row(GROUP, "NaN that the model masks out")
def _() -> BadInput:
    y = randn(10)
    y[3] = NAN

    def masked(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return BadInput({"model": masked, "data": y}, how="left out, also of gradients")
