"""Eight schools: a model of your own, fitted, checked, and summarised by arviz."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist

import pvi

sigma = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])


def schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


fit = pvi.fit(schools, data=(sigma, y), seed=0)
print(fit.diagnose())
print(az.summary(fit.to_arviz(seed=0), var_names=["mu", "tau", "theta"], kind="stats"))
