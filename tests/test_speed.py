"""The contenders of `benchmarks.speed` do the same work: hand-written losses are the programs'."""

from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to

import pvi
from benchmarks import speed_hand
from benchmarks.speed_problems import make_problems
from tests.scenarios import isolated, mean_se, repeat

NORMAL = ("eight_schools", "logistic", "radon", "bnn32")


@pytest.mark.parametrize("name", NORMAL)
def test_densities_by_hand(name: str) -> None:
    """At two points of unconstrained space, to single precision."""
    problem = make_problems([name])[name]
    model, _ = problem.programs()
    data = problem.tensors()
    density = getattr(speed_hand, problem.like)
    with isolated(torch.float32, 0):
        trace = poutine.trace(model).get_trace(*data)
        sites = [n for n in trace.stochastic_nodes if trace.nodes[n]["type"] == "sample"]
        sites = [n for n in sites if not type(trace.nodes[n]["fn"]).__name__.startswith("_Sub")]
        for _ in range(2):
            values, parts, jacobians = {}, [], torch.zeros(())
            for site in sites:
                node: Any = trace.nodes[site]
                u = 0.3 * torch.randn(node["value"].shape)
                transform = biject_to(node["fn"].support)
                values[site] = transform(u)
                jacobians = jacobians + transform.log_abs_det_jacobian(u, values[site]).sum()
                parts.append(u.reshape(-1))
            log_joint = poutine.trace(pyro.condition(model, values)).get_trace(*data).log_prob_sum()
            by_hand = density(torch.cat(parts)[None], *data)
            assert by_hand.shape == (1,)
            assert torch.allclose(by_hand[0], log_joint + jacobians, rtol=2e-5)


@pytest.mark.parametrize("name", ["vae", "iwae", "prodlda"])
def test_networks_by_hand(name: str) -> None:
    """Mean losses over draws agree, at the same weights."""
    problem = make_problems([name])[name]
    kinds = {"kl": pvi.TraceMeanFieldELBO, "iwae": pvi.IWAE}
    objective = kinds[problem.bound](problem.particles)
    rows = tuple(x[:8] for x in problem.tensors())
    with isolated(torch.float32, 0):
        model, guide = problem.programs()
        torch.manual_seed(1)
        leaves, loss = speed_hand.by_hand(problem)
        pyro.clear_param_store()
        poutine.trace(guide).get_trace(*rows)
        poutine.trace(model).get_trace(*rows)
        store = [p for p in pyro.get_param_store().values() if p.requires_grad]
        assert [p.shape for p in store] == [p.shape for p in leaves]
        with torch.no_grad():
            for ours, theirs in zip(store, leaves, strict=True):
                theirs.copy_(ours)
            one = mean_se(repeat(lambda: float(loss(*rows)), 40))
            other = mean_se(repeat(lambda: float(objective.loss(model, guide, *rows)), 40))
        assert abs(one[0] - other[0]) < 4 * (one[1] ** 2 + other[1] ** 2).sqrt()
