"""UCI regression on the 20 standard splits, every hyperparameter chosen inside the training splits.

Networks of one hidden layer of 50 ReLU units with a mean-field posterior. All splits and KL weights
of a data set are one batch of independent networks. A fifth of each training split chooses the
split's own likelihood (homo- or heteroscedastic), KL weight and noise factor by the log likelihood
of the mixture of 100 networks; then three networks are trained on the whole training split from
starts of their own, and predictions are those of their mixture. The first alone has a column too.
"""

import csv
import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from benchmarks.common import parser, report, timed
from pvi.models import bnn
from pvi.models.bnn.metrics import mixture_log_likelihood
from pvi.models.bnn.predictive import draw_networks, predicted
from pvi.models.bnn.training import Recipe
from pvi.nn import MLP

HEADS = {"noise": None, "heteroscedastic": "decoded"}  # -> scale of bnn.Gaussian
FACTORS = (0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0)  # on the predicted sd
DRAWS, CHUNK = 100, 10
HELD = 0.2  # of a training split, to choose on
MEMBERS = 3  # networks in the final mixture


@dataclass(frozen=True)
class Plan:
    """What is fixed for a data set beforehand: the budget, and the KL weights to choose from."""

    steps: int
    batch_size: int
    weights: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)


PLANS = {
    "wine-quality-red": Plan(5000, 64),
    "bostonHousing": Plan(3000, 64),
    "energy": Plan(5000, 64),
    "concrete": Plan(6000, 64),
    "power-plant": Plan(5000, 128),
    "kin8nm": Plan(5000, 128),
}
# Gal and Ghahramani (2016), table 1 (first two); Lakshminarayanan et al. (2017), table 1; Wu et al.
# (2019), table 2, heteroscedastic. The tuned MC dropout is computed from its results per split.
PUBLISHED = {
    "bostonHousing": (-2.90, -2.57, -2.41, -2.46, -2.41),
    "concrete": (-3.39, -3.16, -3.06, -3.07, -3.06),
    "energy": (-2.39, -2.04, -1.38, -1.03, -1.01),
    "kin8nm": (0.90, 0.90, 1.20, 1.14, 1.13),
    "power-plant": (-2.89, -2.84, -2.79, -2.80, -2.80),
    "wine-quality-red": (-0.98, -0.97, -0.94, -0.92, -0.90),
}
COLUMNS = ("VI (Graves)", "PBP", "deep ensembles", "MCVI", "DVI")


@dataclass(frozen=True)
class Rows:
    """Rows of some splits as columns: x `(N, C, d)`, y `(N, C)`, standardised."""

    x: Tensor
    y: Tensor

    def repeated(self, times: int) -> "Rows":
        return Rows(self.x.repeat(1, times, 1), self.y.repeat(1, times))

    def columns(self, chosen: Sequence[int]) -> "Rows":
        return Rows(self.x[:, list(chosen)], self.y[:, list(chosen)])


@dataclass(frozen=True)
class Splits:
    """Training and test rows of all splits, and the sd of y in each training part."""

    train: Rows
    test: Rows
    scale: Tensor

    def columns(self, chosen: Sequence[int]) -> "Splits":
        picked = list(chosen)
        return Splits(self.train.columns(picked), self.test.columns(picked), self.scale[picked])


class Tempered(nn.Module):
    r"""A model with copies whose likelihoods are raised to :math:`1 / \beta_c`, one for each copy.

    Its bound is that with the KL of copy c times :math:`\beta_c`, divided by it: the same optimum.
    """

    def __init__(self, model: bnn.BayesianModule, weights: Tensor):
        super().__init__()
        self.model, self.powers, self.copies = model, 1.0 / weights, model.copies

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        with OnSite("y", self.powers):
            return self.model(x, y)


class OnSite(pyro.poutine.messenger.Messenger):
    """A scale at one site alone."""

    def __init__(self, site: str, scale: Tensor):
        super().__init__()
        self.site, self.scale = site, scale

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site:
            msg["scale"] = msg["scale"] * self.scale


def read(folder: Path, name: str, *, seed: int | None = None) -> Splits:
    """All splits; with a seed, training parts are divided and their last fifth is the test."""
    with np.load(folder / f"{name}.npz") as file:
        x, y = file["X"], file["y"]
        trains, tests = file["train_index"].astype(int), file["test_index"].astype(int)
    if seed is not None:
        rng = np.random.default_rng(seed)
        trains = rng.permuted(trains, axis=1)
        held = round(HELD * trains.shape[1])
        trains, tests = trains[:, held:], trains[:, :held]
    parts: list[list[np.ndarray]] = [[], [], [], []]
    scales = []
    for train, test in zip(trains, tests, strict=True):
        mean, sd = x[train].mean(0), x[train].std(0)
        sd = np.where(sd > 0, sd, 1.0)
        scales.append(y[train].std())
        for k, rows in enumerate((train, test)):
            parts[2 * k].append((x[rows] - mean) / sd)
            parts[2 * k + 1].append((y[rows] - y[train].mean()) / scales[-1])
    stacked = [torch.tensor(np.stack(part, 1), dtype=torch.float32) for part in parts]
    return Splits(Rows(*stacked[:2]), Rows(*stacked[2:]), torch.tensor(scales).float())


def trained(rows: Rows, weights: Tensor, head: str, plan: Plan, seed: int) -> Any:
    """The posterior of a network for each column, or of one where there are none."""
    copies, inputs = rows.x.shape[1] if rows.x.dim() > 2 else 1, rows.x.shape[-1]
    likelihood = bnn.Gaussian(HEADS[head])
    module = MLP(inputs, likelihood.width, (50,), "relu")
    model = bnn.bayesianize(module, likelihood=likelihood, copies=copies)
    recipe = Recipe(steps=plan.steps, batch_size=plan.batch_size)
    options = {"start": bnn.he(model), "seed": seed, "progress": False, "compile": False}
    return recipe.fit(Tempered(model, weights), rows.x, rows.y, **options).posterior


@dataclass(frozen=True)
class Draws:
    """What the networks of C columns predict.

    Attributes:
        log_lik: of each row under each network, `(factors, S, N, C)`, standardised.
        means: `(S, N, C)`.
    """

    log_lik: Tensor
    means: Tensor

    def members(self, number: int) -> "Draws":
        """Of the columns `(M C)` as `(C)`: those of M members count as further draws."""
        log_lik = self.log_lik.unflatten(-1, (number, -1)).movedim(-2, 1).flatten(1, 2)
        return Draws(log_lik, self.means.unflatten(-1, (number, -1)).movedim(-2, 0).flatten(0, 1))

    def first(self, columns: int) -> "Draws":
        return Draws(self.log_lik[..., :columns], self.means[..., :columns])

    def scores(self, scale: Tensor) -> Tensor:
        """Mixture log likelihoods in original units, `(factors, C)`."""
        found = [mixture_log_likelihood(each.flatten(1)) for each in self.log_lik]
        return torch.stack(found).unflatten(1, self.log_lik.shape[2:]).mean(1) - scale.log()

    def errors(self, y: Tensor, scale: Tensor) -> Tensor:
        """RMSEs in original units, `(C)`."""
        return (self.means.mean(0) - y).square().mean(0).sqrt() * scale


def drawn(posterior: Any, rows: Rows, seed: int) -> Draws:
    """Predictions of 100 networks for each column."""
    networks = draw_networks(posterior, DRAWS, seed)
    log_lik, means = [], []
    for k in range(0, DRAWS, CHUNK):
        fn = predicted(posterior, {n: v[k : k + CHUNK] for n, v in networks.items()}, rows.x)
        factors = torch.tensor(FACTORS).reshape(-1, 1, 1, 1)
        log_lik.append(torch.distributions.Normal(fn.mean, fn.stddev * factors).log_prob(rows.y))
        means.append(fn.mean)
    return Draws(torch.cat(log_lik, 1), torch.cat(means))


def choose(folder: Path, name: str, plan: Plan, seed: int) -> list[tuple[str, float, float]]:
    """Head, KL weight and noise factor of each split, by its validation part."""
    splits, weights = read(folder, name, seed=seed), torch.tensor(plan.weights)
    num, times = len(splits.scale), len(plan.weights)
    scores = []
    for head in HEADS:
        each = weights.repeat_interleave(num)
        posterior = trained(splits.train.repeated(times), each, head, plan, seed)
        found = drawn(posterior, splits.test.repeated(times), seed).scores(
            splits.scale.repeat(times)
        )
        scores.append(found.reshape(len(FACTORS), times, num))
        print(name, head, "validation:", found.reshape(-1, times, num).mean(-1).T, flush=True)
    table = torch.stack(scores)  # (heads, factors, weights, splits)
    best = table.reshape(-1, num).argmax(0).tolist()
    places = [np.unravel_index(i, table.shape[:-1]) for i in best]
    return [(list(HEADS)[h], plan.weights[w], FACTORS[f]) for h, f, w in places]


def final(
    folder: Path, name: str, plan: Plan, chosen: Sequence[tuple[str, float, float]], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Test log likelihood, that of one network, and RMSE of each split, `(20)` each."""
    splits = read(folder, name)
    log_lik, alone, rmse = (torch.full((len(chosen),), math.nan) for _ in range(3))
    for head in HEADS:
        mine = [i for i, (h, _, _) in enumerate(chosen) if h == head]
        if not mine:
            continue
        part = splits.columns(mine)
        weights = torch.tensor([chosen[i][1] for i in mine]).repeat(MEMBERS)
        posterior = trained(part.train.repeated(MEMBERS), weights, head, plan, seed)
        every = drawn(posterior, part.test.repeated(MEMBERS), seed)
        whole, one = every.members(MEMBERS), every.first(len(mine))
        places = [FACTORS.index(chosen[i][2]) for i in mine], range(len(mine))
        log_lik[mine] = whole.scores(part.scale)[places]
        alone[mine] = one.scores(part.scale)[places]
        rmse[mine] = whole.errors(part.test.y, part.scale)
    return log_lik, alone, rmse


def reference(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Log likelihood and RMSE of the tuned MC dropout on each split."""
    with gzip.open(folder / "mc_dropout_reference_results.csv.gz", "rt") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == name]
    rows.sort(key=lambda row: int(row["split"]))
    keys = ("mc_dropout_test_ll", "mc_dropout_rmse")
    log_lik, rmse = (torch.tensor([float(row[key]) for row in rows]) for key in keys)
    return log_lik, rmse


def shown(values: Tensor) -> str:
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def row(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """One data set: choose, train, compare with the reference split by split."""
    plan = PLANS[name]
    with timed() as seconds:
        chosen = choose(folder, name, plan, seed)
        log_lik, alone, rmse = final(folder, name, plan, chosen, seed)
    other, other_rmse = reference(folder, name)
    difference = log_lik - other
    se = difference.std() / len(difference) ** 0.5
    heads = sum(head == "heteroscedastic" for head, _, _ in chosen)
    return {
        "data": name,
        "LL": shown(log_lik),
        "LL, one network": shown(alone),
        "MC dropout, tuned": shown(other),
        "LL minus it, paired": shown(difference),
        "verdict": verdict(float(difference.mean()), float(se)),
        **dict(zip(COLUMNS, PUBLISHED[name], strict=True)),
        "RMSE": shown(rmse),
        "RMSE, MC dropout": shown(other_rmse),
        "heteroscedastic": f"{heads}/{len(chosen)}",
        "KL weight": round(math.exp(np.mean([math.log(w) for _, w, _ in chosen])), 2),
        "noise factor": round(float(np.mean([f for _, _, f in chosen])), 2),
        "seconds": round(seconds[0], 0),
        "splits": [round(float(x), 4) for x in log_lik],
    }


def verdict(difference: float, se: float) -> str:
    if difference > se:
        return "better"
    return "within one se" if difference >= -se else "worse"


def part(folder: Path, results: Path, seed: int, names: Sequence[str]) -> None:
    """Run the data sets and add each to the results as it is done."""
    found = []
    for name in names:
        found.append(row(folder, name, seed))
        given = [[value for key, value in each.items() if key != "splits"] for each in found]
        header = [key for key in found[0] if key != "splits"]
        more = {"uci_splits": {each["data"]: each["splits"] for each in found}}
        report("bnn", header, given, results, key="uci", more=more)


if __name__ == "__main__":
    options = parser(__doc__, data=True)
    options.add_argument("--names", nargs="*", choices=list(PLANS), default=list(PLANS))
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    part(given.data, given.results, given.seed, given.names)
