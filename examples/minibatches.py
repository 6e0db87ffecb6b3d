"""One model, on all the data and in minibatches of 64: the same posterior, the model unchanged."""

import pyro
import pyro.distributions as dist
import torch

import pvi

torch.manual_seed(0)
x = torch.randn(2_000, 3)
y = (x @ torch.tensor([1.0, -2.0, 0.5]) > torch.rand(2_000).logit()).float()


def logistic(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)


for batch_size in (None, 64):
    fit = pvi.fit(logistic, data=(x, y), batch_size=batch_size, steps=1_500, seed=0)
    w = fit.posterior.sample(2_000, seed=1)["w"]
    print(f"batch_size={batch_size}: {fit}")
    print(f"  mean {w.mean(0).tolist()}\n  sd   {w.std(0).tolist()}")
