"""Every bound with every gradient in every situation: values, gradients, bounds and refusals.

Values and gradients are compared in the mean with closed forms, or with 100,000 draws, away from
the posterior. Each comparison also shows that a zero or halved gradient, or the value of another
bound, would have failed it. One way of running particles is checked so; the other must agree with
it to the last digits on the same draws.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor

import pvi
from docs import generate_estimators
from tests.conjugate import CELLS, REFUSED, Cell, reference
from tests.scenarios import EXACT, mean_se
from tests.situations import NUM
from tests.tape import Recorder, Tape, at_random

pytestmark = pytest.mark.usefixtures("isolated")

COMPARED = [c for c in CELLS if c.gradient != "auto" and c.status not in REFUSED]
COMPARISONS = 8 * len(COMPARED)  # at most: two values and six parameters
FALSE_ALARMS = 0.01  # probability of any in all comparisons together, if all is right


@dataclass(frozen=True)
class Found:
    """Means over evaluations and their standard errors, of one copy."""

    loss: tuple[Tensor, Tensor]
    bound: tuple[Tensor, Tensor]
    gradient: tuple[Tensor, Tensor]
    times: int

    def tolerance(self, se: Tensor, reference_se: Any) -> Tensor:
        """Beyond it a difference is no accident; also for standard errors of few evaluations."""
        z = student.isf(FALSE_ALARMS / (2 * COMPARISONS), self.times - 1)
        return z * (se**2 + reference_se**2) ** 0.5 + 1e-9


def setup(cell: Cell, draw: Any = at_random, at: tuple | None = None, copies: int = 1) -> tuple:
    """Model, guide, arguments and parameters."""
    place = cell.place
    raw = torch.tensor(at or place.start).requires_grad_()
    x = place.data.repeat(copies, *[1] * (place.data.dim() - 1))
    return place.model, partial(place.guide, raw, draw), (x, None), raw


def gradient_of(loss: Tensor, raw: Tensor) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros_like(raw)
    (gradient,) = torch.autograd.grad(loss, raw, allow_unused=True)
    return torch.zeros_like(raw) if gradient is None else gradient


def measure(cell: Cell) -> Found:
    """Many copies in one plate make one evaluation precise; else noise that is known is taken off.

    A minibatch of one row is replaced by all of them in turn.
    """
    many, place = cell.place.copies > 1, cell.place
    inside = cell.row.alpha != 1.0
    num, times = (NUM, 30) if many else (NUM if inside else 20, 60)
    if cell.gradient == "score" and inside and not many:
        times = 300 if place.dims[0] else 600  # the noisiest
    draw = at_random if many else Recorder()
    model, guide, (x, _), raw = setup(cell, draw, copies=place.copies)
    batches = [None] if many or place.wrong == 1.0 else list(torch.arange(3).split(1))
    objective = cell.objective(num, vectorize_particles=True)
    rows, noise = [], []
    for rows_seen in batches * times:
        value = objective.evaluate(model, guide, (x, rows_seen))
        gradient = gradient_of(value.loss, raw)
        rows.append(torch.cat([torch.stack([value.loss.detach(), value.bound]), gradient]))
        noise.append(torch.zeros(0) if many else draw.noise())
    results, known = (torch.stack(t).unflatten(0, (times, -1)).mean(1) for t in (rows, noise))
    mean, se = mean_se(without(known, results) / place.copies)
    return Found((mean[0], se[0]), (mean[1], se[1]), (mean[2:], se[2:]), times)


def without(known: Tensor, results: Tensor) -> Tensor:
    """Results less what their linear regression on `known`, of mean zero, explains.

    Coefficients come from the other half of the evaluations, so the mean stays what it is.
    """
    left = results.clone()
    for mine, other in ((0, 1), (1, 0)):
        design = torch.cat([torch.ones(len(known[other::2]), 1), known[other::2]], 1)
        slope = torch.linalg.lstsq(design, results[other::2]).solution[1:]
        left[mine::2] -= known[mine::2] @ slope
    return left


def check_value(cell: Cell, found: Found) -> None:
    """The loss and the bound at beta = 1 have the mean of the reference."""
    alpha, name = cell.row.alpha, cell.situation
    for sign, value, beta in ((-1, found.loss, cell.beta), (1, found.bound, (1.0, 1.0))):
        expected = reference(name, alpha, beta)
        tolerance = found.tolerance(value[1], expected.value_se)
        assert abs(sign * value[0] - expected.value) < tolerance, f"value: {value}, {expected}"
        if cell.place.copies > 1 or cell.gradient == "score":  # the others have few evaluations
            for wrong in other_values(cell, beta):
                distance = abs(wrong - expected.value)
                assert distance > 1.25 * tolerance, f"power: {wrong}, {expected}, {tolerance}"


def other_values(cell: Cell, beta: tuple[float, float]) -> list[float]:
    """Values that mistakes would give: nothing, half, another order, beta or place of a scale."""
    alpha, name, place = cell.row.alpha, cell.situation, cell.place
    right = reference(name, alpha, beta).value
    wrong = [0.0, 0.5 * right]
    if cell.situation != "Delta (MAP)":
        wrong.append(reference(name, 0.0 if alpha == 1.0 else 1.0, beta).value)
    if beta != (1.0, 1.0):
        wrong.append(reference(name, alpha, (1.0, 1.0)).value)
    if alpha != 1.0 and place.wrong != 1.0:
        wrong.append(reference(name, alpha, beta, place.wrong).value)
    return wrong


def check_gradient(cell: Cell, found: Found) -> None:
    """The gradient of the loss has the mean of the reference, and is not small beside the noise."""
    expected = reference(cell.situation, cell.row.alpha, cell.beta)
    mean, se = found.gradient
    tolerance = found.tolerance(se, expected.gradient_se)
    difference = (mean + expected.gradient).abs()
    assert (difference < tolerance).all(), f"gradient: {mean}, {expected}, {tolerance}"
    assert (expected.gradient.abs() > 3 * tolerance).any(), f"power: {expected}, {tolerance}"


def check_bound(cell: Cell, found: Found) -> None:
    """The mean of what is called a bound is not above the evidence."""
    value, se = found.bound
    limit = cell.place.factor * cell.place.log_z
    assert value < limit + found.tolerance(se, 0.0), f"bound: {value}, {limit}"


def check_means(cell: Cell) -> None:
    found = measure(cell)
    check_value(cell, found)
    check_gradient(cell, found)
    if cell.is_bound:
        check_bound(cell, found)


def check_loop(cell: Cell) -> None:
    """Particles one by one give what a batch of them gives on the same draws."""
    results = []
    for vectorized in (True, False):
        torch.manual_seed(5)
        tape = Tape(cell.place.nesting)
        model, taped, (x, _), raw = setup(cell, tape.sample)
        rows = torch.tensor([1])  # of subsampled plates

        def guide(*args: Any, tape: Tape = tape, taped: Any = taped) -> None:
            tape.start()
            taped(*args)

        objective = cell.objective(vectorize_particles=vectorized)
        objective.evaluate(model, guide, (x, rows))  # makes the plan
        tape.rewind()
        value = objective.evaluate(model, guide, (x, rows))
        first = torch.stack([value.loss.detach(), value.bound])
        results.append(torch.cat([first, gradient_of(value.loss, raw)]))
    torch.testing.assert_close(*results, atol=EXACT, rtol=EXACT)
    assert (results[0][:2].abs() > 0.01).all()


def check_same(cell: Cell, other: str) -> None:
    """`auto` is another gradient, on the same draws."""
    results = []
    for gradient in (cell.gradient, other):
        torch.manual_seed(5)
        model, guide, args, raw = setup(cell)
        loss = replace(cell, gradient=gradient).objective().evaluate(model, guide, args).loss
        results.append(torch.cat([loss.detach().reshape(1), gradient_of(loss, raw)]))
    assert torch.equal(*results)


def check_zero(cell: Cell) -> None:
    """At the exact (or tempered) posterior every draw's path gradient is 0, reparam's is not."""
    at, results = cell.place.posterior(cell.beta[1]), []
    for gradient in ("path", "reparam"):
        model, guide, args, raw = setup(cell, at=at)
        loss = replace(cell, gradient=gradient).objective().evaluate(model, guide, args).loss
        results.append(float(gradient_of(loss, raw).abs().max()))
    assert results[0] < EXACT, f"zero: {results}"
    assert results[1] > 1e-2, f"power: {results}"


def check_refusal(cell: Cell) -> None:
    with pytest.raises(pvi.ObjectiveError, match=REFUSED[cell.status]):
        model, guide, args, _ = setup(cell)
        cell.objective().evaluate(model, guide, args)


def marked(cells: list[Cell], slow_estimators: Collection[str] = ()) -> list[Any]:
    """Parameters of a test.

    The estimators named run with `make test-slow`, but for local latents always.
    """
    found = []
    for cell in cells:
        rare = cell.estimator in slow_estimators and cell.situation != "local"
        marks = [pytest.mark.slow] if rare else []
        found.append(pytest.param(cell, id=str(cell), marks=marks))
    return found


ORDERS = {"RenyiELBO(0.5)", "RenyiELBO(-1)"}
SLOW = {"BetaELBO", "RenyiELBO(2)", *ORDERS}
ALLOWED = [c for c in CELLS if c.status not in REFUSED]
AUTO = [c for c in ALLOWED if c.gradient == "auto"]
PATH = [c for c in ALLOWED if c.gradient == "path" and c.place.posterior]


@pytest.mark.parametrize("cell", marked(COMPARED, SLOW))
def test_means(cell: Cell) -> None:
    check_means(cell)


@pytest.mark.parametrize("cell", marked(COMPARED, ORDERS))
def test_loop(cell: Cell) -> None:
    check_loop(cell)


@pytest.mark.parametrize("cell", marked(AUTO, ORDERS))
def test_auto(cell: Cell) -> None:
    check_same(cell, "score" if cell.situation == "discrete" else "reparam")


@pytest.mark.parametrize("cell", marked(PATH))
def test_path_is_zero_at_the_posterior(cell: Cell) -> None:
    check_zero(cell)


@pytest.mark.parametrize("cell", [c for c in CELLS if c.status in REFUSED], ids=str)
def test_refusals(cell: Cell) -> None:
    check_refusal(cell)


@pytest.mark.parametrize("cell", marked(AUTO))
def test_explain_says_what_is_no_bound(cell: Cell) -> None:
    model, guide, args, _ = setup(cell)
    text = str(cell.objective().explain(model, guide, *args))
    assert ("not a bound" in text) == cell.status.startswith("estimate"), text


def test_the_page_is_the_table() -> None:
    """Else run `python -m docs.generate_estimators`."""
    assert generate_estimators.PAGE.read_text(encoding="utf-8") == generate_estimators.page()


@pytest.mark.parametrize("situation", ["global", "subsampled, global"])
def test_per_datum_needs_local_latents(situation: str) -> None:
    model, guide, args, _ = setup(Cell("IWAE", "auto", situation))
    with pytest.raises(pvi.ObjectiveError, match="bound='per_datum' needs a plate"):
        pvi.RenyiELBO(0.0, NUM, bound="per_datum").evaluate(model, guide, args)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0, -1.0])
def test_exact_kl_needs_the_elbo(alpha: float) -> None:
    with pytest.raises(pvi.ObjectiveError, match=r"kl='exact' is a form of the ELBO"):
        pvi.Objective(NUM, alpha=alpha, kl="exact")


def test_negative_orders_exceed_the_evidence() -> None:
    """Why alpha < 0 is called an estimate; alpha >= 0 is below with as many particles."""
    cell = Cell("RenyiELBO(-1)", "reparam", "local")
    model, guide, args, _ = setup(cell, at=(0.1, 0.6, 0.1), copies=300)
    means = []
    for row in (cell, replace(cell, estimator="IWAE")):
        objective = row.objective(20, vectorize_particles=True)
        values = torch.tensor([objective.bound(model, guide, *args) for _ in range(40)]) / 300
        means.append(mean_se(values))
    (above, se), (below, low_se) = means
    assert above > cell.place.log_z + 10 * se
    assert below < cell.place.log_z + 3 * low_se
