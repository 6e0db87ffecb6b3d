"""The comparisons of `test_matrix` notice mistakes: each mutant of pvi fails one, by name."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pvi
from pvi.engine import bounds, gradients, objective, sampling, terms, traces
from tests.conjugate import Cell
from tests.test_matrix import check_loop, check_means, check_zero

pytestmark = pytest.mark.usefixtures("isolated")


@dataclass(frozen=True)
class Mutant:
    """`place.name` replaced by `change(original)`; `check(cell)` must fail for `reason`."""

    place: Any
    name: str
    change: Callable[[Any], Any]
    cell: Cell
    reason: str
    check: Callable[[Cell], None] = check_means


def shrunk(factor: float) -> Callable[[Any], Any]:
    """The right loss with its gradient multiplied."""

    def change(evaluate: Any) -> Any:
        def mutant(*args: Any) -> Any:
            value = evaluate(*args)
            loss = value.loss.detach() + factor * (value.loss - value.loss.detach())
            return replace(value, loss=loss)

        return mutant

    return change


def constant(value: float) -> Callable[[Any], Any]:
    return lambda original: lambda *args, **options: torch.tensor(value)


def scale_inside(split: Any) -> Any:
    """Pyro's place for N / B: log weights are multiplied, not their mean."""

    def mutant(*args: Any) -> Any:
        outer, inner = split(*args)
        return outer, replace(inner, log_w=inner.log_w * inner.size, size=1.0)

    return mutant


def without_count(renyi_mean: Any) -> Any:
    """log sum w in the place of log mean w."""
    return lambda log_w, order: renyi_mean(log_w, order) + math.log(len(log_w)) / (1 - order)


def softmax_weighted(renyi_mean: Any) -> Any:
    """The value of pythae's IWAE, sum_k softmax_k log w_k."""
    return lambda log_w, order: (torch.softmax(log_w, 0) * log_w).sum(0)


def iwae_ratio(path_ratio: Any) -> Any:
    return lambda log_w, order, beta=1.0: path_ratio(log_w, 0.0, beta)


def all_ones(path_ratio: Any) -> Any:
    return lambda log_w, *rest: torch.ones_like(log_w)


def mean_baseline(leave_one_out: Any) -> Any:
    """A baseline that contains the draw itself."""

    def mutant(log_w: Tensor, order: float) -> Tensor:
        return (log_w - log_w.mean(0)) / len(log_w)

    return mutant


def only_first(fold: Any) -> Any:
    """The value of particle 0 for all of them."""
    return lambda x, *rest: fold(x[:1].expand_as(x), *rest)


LOCAL, NESTED = "local", "global + local"
MUTANTS = {
    "zeroed": Mutant(
        pvi.Objective, "evaluate", shrunk(0.0), Cell("ELBO", "reparam", LOCAL), "gradient"
    ),
    "halved": Mutant(
        pvi.Objective, "evaluate", shrunk(0.5), Cell("IWAE", "path", NESTED), "gradient"
    ),
    "half the score": Mutant(
        pvi.Objective, "evaluate", shrunk(0.5), Cell("IWAE", "score", NESTED), "gradient"
    ),
    "no score term": Mutant(
        pvi.Objective, "_score", constant(0.0), Cell("IWAE", "score", LOCAL), "gradient"
    ),
    "no score term, discrete": Mutant(
        pvi.Objective, "_score", constant(0.0), Cell("IWAE", "auto", "discrete"), "gradient"
    ),
    "no score term outside": Mutant(
        objective, "outer_score", constant(0.0), Cell("IWAE", "score", NESTED), "gradient"
    ),
    "baseline with itself": Mutant(
        gradients, "leave_one_out", mean_baseline, Cell("ELBO", "score", LOCAL), "gradient"
    ),
    "path ratio 1": Mutant(
        objective, "path_ratio", all_ones, Cell("IWAE", "path", LOCAL), "gradient"
    ),
    "path ratio of IWAE": Mutant(
        objective, "path_ratio", iwae_ratio, Cell("RenyiELBO(0.5)", "path", LOCAL), "gradient"
    ),
    "no control term": Mutant(
        objective, "control", constant(0.0), Cell("IWAE", "path", NESTED), "zero", check_zero
    ),
    "subsample scale inside": Mutant(
        bounds, "split", scale_inside, Cell("IWAE", "reparam", "subsampled"), "value"
    ),
    "user's scale inside": Mutant(
        bounds, "common_scale", lambda f: lambda t: None, Cell("IWAE", "path", "scaled"), "value"
    ),
    "sum for mean": Mutant(
        bounds, "renyi_mean", without_count, Cell("IWAE", "reparam", "nested plates"), "value"
    ),
    "pythae's IWAE": Mutant(
        bounds, "renyi_mean", softmax_weighted, Cell("IWAE", "reparam", "to_event"), "value"
    ),
    "one particle for all": Mutant(
        bounds, "fold", only_first, Cell("IWAE", "reparam", LOCAL), "value"
    ),
    "mask ignored": Mutant(
        traces, "masked", lambda f: lambda x, mask: x, Cell("ELBO", "reparam", "obs_mask"), "value"
    ),
    "KL twice": Mutant(
        terms, "exact_kl", lambda f: lambda site: 2 * f(site),
        Cell("TraceMeanFieldELBO", "reparam", "subsampled"), "value",
    ),
    "beta ignored": Mutant(
        pvi.Objective, "_weight", lambda f: lambda self, t: lambda term: 1.0,
        Cell("BetaELBO", "reparam", LOCAL), "value",
    ),
    "log q not frozen": Mutant(
        sampling, "frozen", lambda f: lambda leaves: nullcontext(), Cell("ELBO", "path", LOCAL),
        "zero", check_zero,
    ),
    "the first of a loop": Mutant(
        sampling, "concatenate", lambda f: lambda runs: f(runs[:1] * len(runs)),
        Cell("IWAE", "reparam", NESTED), "Tensor-likes are not close", check_loop,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutant_fails(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(mutant.place, mutant.name)
    monkeypatch.setattr(mutant.place, mutant.name, mutant.change(original))
    with pytest.raises(AssertionError, match=f"^{mutant.reason}"):
        mutant.check(mutant.cell)
