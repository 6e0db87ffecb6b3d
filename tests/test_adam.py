"""Adam in one pass, where torch's is right."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvi
from pvi.engine.params import Params
from pvi.fit.schedule import Schedule


class Guide(nn.Module):
    """Its parameter is a column of a table, or a copy of one."""

    def __init__(self, wide: bool):
        super().__init__()
        table = torch.linspace(0.0, 1.0, 12).reshape(4, 3)
        self.loc = nn.Parameter(table.clone()[:, 1] if wide else table[:, 1].contiguous())

    def forward(self, y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(self.loc, 0.1).to_event(1))


def program(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(4), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.sum(-1, keepdim=True), 1.0), obs=y)


def test_parameters_with_gaps() -> None:
    """Torch's fused Adam goes wrong on them."""
    guides, y = [Guide(wide) for wide in (False, True)], torch.linspace(0.5, 2.0, 8)
    assert not guides[1].loc.is_contiguous()
    for guide in guides:
        pvi.fit(program, guide, args=(y,), optimizer="adam", steps=20, seed=0, progress=False)
    torch.testing.assert_close(guides[0].loc, guides[1].loc)


def test_transposed_gradients() -> None:
    """As those of compiled steps may be; torch's fused Adam goes wrong on them, too."""
    layer, gradient = nn.Linear(3, 2, bias=False), torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1, 1]])
    adam = Schedule(1, 10, None, 0.1, "adam").optimizer(Params(layer))
    assert adam.param_groups[0]["fused"]
    before, layer.weight.grad = layer.weight.detach().clone(), gradient.t()
    adam.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * gradient.t())
