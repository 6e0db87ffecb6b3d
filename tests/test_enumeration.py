"""Discrete sites that are summed over: against sums written out, and against Pyro."""

from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

import pvi
from pvi.errors import ObjectiveError
from tests.enumerated import AVERAGED, LOCS, MARK, PROBS, SUMMED, Case, X, k_guide, nothing
from tests.scenarios import EXACT, gradients, normal, param, positive, randn

pytestmark = pytest.mark.usefixtures("isolated")


def written_out(case: Case, guide_trace: Any) -> Tensor:
    """log sum over all joint values of the enumerated sites of p(x, z, k), by plain runs."""

    def trace(values: dict[str, Tensor]) -> Any:
        model = poutine.condition(case.model, data=values)
        return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*case.args)

    plain, options, twice = trace({}), [], 0.0
    for name, shape in case.sums.items():
        node, size = plain.nodes[name], torch.Size(shape).numel()
        support = node["fn"].enumerate_support(expand=False)
        support = support.reshape(len(support), *node["fn"].event_shape)
        indices = product(range(len(support)), repeat=size)
        whole = shape + support.shape[1:]
        options.append([support[list(i)].reshape(whole) for i in indices])
        mask = torch.as_tensor(True if node["mask"] is None else node["mask"])
        # where k is masked all its values count the same: 1 each instead of p(k)
        twice += float((~mask.expand(shape)).sum()) * torch.tensor(float(len(support))).log()
    joint = [trace(dict(zip(case.sums, v, strict=True))) for v in product(*options)]
    return torch.stack([t.log_prob_sum() for t in joint]).logsumexp(0) - twice


def value_and_gradients(objective: Any, case: Case) -> tuple[float, dict[str, Tensor]]:
    leaves = {n: p.unconstrained() for n, p in pyro.get_param_store().items()}
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(1)
    value = float(objective.loss_and_grads(case.model, case.guide, *case.args))
    zeros = {n: torch.zeros_like(p) for n, p in leaves.items()}
    return value, {n: zeros[n] if p.grad is None else p.grad for n, p in leaves.items()}


def check_against_pyro(case: Case, num_particles: int, batched: bool) -> None:
    options: dict[str, Any] = {"num_particles": num_particles, "vectorize_particles": batched}
    pyros = TraceEnum_ELBO(max_plate_nesting=case.nesting, **options)
    found = check_equal(pvi.ELBO(**options), pyros, case)
    assert all(float(g.abs().max()) > 1e-6 for g in found.values())


def check_equal(ours: Any, theirs: Any, case: Case) -> dict[str, Tensor]:
    value, found = value_and_gradients(ours, case)
    expected, wanted = value_and_gradients(theirs, case)
    assert value == pytest.approx(expected, abs=EXACT, rel=EXACT)
    torch.testing.assert_close(found, wanted, atol=EXACT, rtol=EXACT)
    return found


@pytest.mark.parametrize("name", SUMMED)
class TestSum:
    """Sites that only the model has."""

    def test_written_out(self, name: str) -> None:
        """Value and gradient of the ELBO and of log weights, one particle and several."""
        case = SUMMED[name]()
        guide_trace = poutine.trace(case.guide).get_trace(*case.args)
        expected = written_out(case, guide_trace) - guide_trace.log_prob_sum()
        loss = pvi.ELBO().differentiable_loss(case.model, case.guide, *case.args)
        torch.testing.assert_close(-loss, expected, atol=EXACT, rtol=EXACT)
        torch.testing.assert_close(gradients(loss), gradients(-expected), atol=EXACT, rtol=EXACT)
        for batched in (True, False):
            objective = pvi.ELBO(3, vectorize_particles=batched)
            terms = objective.terms(case.model, case.guide, *case.args)
            assert torch.isclose(terms.log_weights()[0], expected, atol=EXACT)

    @pytest.mark.parametrize("run", [(1, False), (3, True), (3, False)], ids=str)
    def test_pyro(self, name: str, run: tuple[int, bool]) -> None:
        case = SUMMED[name]()
        case.guide(*case.args)
        case.model(*case.args)
        check_against_pyro(case, *run)

    def test_particles_can_be_batched(self, name: str) -> None:
        case = SUMMED[name]()
        text = str(pvi.ELBO(2).explain(case.model, case.guide, *case.args))
        assert "particles: batched" in text
        for site in case.sums if name != "one value" else ():
            assert any(line.split()[:3] == [site, "summed", "out"] for line in text.splitlines())

    def test_weight(self, name: str) -> None:
        """A latent has a KL of its own unless its prior is in a sum with something else."""
        case = SUMMED[name]()
        for beta in [2.0, *({site: 2.0} for site in case.mixed)]:
            objective = pvi.BetaELBO(beta)
            if case.mixed:
                match = f"site '[{''.join(case.mixed)}]' has no KL"
                with pytest.raises(ObjectiveError, match=match):
                    objective.bound(case.model, case.guide, *case.args)
            else:
                with torch.no_grad():
                    terms = objective.terms(case.model, case.guide, *case.args)
                expected = 2.0 * sum(terms.kl().values()) - terms.log_likelihood()[0]
                loss = objective.loss(case.model, case.guide, *case.args)
                assert loss == pytest.approx(float(expected), abs=EXACT)


@pytest.mark.parametrize("name", AVERAGED)
class TestMean:
    """Sites that the guide enumerates."""

    @pytest.mark.parametrize("run", [(1, False), (3, True), (3, False)], ids=str)
    def test_pyro(self, name: str, run: tuple[int, bool]) -> None:
        case = AVERAGED[name]()
        case.guide(*case.args)
        case.model(*case.args)
        check_against_pyro(case, *run)

    def test_explain(self, name: str) -> None:
        case = AVERAGED[name]()
        text = str(pvi.ELBO(2).explain(case.model, case.guide, *case.args))
        assert "particles: batched" in text
        rows = {line.split()[0]: line for line in text.splitlines()}
        assert all("exact sum" in rows[site] and "score" not in rows[site] for site in case.sums)

    @pytest.mark.parametrize("objective", [pvi.IWAE(3), pvi.ELBO(gradient="score")])
    def test_other_objectives(self, name: str, objective: pvi.Objective) -> None:
        case = AVERAGED[name]()
        with pytest.raises(ObjectiveError, match="leave it out of the guide, or use such an ELBO"):
            objective.loss(case.model, case.guide, *case.args)


class TestMeanWrittenOut:
    @pytest.mark.parametrize("kl", ["sample", "exact"])
    @pytest.mark.parametrize("name", ["chain", "global and local", "guide and model"])
    def test_discrete(self, name: str, kl: Any) -> None:
        """Guides of discrete sites only: sum_k q(k) (log p(x, k) - log q(k)) has no noise."""
        case, total = AVERAGED[name](), torch.zeros(())
        shapes = {n: torch.Size(s) for n, s in case.sums.items()}
        for bits in product([0, 1], repeat=sum(s.numel() for s in shapes.values())):
            flat = list(torch.tensor(bits).split([s.numel() for s in shapes.values()]))
            values = {n: v.reshape(s) for (n, s), v in zip(shapes.items(), flat, strict=True)}
            values = {n: v.double() if n == "j" else v for n, v in values.items()}
            fixed = poutine.condition(case.guide, data=values)
            log_q = poutine.trace(fixed).get_trace(*case.args).log_prob_sum()
            model = poutine.condition(case.model, data=values)
            if name == "guide and model":
                log_p = written_out(Case(model, nothing, case.args, {"j": (3,)}), poutine.Trace())
            else:
                log_p = poutine.trace(model).get_trace(*case.args).log_prob_sum()
            total = total + log_q.exp() * (log_p - log_q)
        loss = pvi.ELBO(kl=kl).differentiable_loss(case.model, case.guide, *case.args)
        torch.testing.assert_close(-loss, total, atol=EXACT, rtol=EXACT)
        torch.testing.assert_close(gradients(loss), gradients(-total), atol=EXACT, rtol=EXACT)

    def test_exact_kl(self) -> None:
        """sum_k q(k) KL(q(z | k) || p(z | k)) and the KL of k, where x does not depend on them."""

        def model() -> None:
            with pyro.plate("data", 3):
                k = pyro.sample("k", dist.Categorical(PROBS))
                pyro.sample("z", dist.Normal(LOCS[k], 2.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.7))

        def guide() -> None:
            logits, locs = param("logits", randn(3, 2)), param("locs", [0.4, -0.3])
            with pyro.plate("data", 3):
                k = pyro.sample("k", dist.Categorical(logits=logits), infer=MARK)
                pyro.sample("z", dist.Normal(locs[k], positive("sd", 0.7)))

        loss = pvi.BetaELBO({"z": 3.0}, 2, kl="exact").differentiable_loss(model, guide)
        q, sd = pyro.param("logits").softmax(-1), pyro.param("sd")
        gap = pyro.param("locs") - LOCS
        kl = (2.0 / sd).log() + (sd**2 + gap**2) / 8.0 - 0.5
        expected = (q * (q.log() - PROBS.log() + 3.0 * kl)).sum() - normal(0.7, 0.0, 1.0)
        torch.testing.assert_close(loss, expected, atol=EXACT, rtol=EXACT)
        torch.testing.assert_close(gradients(loss), gradients(expected), atol=EXACT, rtol=EXACT)

    @pytest.mark.parametrize("first", [0, 1])
    def test_labels_of_some(self, first: int) -> None:
        """One objective for data with labels and without, in any order, as Pyro's."""

        def model(x: Tensor, k: Tensor | None = None) -> None:
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(PROBS), obs=k)
                pyro.sample("x", dist.Normal(param("locs", LOCS)[k], 0.5), obs=x)

        def guide(x: Tensor, k: Tensor | None = None) -> None:
            if k is None:
                k_guide(x)

        ours = pvi.ELBO()
        theirs = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
        guide(X)
        model(X)
        for labels in [None, torch.tensor([0, 1, 1])][:: 1 if first else -1] * 2:
            check_equal(ours, theirs, Case(model, guide, (X, labels), {}))
