"""Uncertainty between the data: one network on inputs with a gap, under several guides.

A factorised normal may be sure of itself between two groups of data where it need not be (Foong et
al. 2020). The table has the mean standard deviation of the function in the gap and on the data, the
picture shows where. The training is short: a family with more parameters is further from its best.

    python examples/bnn_gap.py [--steps 1000] [--out bnn_gap.png]
"""

import argparse

import torch
from torch import nn

import pvi
from pvi.figures import new_figure, tidy
from pvi.models import bnn
from pvi.text import table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--out", default="bnn_gap.png")
options = parser.parse_args()

torch.manual_seed(0)
x = torch.cat([-1.0 + 0.35 * torch.rand(40, 1), 0.5 + 0.5 * torch.rand(40, 1)])
y = torch.sin(4.0 * x[:, 0]) + 0.1 * torch.randn(80)
grid = torch.linspace(-1.6, 1.6, 161).unsqueeze(-1)
gap, seen = (grid[:, 0] > -0.6) & (grid[:, 0] < 0.45), (grid[:, 0] > 0.55) & (grid[:, 0] < 0.95)
net = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1))
start = {"init_loc_fn": "module", "init_scale": 1e-2}


def model(**choices):
    made = bnn.bayesianize(net, prior=bnn.FanIn(3.0), likelihood=bnn.Gaussian(0.1), **choices)
    return pvi.local_reparam(made)


last = model(where=bnn.last_layer(net))
guides = {
    "mean field": (model(), pvi.guides.MeanField(**start)),
    "dropout": (model(), bnn.MCDropout(0.05, init_loc_fn="module")),
    "low rank": (model(), pvi.guides.LowRank(rank=5, **start)),
    "full rank": (model(), pvi.guides.FullRank(**start)),
    "full rank, last layer": (last, pvi.guides.FullRank(**start)),
    "mixture of 4": (model(), pvi.guides.Mixture(4, init_loc_fn="module", spread=0.5)),
}

figure = new_figure(10.0, 5.6)
rows = []
axes = figure.subplots(2, 3, sharex=True, sharey=True).flat
for ax, (name, (program, guide)) in zip(axes, guides.items(), strict=True):
    fit = pvi.fit(program, guide, (x, y), steps=options.steps, lr=0.01, seed=0)
    f = fit.posterior.predict(grid, num_draws=300, seed=0)["f"][..., 0]
    mean, sd = f.mean(0), f.std(0)
    bound = torch.tensor(fit.history["bound"][-200:]).mean()
    rows.append([name, f"{bound:.1f}", f"{sd[gap].mean():.2f}", f"{sd[seen].mean():.3f}"])
    for width in (1, 2):
        low, high = mean - width * sd, mean + width * sd
        ax.fill_between(grid[:, 0], low, high, color="C0", alpha=0.2, lw=0)
    ax.plot(grid[:, 0], f[:8].T, color="C0", lw=0.5, alpha=0.6)
    ax.plot(grid[:, 0], mean, color="C0", lw=1.4)
    ax.scatter(x[:, 0], y, s=6, color="k", zorder=3)
    ax.set(title=name, ylim=(-4.0, 4.0))
    tidy(ax)
figure.supxlabel("x")
figure.supylabel("f(x): mean, 1 and 2 sds, 8 draws")
figure.savefig(options.out)
print(table(["guide", "ELBO", "sd in the gap", "sd on data"], rows))
print(f"picture: {options.out}")
