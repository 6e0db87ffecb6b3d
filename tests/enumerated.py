"""Models with discrete sites to sum over, and their guides."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor

from tests.scenarios import FixedNoise, param, positive, randn

MARK: Any = {"enumerate": "parallel"}
X = randn(3, seed=1).double()
LOCS = torch.tensor([-1.0, 2.0]).double()
PROBS = torch.tensor([0.3, 0.7]).double()
STEP = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).double()


@dataclass(frozen=True)
class Case:
    """A model and a guide, with the enumerated sites and the shapes of their draws.

    Args:
        nesting: number of plate dimensions.
        noise: draws of the guide's sites may be given, so that runs can be compared.
    """

    model: Callable
    guide: Callable
    args: tuple
    sums: Mapping[str, tuple[int, ...]]
    nesting: int = 1
    mixed: tuple[str, ...] = field(default=())


def noisy(name: str, shape: tuple[int, ...] = ()) -> dist.Normal:
    """A guide's normal for K <= 4 particles whose draws are fixed, with its own parameters."""
    noise = randn(5, *shape, seed=sum(map(ord, name)))
    loc, scale = param(f"{name}_loc", 0.3 * noise[4]), positive(f"{name}_sd", 0.7)
    return FixedNoise(loc, scale.expand(shape), noise[:4])


def mu_guide(x: Tensor) -> None:
    pyro.sample("mu", noisy("mu", (2,)).to_event(1))


def z_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", noisy("z", (len(x),)))


def nothing(x: Tensor) -> None:
    """A guide of no latents."""


def _mixture() -> Case:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(param("probs", PROBS)), infer=MARK)
            pyro.sample("x", dist.Normal(Vindex(mu)[..., k], 0.5), obs=x)

    return Case(model, mu_guide, (X,), {"k": (3,)})


def _mixture_prior() -> Case:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PROBS), infer=MARK)
            z = pyro.sample("z", dist.Normal(param("locs", LOCS)[k], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Case(model, z_guide, (X,), {"k": (3,)})


def _prior_and_likelihood() -> Case:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer=MARK)
            z = pyro.sample("z", dist.Normal(2.0 * k, 1.0))
            pyro.sample("x", dist.Normal(z + param("shift", 0.4) * k, 1.0), obs=x)

    return Case(model, z_guide, (X,), {"k": (3,)}, mixed=("z",))


def _chain() -> Case:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        step, k = param("step", STEP), 0
        for t in pyro.markov(range(len(x))):
            k = pyro.sample(f"k{t}", dist.Categorical(step[k]), infer=MARK)
            pyro.sample(f"x{t}", dist.Normal(Vindex(mu)[..., k], 0.5), obs=x[t])

    return Case(model, mu_guide, (randn(5),), {f"k{t}": () for t in range(5)}, 0)


def _chains_in_a_plate() -> Case:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        k: Any = 0
        with pyro.plate("sequences", 2):
            for t in pyro.markov(range(3)):
                keep = torch.tensor([True, t < 2])  # sequences of two lengths
                with poutine.mask(mask=keep):
                    k = pyro.sample(f"k{t}", dist.Categorical(STEP[k]), infer=MARK)
                    pyro.sample(f"x{t}", dist.Normal(Vindex(mu)[..., k], 0.5), obs=x[t])

    return Case(model, mu_guide, (randn(3, 2),), {f"k{t}": (2,) for t in range(3)})


def _global() -> Case:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(PROBS), infer=MARK)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(LOCS[k], 1.0))
            pyro.sample("x", dist.Normal(z, param("noise", 0.8)), obs=x)

    return Case(model, z_guide, (X,), {"k": ()}, mixed=("z",))


def _two_observations() -> Case:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.sigmoid(w)), infer=MARK)
            j = pyro.sample("j", dist.Categorical(STEP[k.long()]), infer=MARK)
            pyro.sample("x", dist.Normal(k + j, 1.0), obs=x)
            pyro.sample("y", dist.Normal(w * j, 1.0), obs=-x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", noisy("w"))

    return Case(model, guide, (X,), {"k": (3,), "j": (3,)})


def _nested_plates() -> Case:
    def model(x: Tensor) -> None:
        with pyro.plate("groups", 2, dim=-2):
            k = pyro.sample("k", dist.Categorical(PROBS), infer=MARK)
            with pyro.plate("rows", 2, dim=-1):
                j = pyro.sample("j", dist.Bernoulli(0.2 + 0.5 * k), infer=MARK)
                pyro.sample("x", dist.Normal(param("m", LOCS)[k] + j, 1.0), obs=x)

    return Case(model, nothing, (randn(2, 2),), {"k": (2, 1), "j": (2, 2)}, 2)


def _crossed_plates() -> Case:
    def model(x: Tensor) -> None:
        users, items = pyro.plate("users", 3, dim=-2), pyro.plate("items", 2, dim=-1)
        with users:
            k = pyro.sample("k", dist.Categorical(PROBS), infer=MARK)
        with items:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with users, items:
            pyro.sample("x", dist.Normal(LOCS[k] + z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("items", 2, dim=-1):
            pyro.sample("z", noisy("z", (2,)))

    return Case(model, guide, (randn(3, 2),), {"k": (3, 1)}, 2)


def _masked() -> Case:
    case = _prior_and_likelihood()
    keep = torch.tensor([True, False, True])
    return Case(
        poutine.mask(case.model, mask=keep),
        poutine.mask(case.guide, mask=keep),
        case.args,
        case.sums,
        mixed=case.mixed,
    )


def _observed_in_part() -> Case:
    def model(x: Tensor) -> None:
        seen, b = torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, 0.0])
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(param("p", 0.4)), obs=b, obs_mask=seen)
            pyro.sample("x", dist.Normal(2.0 * b, 1.0), obs=x)

    return Case(config_enumerate(model), nothing, (X,), {"b_unobserved": (3,)})


def _two_latents() -> Case:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PROBS), infer=MARK)
            z = pyro.sample("z", dist.Normal(LOCS[k], 1.0))
            u = pyro.sample("u", dist.Normal(z * LOCS[k], 1.0))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", noisy("z", (len(x),)))
            pyro.sample("u", noisy("u", (len(x),)))

    return Case(model, guide, (X,), {"k": (3,)}, mixed=("z", "u"))


def _one_value() -> Case:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(1)), infer=MARK)
            z = pyro.sample("z", dist.Normal(LOCS[k], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Case(model, z_guide, (X,), {"k": (3,)})


def _vectors() -> Case:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.OneHotCategorical(PROBS), infer=MARK)
            pyro.sample("x", dist.Normal(k @ param("locs", LOCS), 1.0), obs=x)

    return Case(model, nothing, (X,), {"k": (3,)})


SUMMED: dict[str, Callable[[], Case]] = {
    "mixture": _mixture,
    "mixture prior": _mixture_prior,
    "prior and likelihood": _prior_and_likelihood,
    "chain": _chain,
    "chains in a plate": _chains_in_a_plate,
    "global": _global,
    "two observations": _two_observations,
    "nested plates": _nested_plates,
    "crossed plates": _crossed_plates,
    "masked": _masked,
    "observed in part": _observed_in_part,
    "two latents": _two_latents,
    "one value": _one_value,
    "vectors": _vectors,
}


# Sites that the guide has too.


def k_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(logits=param("logits", randn(3, 2))), infer=MARK)


def _semi_supervised() -> Case:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PROBS))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + param("locs", LOCS)[k], 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            logits = param("logits", randn(3, 2, seed=2))
            k = pyro.sample("k", dist.Categorical(logits=logits), infer=MARK)
            loc = param("slope", 0.3) * (x - param("step", [0.1, 0.5])[k])
            pyro.sample("z", dist.Normal(loc, positive("sd", 0.7)))

    return Case(model, guide, (X,), {"k": (3,)})


def _chain_in_the_guide() -> Case:
    def model(x: Tensor) -> None:
        k = 0
        for t in pyro.markov(range(len(x))):
            k = pyro.sample(f"k{t}", dist.Categorical(param("p", STEP)[k]))
            pyro.sample(f"x{t}", dist.Normal(LOCS[k], 0.5), obs=x[t])

    def guide(x: Tensor) -> None:
        k, logits = 0, param("logits", randn(3, 2, 2, seed=2))
        for t in pyro.markov(range(len(x))):
            k = pyro.sample(f"k{t}", dist.Categorical(logits=logits[t][k]), infer=MARK)

    return Case(model, guide, (X,), {f"k{t}": () for t in range(3)}, 0)


def _global_and_local() -> Case:
    def model(x: Tensor) -> None:
        j = pyro.sample("j", dist.Bernoulli(0.4)).long()
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(STEP[j]))
            pyro.sample("x", dist.Normal(param("locs", LOCS)[k] + j, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        j = pyro.sample("j", dist.Bernoulli(param("p", 0.6)), infer=MARK).long()
        with pyro.plate("data", len(x)):
            logits = Vindex(param("logits", randn(3, 2, 2, seed=2)))
            k = logits[torch.arange(3), j]
            pyro.sample("k", dist.Categorical(logits=k), infer=MARK)

    return Case(model, guide, (X,), {"j": (), "k": (3,)})


def _guide_and_model() -> Case:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(param("probs", PROBS)))
            j = pyro.sample("j", dist.Bernoulli(0.2 + 0.5 * k), infer=MARK)
            pyro.sample("x", dist.Normal(LOCS[k] + j, 0.5), obs=x)

    return Case(model, k_guide, (X,), {"k": (3,)})


def _masked_guide() -> Case:
    case = _semi_supervised()
    keep = poutine.mask(mask=torch.tensor([True, False, True]))
    return Case(keep(case.model), keep(case.guide), (X,), case.sums)


AVERAGED: dict[str, Callable[[], Case]] = {
    "semi-supervised": _semi_supervised,
    "chain": _chain_in_the_guide,
    "global and local": _global_and_local,
    "guide and model": _guide_and_model,
    "masked": _masked_guide,
}
