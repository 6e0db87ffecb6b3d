"""Layers whose activations may be drawn in the place of their weights, and how: torch's own
`Linear` and `Conv`. Whether a network allows it is tried in `trial`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pvi.models.bnn.selection import Weight

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Hook = Callable[[Tensor, Tensor], Tensor]  # from a layer's input and output to its new output


@dataclass(frozen=True)
class Layer:
    """A layer with a random weight.

    Args:
        name, module: of the layer.
        weight: the name of its random weight.
        bias: that of its bias, where that is random too.
    """

    name: str
    module: nn.Module
    weight: str
    bias: str | None

    @property
    def tensor(self) -> Tensor:
        """The weight in the module."""
        weight: Any = self.module.weight
        return weight.detach()

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with other numbers, its stride, padding and groups included."""
        if isinstance(self.module, nn.Linear):
            return linear(x, weight, bias)
        # the one way to all padding modes; `test_bnn_layers` compares it with the layer's forward
        return self.module._conv_forward(x, weight, bias)  # type: ignore[operator]

    def per_datum(self, x: Tensor) -> list[int]:
        """The shape of one number for each datum and output channel."""
        rest, outputs = [1] * (x.dim() - 2), self.tensor.shape[0]
        if isinstance(self.module, nn.Linear):
            return [len(x), *rest, outputs]
        return [len(x), outputs, *rest]

    def inputs(self, x: Tensor) -> list[int]:
        """The same for input channels."""
        rest = [1] * (x.dim() - 2)
        if isinstance(self.module, nn.Linear):
            return [len(x), *rest, x.shape[-1]]
        return [len(x), x.shape[1], *rest]


def local(layer: Layer, scale: Tensor, bias_scale: Tensor | None) -> Hook:
    """Noise of its own for each datum (Kingma, Salimans, Welling 2015, eq. 6)."""

    def hook(x: Tensor, output: Tensor) -> Tensor:
        square = None if bias_scale is None else bias_scale.square()
        variance = layer.apply(x.square(), scale.square(), square)
        # the root has no slope at 0, where a dead input leaves nothing to add
        sd = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
        return output + sd * torch.randn_like(output)

    return hook


def flipout(layer: Layer, deviation: Tensor, bias_scale: Tensor | None) -> Hook:
    """Random signs for each datum around one draw of the weight (Wen et al. 2018, eq. 4).

    The bias, which is added once, has noise of its own for each datum.
    """

    def hook(x: Tensor, output: Tensor) -> Tensor:
        shape = layer.per_datum(x)
        shift = layer.apply(x * _signs(layer.inputs(x), x), deviation, None)
        output = output + shift * _signs(shape, x)
        if bias_scale is not None:
            noise = torch.randn(shape, dtype=x.dtype, device=x.device)
            output = output + bias_scale.reshape(shape[1:]) * noise
        return output

    return hook


def _signs(shape: list[int], like: Tensor) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device).sign()


def candidates(
    module: nn.Module, weights: Mapping[str, Weight]
) -> tuple[list[Layer], dict[str, str]]:
    """The layers to try; and for the other weights why not, by name."""
    layers: list[Layer] = []
    why: dict[str, str] = {}
    names = {id(p): n for n, p in module.named_parameters() if n in weights}
    for name, layer in module.named_modules():
        weight = names.get(id(getattr(layer, "weight", None)))
        if weight is None or type(layer) not in LAYERS:
            continue
        if layer._forward_hooks or layer._forward_pre_hooks:
            why[weight] = f"sampled: '{name}' has hooks of its own"
        layers.append(Layer(name, layer, weight, names.get(id(getattr(layer, "bias", None)))))
    owners = Counter(n for x in layers for n in (x.weight, x.bias) if n is not None)
    why |= {n: "sampled: several layers share it" for n, count in owners.items() if count > 1}
    layers = [x for x in layers if x.weight not in why and x.bias not in why]
    taken = {n for x in layers for n in (x.weight, x.bias)}
    for name, weight in weights.items():
        if name not in taken:
            why.setdefault(name, f"sampled: in {type(weight.owner).__name__}")
    return layers, why


@contextmanager
def hooked(layers: Iterable[Layer], hooks: Mapping[str, Hook]) -> Iterator[dict[str, int]]:
    """Put hooks on layers for a while; yields how often each was called.

    Args:
        hooks: by the name of the layer.
    """
    calls = dict.fromkeys(hooks, 0)

    def attached(name: str) -> Any:
        def forward_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            calls[name] += 1
            return hooks[name](args[0], output)

        return forward_hook

    found = [x.module.register_forward_hook(attached(x.name)) for x in layers if x.name in hooks]
    try:
        yield calls
    finally:
        for handle in found:
            handle.remove()
