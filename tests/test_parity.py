"""pvi's objectives equal Pyro's, draw by draw, on models where Pyro is right."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

import pvi
from tests.scenarios import CASES, ELBO_ONLY, Case, randn

pytestmark = pytest.mark.usefixtures("isolated")

TOLERANCE = 1e-10
RUNS = {"one": (1, False), "batched": (4, True), "looped": (4, False)}


def _renyi(alpha: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (
        lambda **options: pvi.RenyiELBO(alpha, **options),
        lambda **options: RenyiELBO(alpha=alpha, **options),
    )


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "elbo": (pvi.ELBO, Trace_ELBO),
    "mean field": (pvi.TraceMeanFieldELBO, TraceMeanField_ELBO),
    "iwae": _renyi(0.0),
    "renyi 0.5": _renyi(0.5),
    "renyi -1": _renyi(-1.0),
}
COMBINATIONS = [
    (pair, name)
    for pair in PAIRS
    for name in CASES
    if pair in ("elbo", "mean field") or name not in ELBO_ONLY
    # Pyro's closed form drops the log density of a Delta, which is the guide's Jacobian
    if (pair, name) != ("mean field", "AutoMultivariateNormal")
]


def make(name: str) -> Case:
    """A case with all its parameters in the store."""
    case = CASES[name]()
    case.guide(*case.args)
    case.model(*case.args)
    return case


def objectives(pair: str, run: str, case: Case) -> tuple[Any, Any]:
    """The same objective of pvi and of Pyro."""
    ours, theirs = PAIRS[pair]
    num_particles, batched = RUNS[run]
    options = {"num_particles": num_particles, "vectorize_particles": batched}
    return ours(**options), theirs(**options, max_plate_nesting=case.nesting)


def leaves() -> dict[str, Tensor]:
    """The unconstrained parameters in the store."""
    return {n: p.unconstrained() for n, p in pyro.get_param_store().items()}


def value_and_gradients(objective: Any, case: Case) -> tuple[float, dict[str, Tensor]]:
    for leaf in leaves().values():
        leaf.grad = None
    torch.manual_seed(1)
    value = float(objective.loss_and_grads(case.model, case.guide, *case.args))
    return value, {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves().items()
    }


def check_parity(ours: Any, theirs: Any, case: Case) -> None:
    """Values and gradients agree, and no parameter is left without a gradient."""
    value, gradients = value_and_gradients(ours, case)
    expected, expected_gradients = value_and_gradients(theirs, case)
    assert value == pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE)
    torch.testing.assert_close(gradients, expected_gradients, atol=TOLERANCE, rtol=TOLERANCE)
    assert all(float(g.abs().max()) > 1e-6 for g in gradients.values())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("pair", "name"), COMBINATIONS)
def test_value_and_gradients(pair: str, name: str, run: str) -> None:
    case = make(name)
    check_parity(*objectives(pair, run, case), case)


@pytest.mark.parametrize("run", ["batched", "looped"])
@pytest.mark.parametrize("pair", PAIRS)
def test_loss_without_gradients(pair: str, run: str) -> None:
    case = make("local latents")
    values = []
    for objective in objectives(pair, run, case):
        torch.manual_seed(3)
        values.append(objective.loss(case.model, case.guide, *case.args))
    assert isinstance(values[0], float)
    assert values[0] == pytest.approx(values[1], abs=TOLERANCE)


@pytest.mark.parametrize("run", RUNS)
def test_bound_is_minus_the_loss(run: str) -> None:
    case = make("hierarchical")
    objective, _ = objectives("elbo", run, case)
    torch.manual_seed(3)
    bound = objective.bound(case.model, case.guide, *case.args)
    torch.manual_seed(3)
    assert bound == -objective.loss(case.model, case.guide, *case.args)


def test_the_check_has_teeth() -> None:
    """A gradient of zero, or a wrong value, fails the comparison."""

    class Mutant:
        def __init__(self, shift: float, factor: float):
            self.shift, self.factor = shift, factor

        def loss_and_grads(self, *args: Any) -> float:
            loss = pvi.ELBO(4).differentiable_loss(*args)
            (self.factor * loss).backward()
            return float(loss.detach()) + self.shift

    case = make("local latents")
    theirs = objectives("elbo", "batched", case)[1]
    check_parity(Mutant(0.0, 1.0), theirs, case)
    for mutant in (Mutant(1e-8, 1.0), Mutant(0.0, 0.0), Mutant(0.0, 1.0 + 1e-8)):
        with pytest.raises(AssertionError):
            check_parity(mutant, theirs, case)


@pytest.mark.parametrize("name", ["regression", "subsampled", "AutoNormal", "networks"])
@pytest.mark.parametrize("pair", ["elbo", "mean field"])
def test_svi_step_by_step(pair: str, name: str) -> None:
    """As `loss=` of SVI every step equals Pyro's."""
    losses, ends = [], []
    for which in (0, 1):
        pyro.clear_param_store()
        case = make(name)
        start = {n: p.detach().clone() for n, p in leaves().items()}
        objective = objectives(pair, "one", case)[which]
        svi = SVI(case.model, case.guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
        torch.manual_seed(5)
        losses.append([svi.step(*case.args) for _ in range(20)])
        ends.append({n: p.detach().clone() for n, p in leaves().items()})
        assert all(not torch.equal(start[n], end) for n, end in ends[-1].items())
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE, rel=TOLERANCE)
    torch.testing.assert_close(ends[0], ends[1], atol=TOLERANCE, rtol=TOLERANCE)


def test_svi_creates_parameters_that_do_not_exist_yet() -> None:
    """A step from an empty store trains the parameters, also if the plan comes first."""
    for objective in (pvi.ELBO(), pvi.IWAE(3)):
        pyro.clear_param_store()
        case = CASES["local latents"]()
        svi = SVI(case.model, case.guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
        svi.step(*case.args)
        first = {n: p.detach().clone() for n, p in leaves().items()}
        svi.step(*case.args)
        assert sorted(first) == ["loc", "scale"]
        assert all(not torch.equal(first[n], p) for n, p in leaves().items())


@pytest.mark.parametrize("pair", ["elbo", "mean field"])
def test_module(pair: str) -> None:
    """`objective(model, guide)` is a module with a differentiable loss, as in Pyro."""
    case = make("AutoNormal")
    values, gradients = [], []
    for objective in objectives(pair, "batched", case):
        module = objective(case.model, case.guide)
        assert isinstance(module, torch.nn.Module)
        parameters = dict(module.named_parameters())
        assert len(parameters) == 4
        for leaf in parameters.values():
            leaf.grad = None
        torch.manual_seed(3)
        loss = module(*case.args)
        loss.backward()
        values.append(float(loss.detach()))
        gradients.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
    assert values[0] == pytest.approx(values[1], abs=TOLERANCE)
    assert len(gradients[0]) == 4
    torch.testing.assert_close(gradients[0], gradients[1], atol=TOLERANCE, rtol=TOLERANCE)


def test_plan_leaves_the_random_state_alone() -> None:
    """The look at the programs before the first K > 1 evaluation draws no numbers of the caller."""
    case = make("local latents")
    objective = pvi.IWAE(4)
    values = []
    for _ in range(2):
        torch.manual_seed(7)
        values.append(objective.loss(case.model, case.guide, *case.args))
    assert values[0] == values[1]


def test_wrong_parity_model_is_noticed() -> None:
    """Other data give another value: the seeds alone do not make the numbers agree."""
    case = make("local latents")
    other = Case(case.model, case.guide, (randn(6, seed=9),), case.nesting)
    value, _ = value_and_gradients(pvi.ELBO(), case)
    assert value != pytest.approx(value_and_gradients(Trace_ELBO(), other)[0], abs=1e-3)
