"""Where pvi's values differ from Pyro's: both beside the exact value, in one run.

Bounds are in nats; Pyro's are its loss with the sign changed. `docs/from_pyro.md` explains each.
"""

import math
import time
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor

import pvi
from benchmarks.common import parser, report
from benchmarks.parity import evaluate, minibatch
from pvi.errors import PviError
from tests.scenarios import (
    Case,
    isolated,
    mean_se,
    nested_guide,
    nested_model,
    normal,
    normal_log_z,
    param,
    positive,
    power_mean,
    randn,
    repeat,
)

BATCHED = {"vectorize_particles": True, "max_plate_nesting": 1}
REPEATS = 400
ENTROPY = 0.5 * math.log(2 * math.pi * math.e)  # of a standard normal
EXACT_KL = TraceMeanField_ELBO(num_particles=16, **BATCHED), pvi.TraceMeanFieldELBO(16)
Row = list[Any]


def compare(theirs: Any, ours: Any, model: Callable, guide: Callable, *args: Any) -> Row:
    """Means and standard errors of both bounds, or the name of the error that one raises."""
    row: Row = []
    for objective in (theirs, ours):
        try:
            values = repeat(lambda o=objective: -o.loss(model, guide, *args), REPEATS)
            row += [float(part) for part in mean_se(values)]
        except (PviError, ValueError) as error:
            row += [f"raises {type(error).__name__}", None]
    return row


def minibatches(seed: int) -> list[Row]:
    """Importance weights under subsampling."""
    _, ours, ours_se, theirs, theirs_se, exact, _, _ = minibatch(10, 200, seed)
    cells = [theirs, theirs_se, ours, ours_se, exact, "100,000 draws"]
    return [["minibatches", "IWAE, K = 5, 10 of 50 rows", *cells]]


def globals_above_locals() -> list[Row]:
    """Two bounds that are both right: whole draws weighted, or each datum's own latent."""
    x = 1.7 * randn(50)
    precision = 1 + len(x) / 2
    loc, scale = float(x.sum()) / 2 / precision, precision**-0.5

    def good_theta(x: Tensor) -> None:
        """theta from its posterior, z from its prior."""
        theta = pyro.sample("theta", dist.Normal(loc, scale))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(theta, 1.0))

    theirs = RenyiELBO(alpha=0.0, num_particles=10, **BATCHED)
    rows = []
    for name, guide in {"good": good_theta, "poor": nested_guide}.items():
        for scope in ("auto", "joint"):
            ours = pvi.RenyiELBO(0.0, 10, bound=scope)
            cells = compare(theirs, ours, nested_model, guide, x)
            setting = f"IWAE, K = 10, {name} guide of the global, bound='{scope}'"
            rows.append(["globals above locals", setting, *cells, normal_log_z(x, 1.0), "log Z"])
    return rows


def scaled_prior() -> list[Row]:
    """A prior that counts a tenth, in the model only."""
    size, loc, sd = 10, 0.5, 0.3

    def model() -> None:
        with pyro.plate("rows", size):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(size))

    def guide() -> None:
        with pyro.plate("rows", size):
            pyro.sample("z", dist.Normal(param("loc", loc), sd))

    log_p = -0.5 * math.log(2 * math.pi) - 0.5 * (loc**2 + sd**2)
    likelihood = -0.5 * math.log(2 * math.pi) - 0.5 * ((1 - loc) ** 2 + sd**2)
    exact = size * (likelihood + 0.1 * log_p + ENTROPY + math.log(sd))
    cells = compare(*EXACT_KL, model, guide)
    return [["exact KL", "prior scaled by 0.1 in the model", *cells, exact, "closed form"]]


def bottom_up() -> list[Row]:
    """A guide that draws the lower layer first: low ~ N(m, s), top | low ~ N(b low, t)."""
    x = torch.linspace(-2.0, 2.0, 5)
    a, s, b, t = 0.6, 0.5, 0.7, 0.4

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            low = pyro.sample("low", dist.Normal(top, 1.0))
            pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            low = pyro.sample("low", dist.Normal(a * x, s))
            pyro.sample("top", dist.Normal(b * low, t))

    square = (a * x) ** 2 + s**2  # E low^2
    quadratic = b**2 * square + t**2 + (1 - b) ** 2 * square + t**2 + ((1 - a) * x) ** 2 + s**2
    exact = -1.5 * math.log(2 * math.pi) - 0.5 * quadratic + 2 * ENTROPY + math.log(s * t)
    cells = compare(*EXACT_KL, model, guide, x)
    return [
        ["exact KL", "guide draws the lower layer first", *cells, float(exact.sum()), "closed form"]
    ]


def jacobian() -> list[Row]:
    """An Auto* guide on a positive site: u ~ N(m, s), rate = exp(u)."""
    x, m, s, shape, rate = randn(5).abs(), 0.4, 0.3, 3.0, 2.0

    def model(x: Tensor) -> None:
        value = pyro.sample("rate", dist.Gamma(shape, rate))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(value), obs=x)

    start = init_to_value(values={"rate": torch.tensor(m).exp()})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=s)
    mean = math.exp(m + s**2 / 2)  # E rate
    likelihood = len(x) * m - float(x.sum()) * mean
    prior = shape * math.log(rate) - math.lgamma(shape) + (shape - 1) * m - rate * mean
    exact = likelihood + prior + m + ENTROPY + math.log(s)  # m: the Jacobian, E log(d rate / d u)
    cells = compare(*EXACT_KL, model, guide, x)
    return [["exact KL", "AutoNormal of a positive site", *cells, exact, "closed form"]]


# Discrete guides: the gradient of the loss.


def coin_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        coin = pyro.sample("coin", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(2 * coin, 0.7), obs=x)


def coin_guide(x: Tensor) -> None:
    logit = param("logit", 0.2)
    with pyro.plate("data", len(x)):
        coin = dist.Bernoulli(logits=logit.expand(len(x)))
        pyro.sample("coin", coin, infer={"baseline": {"use_decaying_avg_baseline": True}})


def coin_gradient(x: Tensor, alpha: float, num_particles: int) -> float:
    """By enumeration of all outcomes of all particles."""
    logit = torch.tensor(0.2, requires_grad=True)
    q, total = dist.Bernoulli(logits=logit), torch.zeros(())
    for outcome in product((0.0, 1.0), repeat=num_particles):
        coins = torch.tensor(outcome).unsqueeze(-1)
        log_w = dist.Bernoulli(0.4).log_prob(coins) + normal(x, 2 * coins, 0.7) - q.log_prob(coins)
        total = total - q.log_prob(coins).sum().exp() * power_mean(log_w, alpha).sum()
    return float(torch.autograd.grad(total, logit)[0])


def inclusive_gradient(x: Tensor) -> float:
    """Of -E log q(coin) under the posterior, which wake-sleep aims at."""
    logit = torch.tensor(0.2, requires_grad=True)
    coins = torch.tensor([[0.0], [1.0]])
    log_joint = dist.Bernoulli(0.4).log_prob(coins) + normal(x, 2 * coins, 0.7)
    log_q = dist.Bernoulli(logits=logit).log_prob(coins)
    loss = -(log_joint.softmax(0) * log_q).sum()
    return float(torch.autograd.grad(loss, logit)[0])


def logit_gradients(objective: Any, guide: Callable, x: Tensor, times: int = 2000) -> Tensor:
    """Independent gradients `(times,)`."""
    pyro.clear_param_store()
    guide(x)
    leaf, found = pyro.param("logit").unconstrained(), []
    for _ in range(times):
        leaf.grad = None
        objective.loss_and_grads(coin_model, guide, x)
        found.append(float(leaf.grad))
    return torch.tensor(found)


def discrete() -> list[Row]:
    """Means of the gradients of a discrete guide, and the sd of one of them."""
    x, k = torch.tensor([1.0, -0.5, 2.0, 0.3]), 4
    options = {"num_particles": k, **BATCHED}
    elbo, iwae = coin_gradient(x, 1.0, k), coin_gradient(x, 0.0, k)
    marked = config_enumerate(coin_guide, "parallel")
    cases = [
        ("RenyiELBO(0)", coin_guide, RenyiELBO(alpha=0.0, **options), pvi.IWAE(k), iwae),
        ("Trace_ELBO", coin_guide, Trace_ELBO(**options), pvi.ELBO(k), elbo),
        ("TraceGraph_ELBO, baseline", coin_guide, TraceGraph_ELBO(**options), pvi.ELBO(k), elbo),
        ("TraceEnum_ELBO", marked, TraceEnum_ELBO(max_plate_nesting=1), pvi.ELBO(), elbo),
        (
            "ReweightedWakeSleep",
            coin_guide,
            ReweightedWakeSleep(**options),
            pvi.ReweightedWakeSleep(k),
            inclusive_gradient(x),
        ),
    ]
    rows = []
    for name, guide, theirs, ours, exact in cases:
        found = [logit_gradients(objective, guide, x) for objective in (theirs, ours)]
        means = [float(part) for values in found for part in mean_se(values)]
        sds = [cell for values in found for cell in (float(values.std()), None)]
        by = "large K" if "Wake" in name else "enumeration"
        rows.append(["discrete guide", f"{name}, K = 4, mean gradient", *means, exact, by])
        rows.append(["discrete guide", f"{name}, K = 4, sd of gradient", *sds, None, ""])
    return rows


# Shapes.


def slope_model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


def slope_guide(x: Tensor, y: Tensor) -> None:
    pyro.sample("w", dist.Normal(param("loc", 0.2), positive("scale", 0.3)))


def columns() -> list[Row]:
    """A column `(N, 1)` where the model expects `(N,)`."""
    x, y, m, s = randn(6), randn(6, seed=1), 0.2, 0.3
    quadratic = ((y - m * x) ** 2 + s**2 * x**2).sum() + m**2 + s**2
    exact = -3.5 * math.log(2 * math.pi) - 0.5 * float(quadratic) + ENTROPY + math.log(s)
    settings = {
        "y is a column": (1, (x, y.unsqueeze(-1)), True),
        "x is a column, K = N = 6 batched": (6, (x.unsqueeze(-1), y), True),
        "y is a column, validation off": (1, (x, y.unsqueeze(-1)), False),
    }
    rows = []
    for name, (k, data, validate) in settings.items():
        theirs = Trace_ELBO(num_particles=k, **(BATCHED if k > 1 else {}))
        with pyro.validation_enabled(validate):
            cells = compare(theirs, pvi.ELBO(k), slope_model, slope_guide, *data)
        rows.append(["columns", f"ELBO, {name}", *cells, exact, "closed form"])
    return rows


def defaults() -> list[Row]:
    """Milliseconds of processor time of one step with 16 particles: the median of 60, in turns."""
    case = Case(nested_model, nested_guide, (randn(50),), 1)
    case.guide(*case.args)
    rows = []
    for name, extra in {"as they are": {}, "batched by hand in Pyro": BATCHED}.items():
        objectives = Trace_ELBO(num_particles=16, **extra), pvi.ELBO(16)
        spent: list[list[float]] = [[], []]
        for i in range(60):
            for objective, times in zip(objectives, spent, strict=True):
                start = time.process_time()
                evaluate(objective, case, i)
                times.append(1e3 * (time.process_time() - start))
        theirs, ours = (sorted(times)[30] for times in spent)
        rows.append(
            ["defaults", f"ELBO(16), {name}, ms a step", theirs, None, ours, None, None, ""]
        )
    return rows


def main() -> None:
    options = parser(__doc__).parse_args()
    rows: list[Row] = []
    parts = [globals_above_locals, scaled_prior, bottom_up, jacobian, discrete, columns, defaults]
    for part in [lambda: minibatches(options.seed), *parts]:
        with isolated(seed=options.seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pyro's, about the order of the sites
            rows += part()
    header = ["difference", "quantity", "Pyro", "Pyro se", "pvi", "pvi se", "exact", "exact by"]
    report("from_pyro", header, rows, options.results)


if __name__ == "__main__":
    main()
