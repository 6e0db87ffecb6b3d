"""A masked multilayer perceptron: all conditionals of an autoregressive model in one pass."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pvi.errors import ModelError
from pvi.nn.component import Component
from pvi.nn.mlp import ACTIVATIONS, Shape, as_shape


class MADE(Component):
    """Numbers for each element of a datum that depend on the elements before it alone.

    $$h_i = f_i(x_1, \\dots, x_{i-1}, c)$$

    for all i at once, by masks on the weights of an MLP: `(*batch, *shape)` to
    `(*batch, width, *shape)`.

    Args:
        shape: of a datum; its elements are in the order of `x.flatten()`.
        width: how many numbers for each element.
        hidden: units of each hidden layer, at least one layer.
        features: numbers in which each element comes in, in a last dimension where there are more
            than one (one-hot classes).
        context: numbers for each element of a second input `(*batch, context, *shape)`, which all
            outputs may depend on; 0 for none.
        activation: as of `MLP`.

    Reference:
        Germain, Gregor, Murray, Larochelle (2015), MADE: Masked Autoencoder for Distribution
        Estimation, eqs. 12 and 13.
    """

    def __init__(
        self,
        shape: Shape,
        width: int = 1,
        hidden: Sequence[int] = (256, 256),
        *,
        features: int = 1,
        context: int = 0,
        activation: str = "silu",
    ):
        super().__init__()
        self.shape, self.width, self.hidden = as_shape(shape), width, tuple(hidden)
        self.features, self.context, self.activation = features, context, activation
        if not self.hidden or activation not in ACTIVATIONS:
            raise ModelError(
                f"MADE needs a hidden layer and an activation of {sorted(ACTIVATIONS)}, got "
                f"hidden={self.hidden}, activation={activation!r}"
            )
        n = math.prod(self.shape)
        before, layers = torch.arange(1, n + 1).repeat_interleave(features), []
        for units in self.hidden:
            seen = torch.arange(units) * n // units  # a unit sees the first so many elements
            layers.append(MaskedLinear(before.unsqueeze(0) <= seen.unsqueeze(1)))
            before = seen
        last = torch.arange(n).repeat(width)
        self.layers = nn.ModuleList(layers)
        self.last = MaskedLinear(before.unsqueeze(0) <= last.unsqueeze(1))
        self.activate = ACTIVATIONS[activation]()
        if context:
            self.given = nn.Linear(context * n, self.hidden[0], bias=False)

    @property
    def order(self) -> Tensor:
        """The places of `x.flatten()` in the order of the conditionals, `(n,)`."""
        return torch.arange(math.prod(self.shape))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = flat_elements(x, self.shape, self.features)
        check_context(context, self.context)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 0 and context is not None:
                x = x + self.given(context.flatten(-1 - len(self.shape)))
            x = self.activate(x)
        x = self.last(x)
        return x.reshape(*x.shape[:-1], self.width, *self.shape)


class MaskedLinear(nn.Linear):
    """A linear layer without some of its weights.

    Args:
        mask: which weights are there, `(outputs, inputs)`.
    """

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight * self.mask, self.bias)


def flat_elements(x: Tensor, shape: Sequence[int], features: int) -> Tensor:
    """Elements of a datum, of some features each, in one dimension: `(*batch, n * features)`.

    Raises:
        ModelError: x has another shape.
    """
    full = (*shape, features) if features > 1 else tuple(shape)
    if tuple(x.shape[x.dim() - len(full) :]) != full:
        raise ModelError(
            f"an autoregressive network for inputs of shape {full} got a tensor of shape "
            f"{tuple(x.shape)}"
        )
    return x.flatten(x.dim() - len(full))


def check_context(context: Tensor | None, width: int) -> None:
    """Refuse a context where there should be none, or none where there should be one.

    Raises:
        ModelError: saying which.
    """
    if (context is None) != (width == 0):
        got = "none" if context is None else f"one of shape {tuple(context.shape)}"
        raise ModelError(
            f"an autoregressive network with context={width} got {got}: give it its number of "
            "context numbers for each element"
        )
