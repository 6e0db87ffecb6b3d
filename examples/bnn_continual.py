"""One task after another: the posterior of one is the prior of the next (Nguyen et al. 2018).

A network learns to tell pairs of digits apart, 0 from 1, then 2 from 3, and so on, with one head
for all pairs and no data of the past. The table has the accuracy on each pair after each task, for
variational continual learning and for a network that is simply trained on.

    python examples/bnn_continual.py [--epochs 40]
"""

import argparse

import torch
from torch import Tensor, nn

import pvi
from pvi.models import bnn
from pvi.text import table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=40)
options = parser.parse_args()

from sklearn.datasets import load_digits  # noqa: E402

digits = load_digits()
x = torch.as_tensor(digits.data, dtype=torch.get_default_dtype()) / 16.0
labels = torch.as_tensor(digits.target)
tasks = [(2 * k, 2 * k + 1) for k in range(5)]


def rows(pair: tuple[int, int], test: bool) -> tuple[Tensor, Tensor]:
    """Inputs and whether they are of the second digit; every fourth row is for the test."""
    chosen = torch.isin(labels, torch.tensor(pair)) & ((torch.arange(len(x)) % 4 == 0) == test)
    return x[chosen], (labels[chosen] == pair[1]).to(x)


torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 1))


def run(name: str) -> list[list[str]]:
    prior, start = bnn.FanIn(), dict(net.named_parameters())
    found = []
    for task, pair in enumerate(tasks):
        model = bnn.bayesianize(net, prior=prior, likelihood=bnn.Bernoulli())
        guide = pvi.guides.MeanField(init_loc_fn=start, init_scale=1e-2)
        program = pvi.local_reparam(model)
        fit = pvi.fit(
            program, guide, rows(pair, False), epochs=options.epochs, batch_size=64, seed=0
        )
        start = fit.guide.mean()
        if name == "posterior as prior":
            prior = bnn.posterior_as_prior(fit)
        accuracies = []
        for old in tasks[: task + 1]:
            inputs, y = rows(old, True)
            f = fit.posterior.predict(inputs, num_draws=100, seed=0)["f"][..., 0]
            accuracies.append(float(((f.sigmoid().mean(0) > 0.5) == y).float().mean()))
        mean = sum(accuracies) / len(accuracies)
        each = [f"{a:.2f}" for a in accuracies] + [""] * (len(tasks) - len(accuracies))
        found.append([name, f"{pair[0]} or {pair[1]}", *each, f"{mean:.2f}"])
    return found


header = ["way", "after", *(f"{a} or {b}" for a, b in tasks), "mean"]
print(table(header, [*run("posterior as prior"), *run("trained on")]))
