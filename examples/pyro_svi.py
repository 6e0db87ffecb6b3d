"""Keep your own loop around Pyro's SVI: a pvi objective as its loss, a pvi posterior at the end."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

import pvi

torch.manual_seed(0)
y = torch.randn(50) + 1.0


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


guide = AutoNormal(model)
objective = pvi.ELBO(num_particles=4)
svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=objective)
for _ in range(1_000):
    svi.step(y)

print(objective.explain(model, guide, y), end="\n\n")
posterior = pvi.from_svi(svi, y)
print(pvi.diagnose(posterior))
print({name: draws.mean().item() for name, draws in posterior.sample(2_000, seed=0).items()})
