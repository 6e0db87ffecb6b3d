"""Networks trained on MNIST: errors, calibration, and do they know that clothes are no digits?

One architecture, one optimiser and one budget for MAP, MC dropout, an ensemble of five and
mean-field posteriors: one hidden layer and 20 epochs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import parser, report, timed
from pvi.datasets import images
from pvi.models import bnn
from pvi.models.bnn import metrics
from pvi.models.bnn.predictive import draw_networks, predicted

HIDDEN, BATCH, RATE, DECAY = 200, 100, 2e-3, 1e-4
DROPOUT, MEMBERS, CHUNK = 0.2, 5, 5
HEADER = ("method", "error, %", "NLL", "ECE", "Brier", "AUROC, entropy", "AUROC, MI", "seconds")
MEANING = {
    "NLL": "of the mixture, nats an image",
    "AUROC": "MNIST's test images against Fashion-MNIST's, by the entropy of the prediction or by "
    "the mutual information of class and weights",
}


@dataclass(frozen=True)
class Budget:
    """How much of the data is used, and how long."""

    rows: int = 60_000
    test: int = 10_000
    epochs: int = 20
    draws: int = 50


@dataclass(frozen=True)
class Data:
    x: Tensor
    y: Tensor
    test: Tensor
    labels: Tensor
    outside: Tensor


def read(source: Any, outside: Any, budget: Budget) -> Data:
    inside, other = images(source), images(outside)
    assert inside.labels is not None and inside.test_labels is not None

    def flat(x: Tensor, num: int) -> Tensor:
        return x[:num].flatten(1)

    return Data(
        flat(inside.train, budget.rows),
        inside.labels[: budget.rows],
        flat(inside.test, budget.test),
        inside.test_labels[: budget.test],
        flat(other.test, budget.test),
    )


def network(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(784, HIDDEN),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(HIDDEN, 10),
    )


def descended(data: Data, budget: Budget, seed: int, dropout: float = 0.0) -> nn.Module:
    """A network trained by Adam with weight decay, as MAP and MC dropout are."""
    torch.manual_seed(seed)
    net = network(dropout)
    steps = budget.epochs * (len(data.x) // BATCH)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE, weight_decay=DECAY)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(budget.epochs):
        for rows in torch.randperm(len(data.x)).split(BATCH)[: len(data.x) // BATCH]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
            rates.step()
    return net


Predict = Callable[[Tensor], Tensor]  # images to probabilities (S, N, 10)


def of_networks(nets: list[nn.Module], draws: int = 1) -> Predict:
    """Several networks, each run so many times; dropout stays on where there are several runs."""

    def predict(x: Tensor) -> Tensor:
        for net in nets:
            net.train(draws > 1)
        with torch.no_grad():
            return torch.stack([net(x).softmax(-1) for net in nets for _ in range(draws)])

    return predict


def mean_field(data: Data, budget: Budget, seed: int, kl_weight: float) -> Predict:
    torch.manual_seed(seed)
    model = bnn.bayesianize(network(), likelihood=bnn.Categorical(10))
    steps = budget.epochs * (len(data.x) // BATCH)
    recipe = bnn.Recipe(steps=steps, batch_size=BATCH, lr=RATE, kl_weight=kl_weight)
    posterior = recipe.fit(model, data.x, data.y, seed=seed, progress=False).posterior
    networks = draw_networks(posterior, budget.draws, seed)

    def predict(x: Tensor) -> Tensor:
        found = []
        for k in range(0, budget.draws, CHUNK):
            some = {name: value[k : k + CHUNK] for name, value in networks.items()}
            found.append(predicted(posterior, some, x).probs)
        return torch.cat(found)

    return predict


def methods(data: Data, budget: Budget, seed: int) -> dict[str, Callable[[], Predict]]:
    def several() -> Predict:
        return of_networks([descended(data, budget, seed + k) for k in range(MEMBERS)])

    def dropout() -> Predict:
        return of_networks([descended(data, budget, seed, DROPOUT)], budget.draws)

    return {
        "MAP": lambda: of_networks([descended(data, budget, seed)]),
        "MC dropout": dropout,
        f"ensemble of {MEMBERS}": several,
        "mean field": lambda: mean_field(data, budget, seed, 1.0),
        "mean field, KL x 0.1 (tempered)": lambda: mean_field(data, budget, seed, 0.1),
    }


def line(name: str, make: Callable[[], Predict], data: Data) -> list[Any]:
    with timed() as seconds:
        predict = make()
    inside, outside = predict(data.test), predict(data.outside)
    p = inside.double().mean(0)
    p = p / p.sum(-1, keepdim=True)
    known, strange = metrics.class_uncertainty(inside), metrics.class_uncertainty(outside)
    error = 100 * float((p.argmax(-1) != data.labels).double().mean())
    nll = -float(p[torch.arange(len(p)), data.labels].log().mean())
    mutual = None
    if len(inside) > 1:
        mutual = round(metrics.auroc(known.epistemic, strange.epistemic), 3)
    return [
        name,
        round(error, 2),
        round(nll, 4),
        round(metrics.ece(p, data.labels), 4),
        round(metrics.brier(p, data.labels), 4),
        round(metrics.auroc(known.total, strange.total), 3),
        mutual,
        round(seconds[0], 0),
    ]


def part(folder: Path, outside: Any, results: Path, seed: int, budget: Budget) -> None:
    """Train all methods and keep the table, after each of them."""
    data, rows = read(folder / "mnist.npz", outside, budget), []
    for name, make in methods(data, budget, seed).items():
        rows.append(line(name, make, data))
        more = {"mnist_meaning": MEANING, "mnist_budget": vars(budget)}
        report("bnn", HEADER, rows, results, key="mnist", more=more)


if __name__ == "__main__":
    options = parser(__doc__, data=True)
    options.add_argument("--outside", default="fashion-mnist", help="of pvi.datasets.images")
    options.add_argument("--rows", type=int, default=Budget.rows)
    options.add_argument("--epochs", type=int, default=Budget.epochs)
    given = options.parse_args()
    spent = Budget(rows=given.rows, epochs=given.epochs)
    part(given.data, given.outside, given.results, given.seed, spent)
