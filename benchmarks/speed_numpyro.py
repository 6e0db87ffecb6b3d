# pyright: reportMissingImports=false
"""NumPyro's side of the benchmarks, in an interpreter that has it: imports numpyro and jax only.

Reads one request a line from standard input, as JSON, and answers each with a line of JSON. Run it
with the folder of the problems' data (`NAME.npz`, `NAME.json`) as the only argument.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ.setdefault("XLA_FLAGS", FLAGS)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from jax import random  # noqa: E402
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO  # noqa: E402
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal  # noqa: E402
from numpyro.primitives import mutable  # noqa: E402

WORDS = 100


def eight_schools(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


def logistic(x, group, y):
    w = numpyro.sample("w", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("groups", 20):
        a = numpyro.sample("a", dist.Normal(mu, tau))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=a[group] + x @ w), obs=y)


def radon(x, county, y):
    mu = numpyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(2), 10.0).to_event(1))
    sigma = numpyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    noise = numpyro.sample("sigma_y", dist.HalfNormal(1.0))
    with numpyro.plate("counties", 85):
        raw = numpyro.sample("alpha_raw", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y)):
        mean = (mu + sigma * raw)[county] + x @ beta
        numpyro.sample("log_radon", dist.Normal(mean, noise), obs=y)


def normals(y):
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def bnn(x, y, hidden=50):
    def weights(name, *shape):
        scale = shape[0] ** -0.5 if len(shape) > 1 else 1.0
        return numpyro.sample(name, dist.Normal(jnp.zeros(shape), scale).to_event(len(shape)))

    w1, b1 = weights("w1", x.shape[1], hidden), weights("b1", hidden)
    w2, b2 = weights("w2", hidden, 1), weights("b2", 1)
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y)):
        mean = (jax.nn.relu(x @ w1 + b1) @ w2 + b2)[..., 0]
        numpyro.sample("y", dist.Normal(mean, sigma), obs=y)


def linear(name, inputs, outputs, bias=True):
    """A layer with torch's initial weights."""
    bound = 1 / math.sqrt(inputs)

    def init(shape):
        return lambda key: random.uniform(key, shape, minval=-bound, maxval=bound)

    w = numpyro.param(f"{name}.w", init((inputs, outputs)))
    b = numpyro.param(f"{name}.b", init((outputs,))) if bias else 0.0
    return lambda x: x @ w + b


def vae(data, hidden, latents):
    def model(y):
        first, last = linear("d1", latents, hidden), linear("d2", hidden, data)
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latents), 1.0).to_event(1))
            logits = last(jax.nn.relu(first(z)))
            numpyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    def guide(y):
        first, last = linear("e1", data, hidden), linear("e2", hidden, 2 * latents)
        loc, log_scale = jnp.split(last(jax.nn.relu(first(y))), 2, -1)
        with numpyro.plate("rows", len(y)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide


def dropout(x, rate=0.2):
    keep = random.bernoulli(numpyro.prng_key(), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0.0)


def norm(name, x):
    """Batch normalisation, with its running statistics."""
    size = x.shape[-1]
    w, b = numpyro.param(f"{name}.w", jnp.ones(size)), numpyro.param(f"{name}.b", jnp.zeros(size))
    running = mutable(name, {"mean": jnp.zeros(size), "var": jnp.ones(size)})
    mean, var = x.mean(0), x.var(0)
    running["mean"] = 0.9 * running["mean"] + 0.1 * jax.lax.stop_gradient(mean)
    unbiased = jax.lax.stop_gradient(var) * (len(x) / (len(x) - 1))
    running["var"] = 0.9 * running["var"] + 0.1 * unbiased
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * w + b


def prodlda(data, hidden, latents):
    def model(y):
        words = linear("words", latents, data, bias=False)
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latents), 1.0).to_event(1))
            logits = norm("norm", words(dropout(jax.nn.softmax(z))))
            numpyro.sample("y", dist.Multinomial(WORDS, logits=logits), obs=y)

    def guide(y):
        first, second = linear("first", data, hidden), linear("second", hidden, hidden)
        h = dropout(jax.nn.softplus(second(jax.nn.softplus(first(y)))))
        loc = norm("norm_loc", linear("loc", hidden, latents)(h))
        log_scale = norm("norm_scale", linear("log_scale", hidden, latents)(h))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(0.5 * log_scale)).to_event(1))

    return model, guide


FIXED = {
    "eight_schools": eight_schools,
    "logistic": logistic,
    "radon": radon,
    "bnn": bnn,
    "normals": normals,
}
NETWORKS = {"vae": vae, "prodlda": prodlda}
GUIDES = {"mean_field": AutoNormal, "full_rank": AutoMultivariateNormal}


class Run:
    """One problem under one way of running it: "jit" a step a call, "scan" many.

    Args:
        folder, name: of the problem's files.
        full_rank: whether the normal has correlations.
    """

    def __init__(self, folder: Path, name: str, way: str, guide: str = "mean_field"):
        spec = json.loads((folder / f"{name}.json").read_text())
        arrays = np.load(folder / f"{name}.npz")
        order = list(arrays.keys())
        self.data = tuple(jnp.asarray(arrays[key]) for key in order)
        self.rows, self.batch = len(arrays[order[0]]), spec["batch"]
        like, particles = spec["like"], spec["particles"]
        if like in NETWORKS:
            model, program = NETWORKS[like](**spec["sizes"])
        else:
            model = FIXED[like]
            program = GUIDES[guide](model, init_scale=0.1)
        losses: dict[str, Callable] = {
            "elbo": partial(Trace_ELBO, particles),
            "kl": partial(TraceMeanField_ELBO, particles),
            "iwae": partial(RenyiELBO, 0.0, particles),
        }
        optimizer = numpyro.optim.Adam(spec["rate"])
        self.guide: Any = program
        self.svi = SVI(model, program, optimizer, losses[spec["bound"]]())
        self.way, self.order = way, np.random.default_rng(0)
        first = jnp.arange(self.batch) if self.batch else None
        self.state = self.svi.init(random.PRNGKey(0), *self._rows(self.data, first))
        self.step = jax.jit(self._step, donate_argnums=0)
        self.scan = jax.jit(self._scan, static_argnums=3, donate_argnums=0)
        self.queue: list[np.ndarray] = []
        self.chunk, self.loss, self.compile = 1, 0.0, 0.0

    def _rows(self, data: tuple, rows: Any) -> tuple:
        return data if rows is None else tuple(x[rows] for x in data)

    def _step(self, state: Any, data: tuple, rows: Any) -> tuple[Any, Any]:
        return self.svi.update(state, *self._rows(data, rows))

    def _scan(self, state: Any, data: tuple, rows: Any, length: int) -> tuple[Any, Any]:
        body = lambda s, r: self._step(s, data, r)  # noqa: E731
        return jax.lax.scan(body, state, rows, length)

    def _next(self) -> Any:
        """The next batch of shuffled rows."""
        if not self.batch:
            return None
        if not self.queue:
            order = self.order.permutation(self.rows)
            count = self.rows // self.batch
            self.queue = list(order[: count * self.batch].reshape(count, -1))
        return self.queue.pop()

    def advance(self, steps: int) -> float:
        """Seconds that so many steps take."""
        begun, loss = time.perf_counter(), jnp.nan
        if self.way == "jit":
            for _ in range(steps):
                self.state, loss = self.step(self.state, self.data, self._next())
        else:
            rows = (
                jnp.asarray(np.stack([self._next() for _ in range(steps)])) if self.batch else None
            )
            self.state, losses = self.scan(self.state, self.data, rows, steps)
            loss = losses[-20:].mean()
        self.loss = float(loss)
        return time.perf_counter() - begun

    def prepare(self) -> None:
        """Compile, and find how many steps are worth a call."""
        begun = time.perf_counter()
        self.advance(1 if self.way == "jit" else 20)
        self.compile = time.perf_counter() - begun
        if self.way == "jit":
            self.chunk = 50 if self.advance(5) < 0.05 else 5
            return
        each = min(self.advance(20) for _ in range(3)) / 20
        self.chunk = 1000 if each < 2e-4 else 100 if each < 2e-3 else 20
        if self.chunk != 20:
            self.compile = self.advance(self.chunk) - self.chunk * each

    def burst(self, seconds: float) -> dict[str, float]:
        """Seconds of a step, over about so many of them."""
        total, steps, used = 0.0, 0, time.process_time()
        while total < seconds:
            total += self.advance(self.chunk)
            steps += self.chunk
        share = (time.process_time() - used) / total  # of a core
        step = total / steps
        return {"step": step, "compile": self.compile, "loss": self.loss, "share": share}

    def means(self, draws: int) -> dict[str, list]:
        """Means of all latents of a normal guide, and of radon's counties."""
        params = self.svi.get_params(self.state)
        found = self.guide.sample_posterior(random.PRNGKey(1), params, sample_shape=(draws,))
        if "alpha_raw" in found:
            raw, mu = found.pop("alpha_raw"), found["mu_alpha"][:, None]
            found["alpha"] = mu + found["sigma_alpha"][:, None] * raw
        return {k: np.asarray(v, np.float64).mean(0).tolist() for k, v in found.items()}


def peak() -> float:
    """The most memory that this process has had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now() -> float:
    """The memory that this process has at the moment, MB; `peak` starts from it where Linux can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def answer(runs: dict[tuple, Run], folder: Path, ask: dict[str, Any]) -> dict[str, Any]:
    """Do what a request says."""
    kind = ask.pop("kind")
    if kind == "hello":
        versions = {"numpyro": numpyro.__version__, "jax": jax.__version__}
        return {**versions, "backend": jax.default_backend(), "peak": peak()}
    if kind == "now":
        return {"peak": now()}
    if kind == "nuts":
        return nuts(folder, ask["name"])
    seconds = ask.pop("seconds", 0.0)
    steps, draws = ask.pop("steps", 0), ask.pop("draws", 0)
    key = tuple(sorted(ask.items()))
    begun = time.perf_counter()
    if key not in runs:
        runs[key] = Run(folder, **ask)
        if seconds:
            runs[key].prepare()
    run = runs[key]
    if kind == "burst":
        return {**run.burst(seconds), "peak": peak()}
    run.advance(steps)
    spent = time.perf_counter() - begun  # compilation is a part of it
    means = run.means(draws) if draws else {}
    return {"seconds": spent, "loss": run.loss, "means": means}


def nuts(folder: Path, name: str) -> dict[str, Any]:
    """Means and sds from a long run of NUTS: what fits are held against."""
    from numpyro.infer import MCMC, NUTS

    arrays = np.load(folder / f"{name}.npz")
    kernel = NUTS(FIXED[name], target_accept_prob=0.95)
    chain = MCMC(kernel, num_warmup=2000, num_samples=10_000, progress_bar=False)
    chain.run(random.PRNGKey(0), *(jnp.asarray(arrays[k]) for k in arrays))
    found = chain.get_samples()
    if "alpha_raw" in found:
        raw, mu = found.pop("alpha_raw"), found["mu_alpha"][:, None]
        found["alpha"] = mu + found["sigma_alpha"][:, None] * raw
    host = {k: np.asarray(v, np.float64) for k, v in found.items()}
    return {
        "means": {k: v.mean(0).tolist() for k, v in host.items()},
        "sds": {k: v.std(0).tolist() for k, v in host.items()},
    }


def main() -> None:
    folder, runs = Path(sys.argv[1]), {}
    for line in sys.stdin:
        try:
            found = answer(runs, folder, json.loads(line))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
