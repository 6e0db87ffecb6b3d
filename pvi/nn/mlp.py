"""Multilayer perceptrons."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import glu

from pvi.errors import ModelError
from pvi.nn.component import Component

ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "elu": nn.ELU}
Shape = int | Sequence[int]


class MLP(Component):
    """Layers $h \\leftarrow a(W h + b)$, the last one linear: `(*batch, *inputs)` to `(*batch, n)`.

    Args:
        inputs: shape of an input; inputs are flattened.
        outputs: how many numbers n.
        hidden: units of each hidden layer.
        activation: "silu", "relu", "tanh", "gelu" or "elu".
    """

    def __init__(
        self,
        inputs: Shape,
        outputs: int,
        hidden: Sequence[int] = (256, 256),
        activation: str = "silu",
    ):
        super().__init__()
        self.inputs, self.outputs = as_shape(inputs), outputs
        self.hidden, self.activation = tuple(hidden), activation
        if activation not in ACTIVATIONS:
            raise ModelError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        widths = [math.prod(self.inputs), *self.hidden]
        parts: list[nn.Module] = []
        for i, o in zip(widths, self.hidden, strict=False):
            parts += [nn.Linear(i, o), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*parts, nn.Linear(widths[-1], outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(flat(x, self.inputs))


class GatedMLP(Component):
    """Gated layers $h \\leftarrow (W h + b) \\odot \\sigma(V h + c)$ (Dauphin et al. 2017).

    Args:
        inputs, outputs, hidden: as of `MLP`.
    """

    def __init__(self, inputs: Shape, outputs: int, hidden: Sequence[int] = (300, 300)):
        super().__init__()
        self.inputs, self.outputs, self.hidden = as_shape(inputs), outputs, tuple(hidden)
        widths = [math.prod(self.inputs), *self.hidden]
        self.gated = nn.ModuleList(
            nn.Linear(i, 2 * o) for i, o in zip(widths, self.hidden, strict=False)
        )
        self.last = nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = flat(x, self.inputs)
        for layer in self.gated:
            x = glu(layer(x), -1)
        return self.last(x)


def as_shape(shape: Shape) -> tuple[int, ...]:
    """A shape as a tuple.

    >>> as_shape(3), as_shape([1, 8, 8])
    ((3,), (1, 8, 8))
    """
    return (shape,) if isinstance(shape, int) else tuple(shape)


def flat(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The last dimensions, of that shape, as one: `(*batch, *shape)` to `(*batch, n)`.

    Raises:
        ModelError: x has another shape.
    """
    n = len(shape)
    if tuple(x.shape[x.dim() - n :]) != tuple(shape):
        raise ModelError(
            f"a network for inputs of shape {tuple(shape)} got a tensor of shape {tuple(x.shape)}"
        )
    return x.reshape(*x.shape[: x.dim() - n], math.prod(shape))
