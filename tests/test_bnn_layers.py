"""Activations drawn in the place of weights: their distribution for each kind of layer, and the
layers for which that is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.utils.parametrizations import weight_norm

from pvi.models import bnn
from pvi.models.bnn import layers, network

NUM = 4000
ROWS = 3
pytestmark = pytest.mark.usefixtures("isolated")


class Sequence(nn.Module):
    """A layer that each datum passes at five positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(len(x), 5, 2))


def conv(dims: int, **options: Any) -> nn.Module:
    kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    options = {"kernel_size": 3, "padding": 1, **options}
    return nn.Sequential(nn.Unflatten(1, (2, *[4] * dims)), kind(2, 4, **options))


SHAPES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear": (lambda: nn.Linear(4, 3), 4),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), 4),
    "linear at positions": (Sequence, 10),
    "conv1d": (lambda: conv(1), 8),
    "conv1d, reflect": (lambda: conv(1, padding_mode="reflect", bias=False), 8),
    "conv1d, replicate": (lambda: conv(1, padding_mode="replicate", stride=2), 8),
    "conv2d": (lambda: conv(2), 32),
    "conv2d, circular, groups": (lambda: conv(2, padding_mode="circular", groups=2), 32),
    "conv2d, same": (lambda: conv(2, padding="same", bias=False), 32),
    "conv3d": (lambda: conv(3, stride=3, dilation=1), 128),
}
EXACT = [(name, kind) for name in SHAPES for kind in ("local", "flipout")]


def prepared(module: nn.Module, rows: int, width: int) -> tuple[Any, Any, dict, Tensor]:
    """A network over all weights of a module, normals over them, and inputs some of which are 0."""
    torch.manual_seed(1)
    weights = bnn.selection.select(module, None)
    normals = {n: (torch.randn(w.shape), 0.2 + torch.rand(w.shape)) for n, w in weights.items()}
    x = torch.randn(rows, width)
    x[-1, : width // 2] = 0.0
    return network.Network(module, weights, 1), weights, normals, x


def draws(net: Any, weights: Mapping, normals: Mapping, x: Tensor, kind: str) -> Tensor:
    """`(NUM, rows, outputs)` of the network; the kind "sampled" uses the weights' draws."""
    values = {
        n: normals[n][0] + normals[n][1] * torch.randn(NUM, 1, *w.shape) for n, w in weights.items()
    }
    how = net.how(kind, (x,)) if kind != "sampled" else {}
    given = {}
    if kind != "sampled":  # expanded, as a plate of particles does
        given = {n: tuple(v.expand(NUM, 1, *v.shape) for v in pair) for n, pair in normals.items()}
    return net((x,), values, given, how).reshape(NUM, len(x), -1)


def exact(net: Any, normals: Mapping, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(rows, d)` and covariance `(rows, d, rows, d)` of a module that is linear in them."""
    locs = {n: loc for n, (loc, _) in normals.items()}

    def outputs(values: dict) -> Tensor:
        return net((x,), values, {}, {}).reshape(len(x), -1)

    cov: Any = 0.0
    for name, jacobian in jacrev(outputs)(locs).items():
        scaled = (jacobian * normals[name][1]).flatten(2)
        cov = cov + torch.einsum("iap,jbp->iajb", scaled, scaled)
    return outputs(locs), cov


def check_distribution(name: str, kind: str) -> None:
    """Each datum's outputs have the joint distribution that draws of the weights give them."""
    make, width = SHAPES[name]
    torch.manual_seed(0)
    net, weights, normals, x = prepared(make(), ROWS, width)
    y = draws(net, weights, normals, x, kind)
    mean, cov = exact(net, normals, x)
    for i in range(ROWS):
        c = cov[i, :, i]
        v = c.diagonal()
        z = (y[:, i].mean(0) - mean[i]) / (v / NUM).sqrt().clamp(min=1e-12)
        assert z.abs().max() < 5.0
        residual = y[:, i] - mean[i]
        found = residual.T @ residual / NUM
        se = ((v.unsqueeze(1) * v + c.square()) / NUM).sqrt().clamp(min=1e-12)
        assert ((found - c) / se).abs().max() < 5.5
        assert (found.diagonal() > 0.5 * v).all()


@pytest.mark.parametrize(("name", "kind"), EXACT)
def test_each_datum_has_the_distribution_that_weights_give_it(name: str, kind: str) -> None:
    check_distribution(name, kind)


def test_weights_themselves_pass_the_same_check() -> None:
    check_distribution("conv2d", "sampled")


@pytest.mark.parametrize("wrong", ["no noise", "noise of its own at each position"])
def test_the_check_has_teeth(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(layer: Any, *rest: Any) -> layers.Hook:
        return lambda x, output: output

    def positions(layer: Any, deviation: Tensor, bias: Tensor | None) -> layers.Hook:
        return layers.local(layer, torch.full_like(deviation, 0.7), bias)

    monkeypatch.setattr(network, "flipout", silent if wrong == "no noise" else positions)
    with pytest.raises(AssertionError):
        check_distribution("conv2d", "flipout")


def test_local_noise_is_independent_between_data() -> None:
    net, weights, normals, x = prepared(nn.Linear(4, 3), ROWS, 4)
    mean, cov = exact(net, normals, x)
    for kind, share in (("sampled", 1.0), ("local", 0.0)):
        y = draws(net, weights, normals, x, kind) - mean
        found = (y[:, 0, 0] * y[:, 1, 0]).mean()
        se = (cov[0, 0, 0, 0] * cov[1, 0, 1, 0] + cov[0, 0, 1, 0] ** 2).sqrt() / NUM**0.5
        assert abs(found - share * cov[0, 0, 1, 0]) < 4.0 * se
        assert abs(cov[0, 0, 1, 0]) > 10.0 * se


def test_a_dead_input_has_a_finite_gradient() -> None:
    net, _, normals, x = prepared(nn.Linear(4, 3, bias=False), ROWS, 4)
    scale = normals["weight"][1].requires_grad_()
    values = {"weight": torch.zeros(3, 4)}
    y = net((torch.zeros_like(x),), values, normals, {"weight": "local"})
    (slope,) = torch.autograd.grad(y.sum(), scale)
    assert torch.equal(slope, torch.zeros_like(slope))


# Which layers.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x))


class Peeks(Twice):
    """Reads its weight past the layer too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + 0.1 * self.a.weight.sum()


class Turned(Twice):
    """Rows are the second dimension of the layer's input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.stack([x, 2.0 * x])).sum(0)


class Folded(Twice):
    """Two positions of a datum are rows of the layer's input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.cat([x, 2.0 * x])).reshape(2, len(x), 3).sum(0)


def hooked_linear() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.register_forward_hook(lambda module, args, output: 2.0 * output)
    return layer


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "tied": (Tied, "a.weight", "several layers share it"),
    "twice": (Twice, "a.weight", "its layer runs 2 times"),
    "peeks": (Peeks, "a.weight", "its weight is read past the layer"),
    "turned": (Turned, "a.weight", "rows of data are not the first dimension"),
    "folded": (Folded, "a.weight", "rows of data are not the first dimension"),
    "hooks": (lambda: nn.Sequential(hooked_linear()), "0.weight", "'0' has hooks of its own"),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(3, 3))),
        "0.parametrizations.weight.original1",
        "in ParametrizationList",
    ),
    "old weight norm": (old_weight_norm, "0.weight_v", "in Linear"),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(3)), "0.weight", "in LayerNorm"),
}


def how(module: nn.Module, x: Tensor, kind: str = "local") -> dict[str, str]:
    return network.Network(module, bnn.selection.select(module, None), 1).how(kind, (x,))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_layers_say_why(case: str) -> None:
    make, name, why = REFUSED[case]
    assert why in how(make(), torch.randn(5, 3))[name]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_reads_its_projection_past_the_layer(training: bool, grad: bool) -> None:
    module = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).train(training)
    with torch.set_grad_enabled(grad):
        found = how(module, torch.randn(5, 6, 4))
    assert found["self_attn.out_proj.weight"] == "sampled: in NonDynamicallyQuantizableLinear"
    assert found["self_attn.in_proj_weight"] == "sampled: in MultiheadAttention"
    assert found["linear1.weight"] == found["linear2.bias"] == "flipout"
    plain = nn.MultiheadAttention(4, 2, batch_first=True)
    plain.out_proj = nn.Linear(4, 4)  # torch's own has a type of its own
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).train(training)
    layer.self_attn = plain
    found = how(layer, torch.randn(5, 6, 4))
    assert "runs 0 times" in found["self_attn.out_proj.weight"]


def test_kinds_of_noise() -> None:
    x = torch.randn(5, 3)
    assert set(how(nn.Sequential(nn.Linear(3, 2)), x).values()) == {"local"}
    assert set(how(nn.Sequential(nn.Linear(3, 2)), x, "flipout").values()) == {"flipout"}
    net = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(4, 1))
    found = how(net, x)
    assert found["1.weight"] == found["1.bias"] == "flipout"
    assert found["3.weight"] == found["3.bias"] == "local"


def test_a_trial_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    assert how(net, torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))["0.weight"] == (
        "local"
    )
    assert torch.equal(torch.randn(2), expected)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert not any(m._forward_hooks for m in net.modules())
