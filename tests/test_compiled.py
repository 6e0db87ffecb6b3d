"""Fits by captured graphs are the fits of the programs: same random stream, same numbers."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

import pvi
from pvi.compiled.capture import RUNS
from pvi.fit.blocks import Blocks
from pvi.fit.choice import choose
from pvi.guides import Flow, FullRank, LowRank, MeanField, Structured

pytestmark = pytest.mark.skipif(not RUNS, reason="this torch can't capture")

COMPILERS = [x for x in (os.environ.get("CXX", ""), "g++", "clang++") if shutil.which(x)]
N, D, G = 60, 3, 5
STEPS = 12


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(N, D)
        return x, (x.sum(-1) + torch.randn(N) > 0).float()


X, Y = rows()
GROUP = torch.arange(N) % G


def hierarchical(x: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("groups", G):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("rows", len(x)):
        logits = (x @ w.unsqueeze(-1)).squeeze(-1) + a[..., GROUP[: len(x)]]
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def local(x: Tensor, y: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample(
            "x",
            dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], D), 1.0).to_event(1),
            obs=x,
        )


def mixture(x: Tensor, y: Tensor) -> None:
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("parts", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x[:, 0])


def correlated(x: Tensor, y: Tensor) -> None:
    lower = pyro.sample("lower", dist.LKJCholesky(D, 2.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0).expand([D]).to_event(1))
    with pyro.plate("rows", len(x)):
        tril = scale.unsqueeze(-1) * lower
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(D), scale_tril=tril), obs=x)


def missing(x: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    holed = x[:, 0].sqrt()  # NaN where x < 0
    with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=x[:, 0] >= 0):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=holed)


def counts(x: Tensor, y: Tensor) -> None:
    """Torch's Multinomial writes through a mask."""
    w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        n = 3.0 * nn.functional.one_hot(x.argmax(-1), D)
        pyro.sample("n", dist.Multinomial(3, logits=w.unsqueeze(-2) * x), obs=n)


class Network(nn.Module):
    """A VAE with BatchNorm and dropout, as model and guide."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(D, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
        )
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, D))

    def model(self, x: Tensor, y: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def by_hand(x: Tensor, y: Tensor) -> None:
    loc = pyro.param("w_loc", torch.zeros(D))
    scale = pyro.param("w_scale", torch.full((D,), 0.3), constraint=dist.constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(w.unsqueeze(-2) * x).sum(-1)), obs=y)


def fitted(way: Any, model: Any, guide: Any, objective: Any, **options: Any) -> pvi.Fit:
    if callable(model) and isinstance(model, type):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            module = model()
        model, guide = module.model, module.guide
    with torch.random.fork_rng():
        torch.manual_seed(2)
        guide = guide(model) if guide in (AutoNormal, AutoMultivariateNormal) else guide
    where = {"data": (X, Y)} if "data" in options else {"args": (X, Y)}
    known = {"optimizer": "adam", "steps": STEPS, "seed": 0, "progress": False}
    return pvi.fit(model, guide, objective=objective, compile=way, **where | known | options)


CASES: dict[str, tuple] = {
    "ELBO": (hierarchical, MeanField, pvi.ELBO(4)),
    "exact KL": (hierarchical, MeanField, pvi.TraceMeanFieldELBO()),
    "IWAE": (hierarchical, FullRank, pvi.IWAE(4)),
    "Renyi": (hierarchical, MeanField, pvi.RenyiELBO(0.5, 4)),
    "path": (hierarchical, MeanField, pvi.ELBO(4, gradient="path")),
    "path, IWAE by datum": (local, MeanField, pvi.IWAE(3, gradient="path")),
    "beta": (local, MeanField, pvi.BetaELBO(pvi.schedules.linear(STEPS))),
    "free bits": (local, MeanField, pvi.ELBO(kl="exact", weighting=pvi.FreeBits(0.1))),
    "score": (regression, by_hand, pvi.ELBO(4, gradient="score")),
    "low rank": (hierarchical, LowRank, None),
    "structured": (hierarchical, Structured, None),
    "flow": (hierarchical, Flow, None),
    "AutoNormal": (hierarchical, AutoNormal, pvi.ELBO()),
    "AutoMultivariateNormal": (hierarchical, AutoMultivariateNormal, pvi.ELBO()),
    "by hand": (regression, by_hand, None),
    "mixture": (mixture, MeanField, pvi.ELBO()),
    "LKJ": (correlated, FullRank, pvi.ELBO()),
    "counts": (counts, MeanField, pvi.ELBO()),
    "missing": (missing, MeanField, pvi.ELBO(2)),
    "network": (Network, None, pvi.ELBO()),
    "network, path": (Network, None, pvi.ELBO(gradient="path")),
}


def assert_same(one: pvi.Fit, other: pvi.Fit) -> None:
    for name in ("bound", "loss", "grad_norm"):
        np.testing.assert_allclose(one.history[name], other.history[name], rtol=2e-4, atol=2e-3)
    ours, theirs = (f.posterior.params.tensors() for f in (one, other))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_graph_takes_the_steps_of_its_program(case: str) -> None:
    eager, compiled = (fitted(way, *CASES[case]) for way in (False, "graph"))
    assert compiled.notes == ("compiled from step 3 on (graph)",)
    assert_same(eager, compiled)


OPTIONS: dict[str, dict[str, Any]] = {
    "minibatches": {"batch_size": 16},
    "accumulated": {"batch_size": 16, "accumulate": 2, "clip_norm": 1.0},
    "clipped": {"clip_norm": 0.5},
    "a callback": {"callbacks": [lambda step: None]},
    "validated": {"batch_size": 20, "validation_data": rows(1), "validate_every": 7},
    "patience": {"validation_data": rows(1), "validate_every": 5, "patience": 2},
    "stages": {"steps": None, "batch_size": 20},
    "rates": {"lr": {"guide:*loc*": 0.1, "guide:*": 0.02}},
    "own optimizer": {"optimizer": lambda ps: torch.optim.SGD(ps, 1e-3)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_the_same(name: str) -> None:
    options = {"steps": 120, "data": (X, Y), **OPTIONS[name]}
    objective = pvi.BetaELBO(pvi.schedules.linear(50), num_particles=2)
    fits = [fitted(way, regression, MeanField, objective, **options) for way in (False, "graph")]
    assert fits[1].notes == ("compiled from step 3 on (graph)", *fits[0].notes)
    assert_same(*fits)
    assert fits[0].history.keys() == fits[1].history.keys()
    np.testing.assert_array_equal(fits[0].history["lr"], fits[1].history["lr"])
    assert (fits[0].converged, fits[0].reason) == (fits[1].converged, fits[1].reason)


@pytest.mark.skipif(not COMPILERS, reason="there is no C++ compiler")
@pytest.mark.parametrize("case", ["exact KL", "network"])
def test_inductor(case: str) -> None:
    eager, compiled = (fitted(way, *CASES[case], steps=70) for way in (False, True))
    assert compiled.notes == ("compiled from step 3 on (inductor)",)
    assert_same(eager, compiled)


def test_without_a_compiler_a_graph_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        def run(*inputs: Any) -> Any:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

        return run

    monkeypatch.setattr(torch, "compile", fail)
    eager, compiled = (fitted(way, *CASES["exact KL"]) for way in (False, True))
    first, second = compiled.notes
    assert "run as a graph: torch.compile fails (RuntimeError: InvalidCxxCompiler: No work" in first
    assert second == "compiled from step 3 on (graph)"
    assert_same(eager, compiled)


def test_batches_of_another_shape() -> None:
    items = torch.utils.data.TensorDataset(X, Y)

    def loader() -> Any:
        return torch.utils.data.DataLoader(items, batch_size=25, shuffle=True)

    options = {"args": (), "steps": 20}
    fits = [
        fitted(way, regression, MeanField, pvi.ELBO(), data=loader(), **options)
        for way in (False, "graph")
    ]
    assert_same(*fits)


def test_double_precision() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        data = {"args": (X.double(), Y.double()), "steps": 40}
        fits = [fitted(way, regression, MeanField, pvi.ELBO(), **data) for way in (False, "graph")]
    finally:
        torch.set_default_dtype(before)
    ours, theirs = (f.posterior.params.tensors() for f in fits)
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-10, atol=1e-12)


def steep(x: Tensor, y: Tensor) -> None:
    """Overflows once w has moved."""
    w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        rate = torch.exp(400.0 * (x * w.unsqueeze(-2)).sum(-1).abs() - 380.0)
        pyro.sample("y", dist.Poisson(rate + 1.0), obs=10.0 * y)


def test_faults_are_found_and_mended_as_in_the_programs() -> None:
    def outcome(way: Any) -> tuple:
        try:
            fit = fitted(way, steep, MeanField, pvi.ELBO(), steps=150, lr=0.3)
            notes = fit.notes
        except pvi.errors.FitError as error:
            fit, notes = error.fit, (*error.fit.notes, str(error))
        return [n for n in notes if "compiled" not in n], fit

    (ours, eager), (theirs, compiled) = map(outcome, (False, "graph"))
    assert ours
    assert ours == theirs
    assert_same(eager, compiled)


@pytest.mark.parametrize("data", [{"args": (X, Y)}, {"data": (X, Y), "batch_size": 20}])
def test_a_resumed_fit_is_the_uninterrupted_one(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(where: str) -> pvi.Fit:
        options = {"steps": 130, "checkpoint": tmp_path / where, "every": 25, **data}
        return fitted("graph", regression, MeanField, pvi.ELBO(), **options)

    whole = run("whole")
    take = Blocks.take

    def interrupted(self: Blocks, batches: Any) -> bool:
        if self._training.step >= 70:
            raise KeyboardInterrupt
        return take(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "take", interrupted)
        assert len(run("cut").history) < 130
    resumed = run("cut")
    assert len(resumed.history) == 130
    for name, x in whole.posterior.params.tensors().items():
        assert torch.equal(x, resumed.posterior.params.tensors()[name]), name


def test_auto_captures_where_many_steps_are_to_come() -> None:
    cases = [fitted("auto", regression, MeanField, pvi.ELBO(), steps=n).notes for n in (300, 4200)]
    assert cases == [(), ("compiled from step 65 on (graph)",)]


def test_what_auto_chooses() -> None:
    def ways(limit: int | None, small: bool = True) -> list[str]:
        steps = (63, 64, 511, 512, 4096, 16384)
        return [choose(step, limit, small=small) for step in steps]

    assert ways(4000) == [""] * 6
    assert ways(5000) == ["", *["graph"] * 5]
    assert ways(9000) == ["", *["inductor"] * 5]
    assert ways(9000, small=False) == [""] * 6
    assert ways(40000, small=False) == ["", *["inductor"] * 5]
    assert ways(None) == ["", "", "", "graph", "inductor", "inductor"]
    assert ways(None, small=False) == ["", "", "", "", "", "inductor"]


def test_gradients_have_memory_of_their_own() -> None:
    """The derivative of `(p + q) * x` by `p` is `x` itself, and clipping writes to gradients."""

    def model(x: Tensor, y: Tensor) -> None:
        p, q = (pyro.param(name, torch.ones(N, D)) for name in "pq")
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y[0])
        pvi.penalty("pull", ((p + q) * x).sum())

    before = X.clone()
    fits = [fitted(way, model, MeanField, pvi.ELBO(), clip_norm=0.1) for way in (False, "graph")]
    assert_same(*fits)
    assert torch.equal(X, before)


def test_losses_of_loops_of_ones_own() -> None:
    found = []
    for compiled in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        module: Any = pvi.ELBO(4)(regression, by_hand)
        module(X, Y)
        module = pvi.compile(module, backend="graph") if compiled else module
        leaves = [x for _, x in pyro.get_param_store().named_parameters()]
        optimizer = torch.optim.Adam(leaves, 0.05)
        losses = []
        for i in range(20):
            optimizer.zero_grad()
            loss = module(X[i : i + 30], Y[i : i + 30])
            (2.0 * loss).backward()
            optimizer.step()
            losses.append(loss.item())
        found.append((losses, [x.detach().clone() for x in leaves]))
        if compiled:
            assert module.reason == ""
            assert len(module._made) == 1
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
    pyro.clear_param_store()


class Switch:
    """A model whose prior a callback changes."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, self.scale))
        pyro.sample("x", dist.Normal(mu, 1.0).expand([N]).to_event(1), obs=x[:, 0])


def test_a_change_that_comes_later_is_found() -> None:
    model = Switch()

    def widen(step: Any) -> None:
        model.scale = 9.0 if step.step >= 20 else 1.0

    options: dict[str, Any] = {"optimizer": "adam", "steps": 40, "seed": 0, "progress": False}
    fit = pvi.fit(
        model, args=(X, Y), objective=pvi.ELBO(), callbacks=[widen], compile="graph", **options
    )
    late = "no longer compiled from step 21 on: 'scale' in the programs changes from step to step"
    assert fit.notes[-1] == late


@pytest.mark.parametrize("replaced", [True, False])
def test_a_tensor_that_a_callback_changes(replaced: bool) -> None:
    held = {"scale": torch.tensor(1.0)}

    def model(x: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, held["scale"]))
        pyro.sample("x", dist.Normal(mu, 1.0).expand([N]).to_event(1), obs=x[:, 0])

    def widen(step: Any) -> None:
        if step.step == 20:
            if replaced:
                held["scale"] = torch.tensor(9.0)
            else:
                held["scale"].fill_(9.0)

    fits = []
    for way in (False, "graph"):
        held["scale"] = torch.tensor(1.0)
        options = {"callbacks": [widen], "steps": 40}
        fits.append(fitted(way, model, MeanField, pvi.ELBO(), **options))
    assert "no longer compiled from step 21 on: 'held.scale'" in fits[1].notes[-1]
    assert_same(*fits)


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.count += 1
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0 + self.count / 1000))
        pyro.sample("x", dist.Normal(mu, 1.0).expand([N]).to_event(1), obs=x[:, 0])


def reads_a_draw(x: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    if mu.item() > -100:
        pyro.sample("x", dist.Normal(mu, 1.0).expand([N]).to_event(1), obs=x[:, 0])


def reads_a_parameter(x: Tensor, y: Tensor) -> None:
    p = pyro.param("p", torch.tensor(0.5))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 1.0 + abs(p.detach().tolist())
    pyro.sample("x", dist.Normal(mu + p, scale).expand([N]).to_event(1), obs=x[:, 0])


def draws_in_numpy(x: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    shift = float(np.random.default_rng().normal())
    pyro.sample("x", dist.Normal(mu + shift, 1.0).expand([N]).to_event(1), obs=x[:, 0])


REFUSED = {
    "counter": (Counter(), "'count' in the programs changes from step to step"),
    "item": (reads_a_draw, r"looks at the value of a tensor .* line \d+ of test_compiled.py"),
    "tolist": (reads_a_parameter, "changes from step to step|looks at the value"),
    "numpy": (draws_in_numpy, "computed in Python changes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_would_get_wrong_is_run_as_it_is(case: str) -> None:
    model, line = REFUSED[case]
    fit = fitted("graph", model, MeanField, pvi.ELBO())
    assert len(fit.history) == STEPS
    with pytest.raises(AssertionError, match=line):
        raise AssertionError("; ".join(fit.notes))


def test_unknown_ways_are_refused() -> None:
    with pytest.raises(pvi.errors.FitError, match="compile must be"):
        fitted("fast", *CASES["ELBO"])
