"""Weights that are random along one direction for inputs and one for outputs."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pvi.errors import ModelError
from pvi.models.bnn.layers import LAYERS


class Factors(nn.Module):
    """$W = W_0 \\circ (r s^\\top)$ with a factor for each output and each input channel."""

    def __init__(self, weight: Tensor):
        super().__init__()
        like = weight.detach()
        self.outputs = nn.Parameter(like.new_ones(weight.shape[0]))
        self.inputs = nn.Parameter(like.new_ones(weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        rest = (1,) * (weight.dim() - 2)
        factors = self.outputs.reshape(-1, 1, *rest) * self.inputs.reshape(1, -1, *rest)
        return weight * factors


def rank_one(module: nn.Module) -> nn.Module:
    """A copy of a module whose weights have factors for rows and columns (Dusenberry et al. 2020).

    Make a model of it with random factors, around 1, and learned weights:

        net = bnn.rank_one(module)
        model = bnn.bayesianize(net, where=bnn.factors, prior=dist.Normal(1.0, 0.1))

    Few numbers are random, so that a `pvi.guides.Mixture` or `FullRank` of them is cheap.

    Args:
        module: with linear layers or convolutions.

    Raises:
        ModelError: it has none.
    """
    net = copy.deepcopy(module)
    layers = [m for m in net.modules() if type(m) in LAYERS]
    if not layers:
        raise ModelError("rank_one needs linear layers or convolutions; the module has none")
    for layer in layers:
        with torch.no_grad():
            made = Factors(layer.weight)  # type: ignore[arg-type]
            parametrize.register_parametrization(layer, "weight", made)
    return net


def factors(name: str, owner: nn.Module, parameter: nn.Parameter) -> bool:
    """A `where` that selects the factors of `rank_one`."""
    return isinstance(owner, Factors)
