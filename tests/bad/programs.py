"""Models and guides that don't fit each other or the data: sites, supports, structure."""

import random
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pvi
from pvi.errors import DataError, GuideError, ModelError
from tests.bad.base import BadInput, data, guide, model, row
from tests.scenarios import param, positive, randn

SITES, SUPPORT, CHANGES, MODELS = "sites of the guide", "supports", "changes", "models"


@row(SITES, "guide lacks a site")
def _() -> BadInput:
    def incomplete(x: Tensor, y: Tensor) -> None:
        param("unused", 0.0)

    names = ("site 'w'", "guide does not sample it", r"pyro.sample\('w'")
    return BadInput({"guide": incomplete}, GuideError, "w", names, {"guide": guide})


@row(SITES, "guide has an extra site")
def _() -> BadInput:
    def extra(x: Tensor, y: Tensor) -> None:
        guide(x, y)
        pyro.sample("other", dist.Normal(param("v_loc", 0.1), 1.0))

    names = ("site 'other'", "not in the model", "Remove or rename", "is_auxiliary")
    return BadInput({"guide": extra}, GuideError, "other", names, {"guide": guide})


@row(SITES, "guide misspells a site")
def _() -> BadInput:
    def slope(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    def typo(x: Tensor, y: Tensor) -> None:
        pyro.sample("slpoe", dist.Normal(param("w_loc", 0.1), 0.3))

    names = ("site 'slope'", "guide does not sample it", "guide has 'slpoe': is it meant")
    call = {"model": slope, "guide": typo}
    return BadInput(call, GuideError, "slope", names, {"guide": None})


@row(SITES, "guide samples the data")
def _() -> BadInput:
    def greedy(x: Tensor, y: Tensor) -> None:
        guide(x, y)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, 1.0))

    names = ("site 'y'", "observed in the model")
    return BadInput({"guide": greedy}, GuideError, "y", names, {"guide": guide})


@row(SITES, "guide without parameters")
def _() -> BadInput:
    def fixed(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    names = ("no parameters", "pyro.param")
    return BadInput({"guide": fixed}, GuideError, "guide", names, {"guide": guide})


@row(SITES, "guide takes other arguments")
def _() -> BadInput:
    def short(x: Tensor) -> None:
        guide(x)

    names = ("guide takes", "same arguments")
    return BadInput({"guide": short}, DataError, "guide", names, {"guide": guide})


@row(SITES, "a guide's class of Pyro")
def _() -> BadInput:
    names = ("class AutoNormal", r"AutoNormal\(model\)")
    mend = {"guide": AutoNormal(model)}
    return BadInput({"guide": AutoNormal}, GuideError, "AutoNormal", names, mend)


@row(SITES, "a guide's class of pvi")
def _() -> BadInput:
    return BadInput({"guide": pvi.guides.FullRank}, how="made for the model", pyro=False)


@row(SITES, "a guide of another model")
def _() -> BadInput:
    def other(x: Tensor, y: Tensor) -> None:
        pyro.sample("v", dist.Normal(0.0, 1.0))

    names = ("site 'w'", "guide does not sample it", "'v'")
    call = {"guide": AutoNormal(other)}
    return BadInput(call, GuideError, "w", names, {"guide": AutoNormal(model)})


@row(SITES, "the data in the guide's place")
def _() -> BadInput:
    names = ("guide must be a Pyro program", "tuple", "data=")
    call = {"guide": data(), "data": ()}
    return BadInput(call, GuideError, "guide", names, {"guide": None, "data": data()})


@row(SITES, "a guide's name")
def _() -> BadInput:
    names = ("guide must be a Pyro program", "str", r"pvi\.guides\.MeanField")
    return BadInput({"guide": "MeanField"}, GuideError, "guide", names, {"guide": None})


@row(SITES, "model and guide in each other's place")
def _() -> BadInput:
    names = ("no observed site", "guide observes 'y'", "other's place")
    call = {"model": guide, "guide": model}
    return BadInput(call, ModelError, "guide", names, {"model": model, "guide": guide})


@row(SUPPORT, "a Normal for a positive site")
def _() -> BadInput:
    def scale_model(x: Tensor, y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, sigma), obs=y)

    def normal_guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("sigma", dist.Normal(param("s_loc", 1.0), positive("s_scale", 0.1)))

    names = ("site 'sigma'", "Normal can leave the support", "HalfNormal", "MeanField")
    call = {"model": scale_model, "guide": normal_guide}
    return BadInput(call, GuideError, "sigma", names, {"guide": None})


@row(SUPPORT, "a Gamma for a fraction")
def _() -> BadInput:
    """Its first draws lie in the support; later ones would not."""

    def fraction(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    def gamma(y: Tensor) -> None:
        pyro.sample("p", dist.Gamma(positive("a", 50.0), 100.0))

    names = ("site 'p'", "Gamma can leave the support", "Beta")
    call = {"model": fraction, "guide": gamma, "data": (randn(20) > 0).double()}
    return BadInput(call, GuideError, "p", names, {"guide": None})


def _observed(
    name: str, likelihood: Callable, value: float, names: tuple[str, ...], least: float = 0.0
) -> None:
    """Enter an observation outside the support of its likelihood."""

    def counts(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", likelihood(w * x), obs=y)

    def make() -> BadInput:
        x, y = data()
        good, bad = (y > 0) + least, (y > 0) + least
        bad[7] = value
        call = {"model": counts, "data": (x, bad)}
        return BadInput(call, DataError, "y", names, {"data": (x, good)})

    row(SUPPORT, name)(make)


SEVENTH = ("site 'y'", "1 of 20", r"index \[7\]", "outside the support")
_observed("a negative count", lambda z: dist.Poisson(z.exp()), -2.0, (*SEVENTH, "Poisson"))
_observed("a fraction for a count", lambda z: dist.Poisson(z.exp()), 0.5, (*SEVENTH, "Poisson"))
_observed("2 for a Bernoulli", lambda z: dist.Bernoulli(logits=z), 2.0, (*SEVENTH, "Bernoulli"))
_observed(
    "a label beyond the classes",
    lambda z: dist.Categorical(logits=torch.stack([z, -z], -1)),
    2.0,
    (*SEVENTH, "Categorical"),
)
_observed("a negative duration", lambda z: dist.LogNormal(z, 1.0), -1.0, SEVENTH, 1.0)


@row(SUPPORT, "a discrete latent")
def _() -> BadInput:
    def mixture(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)

    names = ("site 'z'", "Bernoulli", "discrete", "sum it out")
    return BadInput({"model": mixture}, GuideError, "z", names, {"model": model})


class Counter:
    """A model that changes after so many calls, in one of several ways."""

    def __init__(self, calls: int, kind: str) -> None:
        self.left, self.kind = calls, kind

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.left -= 1
        late = self.left < 0
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        if self.kind == "latent" and late:
            w = w + pyro.sample("late", dist.Normal(0.0, 1.0))
        if self.kind == "gone" and not late:
            w = w + pyro.sample("early", dist.Normal(0.0, 1.0))
        if self.kind == "likelihood" and late:
            pyro.sample("late", dist.Normal(w, 1.0), obs=torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


FEW = 25  # model runs at the start of a fit, and some steps
STEPS = {"steps": 50, "objective": pvi.ELBO()}


@row(CHANGES, "a latent that appears during training")
def _() -> BadInput:
    names = (r"step \d+", "site 'late'", "not.* at the start", "must stay the same")
    call = {"model": Counter(FEW, "latent"), **STEPS}
    return BadInput(call, ModelError, "late", names, {"model": model})


@row(CHANGES, "a latent that vanishes during training")
def _() -> BadInput:
    names = (r"step \d+", "site 'early'", "at the start", "must stay the same")
    call = {"model": Counter(FEW, "gone"), **STEPS}
    return BadInput(call, ModelError, "early", names, {"model": model})


@row(CHANGES, "an observation that appears during training")
def _() -> BadInput:
    names = (r"step \d+", "site 'late'", "not.* at the start", "must stay the same")
    call = {"model": Counter(FEW, "likelihood"), **STEPS}
    return BadInput(call, ModelError, "late", names, {"model": model})


@row(CHANGES, "a site that comes and goes in model and guide")
def _() -> BadInput:
    calls = {"model": 0, "guide": 0}

    def come(role: str, program: Callable) -> Callable:
        def program_(x: Tensor, y: Tensor) -> None:
            calls[role] += 1
            if calls["guide"] % 7:
                pyro.sample("guest", dist.Normal(0.0, 1.0))
            program(x, y)

        return program_

    call = {"model": come("model", model), "guide": come("guide", guide), **STEPS}
    names = ("site 'guest'", "must stay the same")
    return BadInput(call, ModelError, "guest", names, {"model": model, "guide": guide})


@row(CHANGES, "a site that depends on Python's random")
def _() -> BadInput:
    dice = random.Random(0)

    def whimsical(x: Tensor, y: Tensor) -> None:
        model(x, y)
        if dice.random() < 0.5:
            pyro.sample("guest", dist.Normal(0.0, 1.0))

    names = ("site 'guest'",)
    call = {"model": whimsical, **STEPS}
    return BadInput(call, (ModelError, GuideError), "guest", names, {"model": model})


@row(CHANGES, "a plate whose size is random")
def _() -> BadInput:
    dice = random.Random(0)

    def whimsical(x: Tensor, y: Tensor) -> None:
        model(x, y)
        with pyro.plate("guests", dice.randint(1, 9)):
            pyro.sample("guest", dist.Normal(0.0, 1.0))

    call = {"model": whimsical, **STEPS}
    names = ("guest", "guests")
    return BadInput(call, (ModelError, GuideError), "guest", names, {"model": model})


@row(CHANGES, "a model that writes into its data")
def _() -> BadInput:
    def writer(x: Tensor, y: Tensor) -> None:
        y -= y.mean() + 1.0
        model(x, y)

    names = ("argument 'y'", "in place", r"y = y - ", "clone")
    return BadInput({"model": writer}, ModelError, "y", names, {"model": model})


@row(MODELS, "two sites of one name")
def _() -> BadInput:
    def twice(x: Tensor, y: Tensor) -> None:
        model(x, y)
        pyro.sample("w", dist.Normal(0.0, 1.0))

    names = ("two sites named 'w'", "own name")
    return BadInput({"model": twice, "guide": guide}, ModelError, "w", names, {"model": model})


@row(MODELS, "no observed site")
def _() -> BadInput:
    def prior(x: Tensor, y: Tensor) -> None:
        model(x)

    names = ("no observed site", r"obs=", "'w', 'y'")
    return BadInput({"model": prior}, ModelError, "obs", names, {"model": model})


@row(MODELS, "no latent site")
def _() -> BadInput:
    def fixed(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    return BadInput({"model": fixed}, ModelError, "latent", ("no latent site",), {"model": model})


@row(MODELS, "too few arguments")
def _() -> BadInput:
    def both(x: Tensor, y: Tensor) -> None:
        model(x, y)

    names = ("model takes", "1 positional argument", "'y'", "args=")
    call = {"model": both, "data": data()[:1]}
    return BadInput(call, DataError, "y", names, {"data": data()})


@row(MODELS, "no arguments at all")
def _() -> BadInput:
    names = ("model takes", "0 positional argument", "'x'", "data=")
    return BadInput({"data": ()}, DataError, "x", names, {"data": data()})


@row(MODELS, "an argument that the model lacks")
def _() -> BadInput:
    x, y = data()
    names = ("model takes", "'z'")
    call = {"data": {"x": x, "y": y, "z": y}}
    return BadInput(call, DataError, "z", names, {"data": {"x": x, "y": y}}, pyro=False)


@row(MODELS, "a model's class")
def _() -> BadInput:
    class Program(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> None:
            model(x, y)

    names = ("model is the class Program", r"Program\(\)")
    return BadInput({"model": Program}, ModelError, "Program", names, {"model": Program()})


@row(MODELS, "no program")
def _() -> BadInput:
    names = ("model must be a Pyro program", "Tensor")
    return BadInput({"model": data()[0]}, ModelError, "model", names, {"model": model})


@row(MODELS, "a model called by mistake")
def _() -> BadInput:
    """`pvi.fit(model(x, y), ...)` passes what it returns."""
    names = ("model must be a Pyro program", "None", "without calling")
    return BadInput({"model": None}, ModelError, "model", names, {"model": model})


class OwnError(ValueError):
    """An error whose making needs two arguments."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")


@row(MODELS, "a model that raises")
def _() -> BadInput:
    """The user's own error, with a note on what pvi was doing."""

    def broken(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        raise OwnError(7, "mine")

    names = (r"mine \(7\)", "in the model, after site 'w'", r"x: \(20,\)")
    return BadInput({"model": broken}, OwnError, "mine", names, {"model": model})


@row(MODELS, "a model that raises later")
def _() -> BadInput:
    left = [FEW]

    def broken(x: Tensor, y: Tensor) -> None:
        model(x, y)
        left[0] -= 1
        if left[0] < 0:
            raise OwnError(7, "mine")

    names = (r"mine \(7\)", r"after \d+ steps? of the fit", "in the model, after site 'y'")
    return BadInput({"model": broken, **STEPS}, OwnError, "mine", names, {"model": model})


@row(MODELS, "a guide that raises")
def _() -> BadInput:
    def broken(x: Tensor, y: Tensor) -> None:
        guide(x, y)
        raise KeyError("mine")

    names = ("mine", "in the guide, after site 'w'")
    return BadInput({"guide": broken}, KeyError, "mine", names, {"guide": guide})


@row(MODELS, "a plate is missing")
def _() -> BadInput:
    def bare(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    names = ("site 'y'", r"batch shape \(20,\)", "plates are none", "plate")
    return BadInput({"model": bare}, ModelError, "y", names, {"model": model})


@row(MODELS, "a plate of another size")
def _() -> BadInput:
    def short(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 19):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    names = ("site 'y'", "plate 'rows'", "19", "20")
    return BadInput({"model": short}, ModelError, "y", names, {"model": model})


@row(MODELS, "a plate of size 0")
def _() -> BadInput:
    def empty(x: Tensor, y: Tensor) -> None:
        with pyro.plate("groups", 0):
            pyro.sample("g", dist.Normal(0.0, 1.0))
        model(x, y)

    names = ("plate 'groups'", "size 0", "model")
    return BadInput({"model": empty}, ModelError, "groups", names, {"model": model})


@row(MODELS, "a plate inside itself")
def _() -> BadInput:
    def nested(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)), pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    return BadInput({"model": nested}, ModelError, "rows", ("rows",), {"model": model})


@row(MODELS, "constants on another device")
def _() -> BadInput:
    """`meta` stands for a GPU, so that it is the same everywhere."""

    def elsewhere(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            offset = torch.ones(len(x), device="meta")
            pyro.sample("y", dist.Normal(w * x + offset, 1.0), obs=y)

    names = ("in the model, after site 'w'", "device", "cpu", "meta", r"device=")
    return BadInput({"model": elsewhere}, ModelError, "device", names, {"model": model})


@row(MODELS, "a model that returns something, or nothing")
def _() -> BadInput:
    def returning(x: Tensor, y: Tensor) -> Tensor:
        model(x, y)
        return y

    return BadInput({"model": returning}, how="what it returns is not used")
