"""One task after another: the posterior of one is the prior of the next (Nguyen et al. 2018).

A network learns to tell pairs of digits apart, 0 from 1, then 2 from 3, and so on, without data of
the past. All pairs share the hidden layer and each has an output of its own, as in the split tasks
of the paper. A KL weight below 1 makes the posteriors tempered ones. The table has the accuracy on
each pair after each task, with posteriors as priors and for the same network trained on by maximum
likelihood, which forgets; the price of remembering is that later pairs are learned less well.

    python examples/bnn_continual.py [--epochs 60] [--units 100] [--kl-weight 0.1] [--seed 0]
        [--out PNG]
"""

import argparse

import torch
from torch import Tensor, nn

import pvi
from pvi.figures import new_figure, tidy
from pvi.models import bnn
from pvi.text import table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--units", type=int, default=100, help="of the hidden layer")
parser.add_argument("--kl-weight", type=float, default=0.1)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="bnn_continual.png")
options = parser.parse_args()

from sklearn.datasets import load_digits  # noqa: E402

digits = load_digits()
x = torch.as_tensor(digits.data, dtype=torch.get_default_dtype()) / 16.0
labels = torch.as_tensor(digits.target)
tasks = [(2 * k, 2 * k + 1) for k in range(5)]
names = [f"{a} or {b}" for a, b in tasks]


class Heads(nn.Sequential):
    """A network of images with the number of their task behind, whose output alone is taken."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs[:, :-1]).gather(-1, inputs[:, -1:].long())


def rows(task: int, test: bool) -> tuple[Tensor, Tensor]:
    """Inputs and whether they are of the second digit; every fourth row is for the test."""
    pair = torch.tensor(tasks[task])
    chosen = torch.isin(labels, pair) & ((torch.arange(len(x)) % 4 == 0) == test)
    images = x[chosen]
    number = torch.full((len(images), 1), float(task)).to(x)
    return torch.cat([images, number], 1), (labels[chosen] == pair[1]).to(x)


def accuracy(fit: pvi.Fit, task: int) -> float:
    """Of the mean probability, on the task's rows for the test."""
    inputs, y = rows(task, True)
    f = fit.posterior.predict(inputs, num_draws=100, seed=0)["f"][..., 0]
    return float(((f.sigmoid().mean(0) > 0.5) == y).float().mean())


torch.manual_seed(options.seed)
net = Heads(nn.Linear(64, options.units), nn.ReLU(), nn.Linear(options.units, len(tasks)))


def run(carries_on: bool) -> list[list[float]]:
    """Accuracies on all tasks so far, after each task."""
    prior, start = bnn.FanIn(3.0 if carries_on else 1e3), dict(net.named_parameters())
    objective = pvi.BetaELBO(options.kl_weight) if carries_on else pvi.ELBO()
    found = []
    for task in range(len(tasks)):
        model = pvi.local_reparam(bnn.bayesianize(net, prior=prior, likelihood=bnn.Bernoulli()))
        guide = pvi.guides.MeanField(init_loc_fn=start, init_scale=1e-2)
        if not carries_on:
            guide = pvi.guides.Delta(init_loc_fn=start)  # under a prior that is all but flat
        data = rows(task, False)
        given = {"epochs": options.epochs, "batch_size": 64, "lr": 0.01}
        fit = pvi.fit(model, guide, data, objective=objective, seed=options.seed, **given)
        start = fit.guide.mean()
        if carries_on:
            prior = fit.posterior.as_prior()
        found.append([accuracy(fit, old) for old in range(task + 1)])
    return found


ways = {"posterior as prior": run(True), "trained on": run(False)}
figure = new_figure(6.0, 3.2)
axes = figure.subplots()
lines = []
for way, found in ways.items():
    means = [sum(each) / len(each) for each in found]
    axes.plot(range(1, len(tasks) + 1), means, marker="o", label=way)
    for name, each, mean in zip(names, found, means, strict=True):
        blank = [""] * (len(tasks) - len(each))
        lines.append([way, name, *(f"{a:.2f}" for a in each), *blank, f"{mean:.2f}"])
axes.axhline(0.5, color="0.6", lw=0.8, ls=":")
axes.set(xlabel="tasks learned", ylabel="mean accuracy on these", ylim=(0.0, 1.05))
axes.set_xticks(range(1, len(tasks) + 1))
axes.legend(frameon=False, loc="lower left", fontsize=8)
tidy(axes)
figure.savefig(options.out)
print(table(["way", "after", *names, "mean"], lines))
print(f"picture: {options.out}")
