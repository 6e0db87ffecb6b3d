"""Hierarchies of latents: a linear Gaussian one, whose evidence and posterior are known."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import pvi
from pvi.errors import DataError, ModelError, ObjectiveError
from pvi.models.vae import Gaussian, HierarchicalVAE, LadderVAE, Vamp
from pvi.models.vae.posteriors import FLOOR
from pvi.nn import MLP
from tests.scenarios import EXACT, randn

pytestmark = pytest.mark.usefixtures("isolated")
A, B, S1 = 0.8, 0.3, 0.6  # z_1 ~ N(A z_2 + B, S1^2), each of two numbers
W, C, SX = 1.2, -0.4, 0.5  # x ~ N(W z_1 + C, SX^2)
T2 = W**2 * S1**2 + SX**2  # variance of x given z_2
V1 = 1 / (W**2 / SX**2 + 1 / S1**2)  # of z_1 given z_2 and x
V2 = 1 / (1 + W**2 * A**2 / T2)  # of z_2 given x
KINDS = ["precision", "residual", "bottom-up"]
N = 40


def linear(weights: list[float], loc: float, scale: float | None = None) -> nn.Linear:
    """Of inputs side by side, each times a number; with the raw number of a scale."""
    eye, zero = torch.eye(2), torch.zeros(2, 2)
    layer = nn.Linear(2 * len(weights), 2 if scale is None else 4)
    top = torch.cat([w * eye for w in weights], 1)
    bias = torch.full((2,), loc)
    if scale is not None:
        raw = math.log(math.expm1(scale - FLOOR))
        top = torch.cat([top, torch.cat([zero] * len(weights), 1)])
        bias = torch.cat([bias, torch.full((2,), raw)])
    layer.weight.data, layer.bias.data = top, bias
    return layer


class Joined(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        return self.network(torch.cat([x.expand(*batch, x.shape[-1]) for x in inputs], -1))


def made(kind: str, shift: float = 0.0, wide: float = 1.0) -> Any:
    """Guides that are exact, but for a shift and a factor of the sd of z_2."""
    model = {
        "likelihood": Gaussian(SX),
        "priors": [linear([A], B, S1)],
        "decoder": linear([W], C),
    }
    if kind == "bottom-up":
        v = 1 / (W**2 / SX**2 + 1 / (A**2 + S1**2))
        first = linear([v * W / SX**2], v * (B / (A**2 + S1**2) - W * C / SX**2), v**0.5)
        u = 1 / (1 + A**2 / S1**2)
        second = linear([u * A / S1**2], -u * A * B / S1**2 + shift, wide * u**0.5)
        return HierarchicalVAE(2, (2, 2), encoders=[first, second], **model)
    g = V2 * W * A / T2
    top = linear([g], -g * (W * B + C) + shift, wide * V2**0.5)
    if kind == "precision":
        head: nn.Module = linear([1 / W], -C / W, SX / W)
    else:  # in units of S1, from the prior's mean A z_2 + B
        k = V1 * W / SX**2 / S1
        head = Joined(linear([k, -k * W * A], -k * (C + W * B), V1**0.5 / S1))
    encoders = [nn.Identity(), nn.Identity()]
    return LadderVAE(2, (2, 2), encoders=encoders, heads=[head, top], merge=kind, **model)


def data(n: int = N) -> Tensor:
    return 1.5 * randn(n, 2).double() + 0.3


def evidence(x: Tensor) -> Tensor:
    sd = math.sqrt(W**2 * (A**2 + S1**2) + SX**2)
    return Normal(W * B + C, sd).log_prob(x).sum(-1)


def mean_se(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def bounds(objective: pvi.Objective, model: Any, x: Tensor, calls: int = 60) -> tuple[float, float]:
    torch.manual_seed(0)
    found = [float(objective.bound(model.model, model.guide, x)) for _ in range(calls)]
    return mean_se(torch.tensor(found))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_exact_guides_give_the_evidence(kind: str) -> None:
    """Every weight is the evidence, so are ELBO, IWAE and `score_samples`, with any particles."""
    model, x = made(kind), data()
    log_z = float(evidence(x).sum())
    for objective in (pvi.ELBO(1), pvi.ELBO(7), pvi.IWAE(5)):
        value = float(objective.bound(model.model, model.guide, x))
        assert abs(value - log_z) < 1e3 * EXACT, (kind, objective)
    found = model.score_samples(x, num_samples=10, seed=0)
    assert torch.allclose(found.log_evidence, evidence(x), atol=1e2 * EXACT)
    mean, se = bounds(pvi.TraceMeanFieldELBO(50), model, x)
    assert se > 0 and abs(mean - log_z) < 4 * se


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_other_guides_stay_below(kind: str) -> None:
    """The gap of a shifted z_2 is its KL to the posterior; both ELBOs agree; weights mend it."""
    shift, wide = 0.4, 0.8
    model, x = made(kind, shift, wide), data()
    v = 1 / (1 + A**2 / S1**2) if kind == "bottom-up" else V2
    gap = 2 * N * ((wide**2 + shift**2 / v - 1) / 2 - math.log(wide))
    log_z = float(evidence(x).sum())
    trace, exact = (bounds(o, model, x) for o in (pvi.ELBO(50), pvi.TraceMeanFieldELBO(50)))
    for mean, se in (trace, exact):
        assert abs(mean - (log_z - gap)) < 4 * se < gap / 4
    found = model.score_samples(x, num_samples=4000, seed=0)
    z = (found.log_evidence - evidence(x)) / found.se
    assert float(z.abs().max()) < 4.5 and float(found.log_evidence.sum()) > log_z - gap / 4
    tighter = bounds(pvi.IWAE(50), model, x)[0]
    assert exact[0] < tighter < log_z


@torch.no_grad()
def test_exact_where_it_is_right() -> None:
    """The KL of every layer top-down; that of the top only, bottom-up."""
    x = data()
    for kind in KINDS:
        model = made(kind)
        lines = str(pvi.TraceMeanFieldELBO().explain(model.model, model.guide, x)).splitlines()
        how = {line.split()[0]: "sample" not in line for line in lines if line.startswith("z_")}
        assert how == {"z_2": True, "z_1": kind != "bottom-up"}


def test_kl_of_each_layer() -> None:
    """What a fit reports, at a rate of nothing, beside the expectation by hand."""
    shift, wide = 0.4, 0.8
    x = data()
    g = V2 * W * A / T2
    m2, v2 = g * (x - W * B - C) + shift, wide**2 * V2
    kl_2 = ((v2 + m2**2 - 1 - math.log(v2)) / 2).sum()
    k = V1 * W / SX**2  # how much z_1 follows what z_2 does not explain
    square = k**2 * ((x - C - W * (A * m2 + B)) ** 2 + W**2 * A**2 * v2)
    kl_1 = ((V1 + square) / S1**2 - 1 - math.log(V1 / S1**2)).sum() / 2
    for kind in KINDS[:2]:
        model = made(kind, shift, wide)
        history = model.fit(x, steps=200, lr=1e-14, batch_size=N, seed=0).fit_.history
        assert torch.tensor(history["kl/z_2"]).sub(kl_2).abs().max() < 1e-8
        mean, se = mean_se(torch.tensor(history["kl/z_1"]))
        assert 0 < abs(mean - kl_1) < 4 * se < 0.05 * kl_1
        batches = model.fit(x, epochs=50, lr=1e-14, batch_size=10, seed=0).fit_.history
        assert abs(float(batches["kl/z_2"].mean()) - kl_2) < 1e-8 * kl_2  # every row as often
        mean, se = mean_se(torch.tensor(batches["kl/z_1"]))
        assert abs(mean - kl_1) < 4 * se


def test_free_bits() -> None:
    """Top-down each layer can have them; bottom-up only the top, and the error says so."""
    free = pvi.TraceMeanFieldELBO(weighting=pvi.FreeBits(50.0))
    ladder = made("precision").fit(data(), objective=free, steps=3, lr=1e-14, batch_size=N, seed=0)
    history = ladder.fit_.history
    paid = history["loss"] + history["log_likelihood"]
    assert torch.allclose(torch.tensor(paid), torch.tensor(2 * N * 50.0))
    with pytest.raises(ObjectiveError, match="z_1"):
        made("bottom-up").fit(data(), objective=free, steps=3, seed=0)
    named = pvi.TraceMeanFieldELBO(weighting=pvi.FreeBits(50.0, sites=["z_2"]))
    made("bottom-up").fit(data(), objective=named, steps=3, seed=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_from_each_level(kind: str) -> None:
    model, x = made(kind), data()
    z = data(3)
    assert torch.allclose(model.decode(z), W * z + C)
    assert torch.allclose(model.decode(z, level=2), W * (A * z + B) + C)
    drawn = model.decode(z[:1].expand(4000, 2), level=2, draw=True, seed=0)
    mean, sd = W * (A * z[0] + B) + C, W * S1
    assert (drawn.mean(0) - mean).abs().max() < 4 * sd / math.sqrt(4000)
    assert abs(float((drawn - mean).std()) / sd - 1) < 4 / math.sqrt(2 * 8000)
    top = V2 * W * A / T2 * (x - W * B - C)  # E[z_2 | x], linear all the way
    low = A * top + B + V1 * W / SX**2 * (x - C - W * (A * top + B))
    assert torch.allclose(model.encode(x, level=2), top)
    assert torch.allclose(model.encode(x), low)
    assert torch.allclose(model.reconstruct(x, level=2), W * (A * top + B) + C)
    new = model.sample(4000, seed=0)
    sd = math.sqrt(W**2 * (A**2 + S1**2) + SX**2)
    assert (new.mean(0) - W * B - C).abs().max() < 4 * sd / math.sqrt(4000)
    assert abs(float(new.std()) / sd - 1) < 4 / math.sqrt(2 * 8000)
    with pytest.raises(DataError, match="level"):
        model.decode(z, level=3)
    with pytest.raises(DataError, match="z_2 must"):
        model.decode(torch.zeros(3, 5), level=2)


SMALL: dict[str, Any] = {"likelihood": Gaussian(0.5), "hidden": (8,)}
MADE = {
    "ladder": lambda: LadderVAE(4, (3, 2, 1), features=6, **SMALL),
    "residual": lambda: LadderVAE(4, (3, 2), features=6, merge="residual", **SMALL),
    "vamp": lambda: LadderVAE(4, (3, 2), features=6, prior=Vamp(4, 5), **SMALL),
    "bottom-up": lambda: HierarchicalVAE(4, (3, 2), **SMALL),
    "bottom-up vamp": lambda: HierarchicalVAE(4, (3, 2), prior=Vamp(4, 5), **SMALL),
}


@pytest.mark.parametrize("name", MADE)
def test_train_save_load(name: str, tmp_path: Path) -> None:
    """Default networks: a fit gains, by ELBO and IWAE; a saved model is the same one."""
    x = torch.cat([randn(64, 2).double() + 2] * 2, 1)
    model = MADE[name]()
    history = model.fit(x, epochs=30, batch_size=32, lr=0.01, seed=0).fit_.history
    assert history["bound"][-4:].mean() > history["bound"][:4].mean() + 64
    model.fit(x, objective=pvi.IWAE(5), epochs=2, batch_size=32, seed=0)
    model.save(tmp_path / "model")
    again = type(model).load(tmp_path / "model")
    assert torch.equal(again.encode(x), model.encode(x))
    assert torch.equal(again.sample(3, seed=1), model.sample(3, seed=1))


def test_upper_layers_that_collapse() -> None:
    """`pvi.latents` tells that z_2 does nothing, while z_1 does."""
    for kind in ("precision", "bottom-up"):
        model = made(kind)
        unused = linear([0.0], 0.0, 1.0)
        (model.heads if kind == "precision" else model.encoders)[1] = unused
        model.fit(data(200), steps=2, lr=1e-14, batch_size=200, seed=0)
        found = pvi.latents(model.fit_, seed=0)
        assert any("collapsed" in text for text in found["z_2"].findings)
        assert not any("collapsed" in text for text in found["z_1"].findings)
        live = made(kind).fit(data(200), steps=2, lr=1e-14, batch_size=200, seed=0)
        assert not any("collapsed" in t for t in pvi.latents(live.fit_, seed=0)["z_2"].findings)


def test_refused() -> None:
    with pytest.raises(ModelError, match="merge"):
        LadderVAE(4, merge="sum")
    with pytest.raises(ModelError, match="at least one"):
        LadderVAE(4, ())
    with pytest.raises(ModelError, match="priors must be 1 networks"):
        HierarchicalVAE(4, (3, 2), priors=[MLP(2, 6), MLP(2, 6)])
