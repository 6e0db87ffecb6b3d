"""Reweighted wake-sleep as a gradient: two or three phases, each with its own loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pvi.engine.bounds import raised
from pvi.engine.custom import WeightedDraws
from pvi.engine.simulate import Simulated, replayed, simulate
from pvi.engine.traces import density, is_delta, run, sample_nodes, total_log_prob
from pvi.errors import ObjectiveError


@dataclass(frozen=True)
class Wake:
    """The gradient of reweighted wake-sleep (Bornschein and Bengio 2015; Le et al. 2019).

    With normalised weights v of K draws that carry no gradient:
    $$\\nabla_\\theta: -\\sum_k v_k \\log p_\\theta(x, z_k) \\qquad
    \\nabla_\\phi: -\\lambda \\sum_k v_k \\log q_\\phi(z_k | x)
    - (1 - \\lambda)\\, E_{p(x, z)} \\log q_\\phi(z | x)$$
    wake for the model, wake for the guide, sleep for the guide. The first is the gradient of the
    IWAE bound; the others move the guide towards the posterior in the inclusive KL, which needs no
    reparameterisation and covers modes.

    Args:
        insomnia: lambda; 1 for no sleep phase. Sleep simulates the data from the model, so the
            observations must be arguments of the programs, and the guide a function of them.
    """

    insomnia: float = 1.0
    detach_draws = True
    _checked: list = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.insomnia <= 1:
            raise ObjectiveError(f"insomnia must be between 0 and 1, got {self.insomnia!r}")

    def __call__(self, draws: WeightedDraws) -> Mapping[str, Tensor]:
        _check_inside(draws)
        v = torch.softmax(raised(draws.log_w.detach()), 0)
        losses = {"wake_model": -draws.outer - draws.size * (v * draws.log_p).sum()}
        if self.insomnia > 0:
            losses["wake_guide"] = -self.insomnia * draws.size * (v * draws.log_q).sum()
        if self.insomnia < 1:
            losses["sleep_guide"] = (1 - self.insomnia) * self._sleep(draws)
        return losses

    def _sleep(self, draws: WeightedDraws) -> Tensor:
        """-log q(z | x) of one simulated data set and its latents, nats."""
        simulated = _simulated(draws)
        nodes = sample_nodes(run(draws.guide, simulated.args, simulated.kwargs, simulated.trace))
        if (draws.model, draws.guide) not in self._checked:
            _check_encoder(draws, simulated.trace, nodes)
            with torch.no_grad():
                replayed(simulated)  # else the latents are no draws given the data
            self._checked[:] = [(draws.model, draws.guide)]
        return -total_log_prob(nodes)

    def __str__(self) -> str:
        return "wake" if self.insomnia == 1 else f"wake, {1 - self.insomnia:g} sleep"


def _simulated(draws: WeightedDraws) -> Simulated:
    """A data set from the model, in the place of the arguments."""
    with torch.no_grad():
        simulated = simulate(draws.model, draws.args, draws.kwargs)
    if simulated.hidden:
        raise ObjectiveError(
            f"the sleep phase shows the guide simulated data, but the observation of site "
            f"'{simulated.hidden[0]}' is no argument. Pass it as one, or use insomnia=1."
        )
    return simulated


def _check_encoder(draws: WeightedDraws, trace: Any, nodes: Mapping) -> None:
    """Sleep teaches how latents follow from data: refuse a guide that does not read the data."""
    for name, node in nodes.items():
        if is_delta(node["fn"]) or name not in trace.nodes:
            raise ObjectiveError(
                f"the sleep phase needs a guide that samples each latent itself, but '{name}' is "
                "a Delta or auxiliary. Use pvi.guides or your own guide, or insomnia=1."
            )
    with torch.no_grad():
        other = sample_nodes(run(draws.guide, draws.args, draws.kwargs, trace))
    pairs = [(density(x).log_prob(), density(nodes[n]).log_prob()) for n, x in other.items()]
    if pairs and all(torch.equal(a, b) for a, b in pairs):
        raise ObjectiveError(
            "the sleep phase needs a guide that is a function of the data, but "
            f"'{next(iter(nodes))}' is drawn alike for simulated data: it would be pulled to the "
            "prior. Use insomnia=1."
        )


def _check_inside(draws: WeightedDraws) -> None:
    """Every latent must be weighted: what is drawn once per bound has no weights to learn by."""
    for term in draws.outer_sites:
        if term.log_q is not None and term.log_q.requires_grad:
            raise ObjectiveError(
                f"reweighted wake-sleep needs a weight for every latent, but '{term.name}' is "
                "drawn once per bound. Use bound='joint', or gradient='auto'."
            )
